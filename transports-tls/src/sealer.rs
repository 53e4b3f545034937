//! Outgoing records, encrypted in place, several to one write.

use super::provider::Unsound;
use super::record::{MAX_ENCRYPTED, MAX_TEXT, Protection, content};

/// Data records to one write: 256 KiB of text. They stay in the L2 cache from the copy to the
/// socket.
const BATCH: usize = 16;
/// Before the data, a key update may have to go; after it, a close_notify or an alert.
const CONTROL: usize = 2;

/// Most plaintext that one write takes.
pub(crate) const MAX_BATCH_TEXT: usize = BATCH * MAX_TEXT;

/// Encrypts records into one buffer.
pub(crate) struct Sealer {
    protection: Protection,
    /// Records that a key may protect.
    limit: u64,
    buffer: Box<[u8]>,
    filled: usize,
    /// For each data record in the buffer, where it ends, and how much text there is up to there.
    ends: Vec<(usize, usize)>,
    /// Bytes of text that this key has encrypted.
    text: u64,
}

impl Sealer {
    pub(crate) fn new(protection: Protection, limit: u64) -> Self {
        let buffer = vec![0; (BATCH + CONTROL) * MAX_ENCRYPTED].into();
        Self { protection, limit, buffer, filled: 0, ends: Vec::with_capacity(BATCH), text: 0 }
    }

    /// Begins an empty batch.
    pub(crate) fn clear(&mut self) {
        self.filled = 0;
        self.ends.clear();
    }

    /// Adds up to `len` bytes of data, which `fill` writes in pieces, in order. Gives how many
    /// there was room for.
    pub(crate) fn data(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<usize, Unsound> {
        let mut taken = 0;
        while taken < len && self.ends.len() < BATCH {
            let text = (len - taken).min(MAX_TEXT);
            self.record(content::APPLICATION_DATA, text, fill)?;
            taken += text;
            self.ends.push((self.filled, taken));
        }
        self.text += taken as u64;
        Ok(taken)
    }

    /// Adds a control record: an alert, a key update.
    pub(crate) fn control(&mut self, content: u8, message: &[u8]) -> Result<(), Unsound> {
        self.record(content, message.len(), &mut |into| into.copy_from_slice(message))
    }

    /// The bytes to write.
    pub(crate) fn encrypted(&self) -> &[u8] {
        self.buffer.get(..self.filled).unwrap_or_default()
    }

    /// How much text has gone when the first `sent` bytes of the batch have: only a whole record
    /// can be opened.
    pub(crate) fn text_in(&self, sent: usize) -> usize {
        self.ends.iter().take_while(|(end, _)| *end <= sent).last().map_or(0, |(_, text)| *text)
    }

    /// Bytes of text that this key has encrypted.
    pub(crate) fn text_since_refresh(&self) -> u64 {
        self.text
    }

    /// Whether the key has protected as many records as it may: there is room for one more batch.
    pub(crate) fn is_worn(&self) -> bool {
        self.protection.sequence() >= self.limit.saturating_sub(2 * (BATCH + CONTROL) as u64)
    }

    /// Replaces the keys.
    pub(crate) fn rekey(&mut self, protection: Protection) {
        self.protection = protection;
        self.text = 0;
    }

    fn record(
        &mut self,
        content: u8,
        text_len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), Unsound> {
        let text_at = self.protection.text_at();
        let end = self.filled + self.protection.encrypted_len(text_len);
        let record = self.buffer.get_mut(self.filled..end).ok_or(Unsound)?;
        fill(record.get_mut(text_at..text_at + text_len).ok_or(Unsound)?);
        self.protection.seal(content, record)?;
        self.filled = end;
        Ok(())
    }
}
