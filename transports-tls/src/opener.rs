//! Incoming records, decrypted in place.

use std::ops::Range;

use super::record::{HEADER_LEN, MAX_PAYLOAD, Protection, Unopened, content};

/// Bytes that one read takes at most: as much as the other end writes at a time.
const BUFFER: usize = 256 << 10;

/// Records without data between two with data: key updates, tickets, empty ones. More is an attack
/// on our time.
const MAX_IDLE_RECORDS: u32 = 64;

/// Bytes of a message of the handshake protocol. Only session tickets come in after the handshake.
const MAX_MESSAGE: usize = 128 << 10;

/// What [`Opener::open`] has come upon.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// An alert: level and description.
    Alert(u8, u8),
    /// Data, in [`Opener::data`].
    Data,
    /// The peer goes on with its next key. True: and wants us to do the same.
    KeyUpdate(bool),
    /// There is no whole record: more bytes are needed.
    Nothing,
    /// A record without meaning here: empty data, a session ticket.
    Other,
}

/// What a peer may not send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// A handshake message in pieces, of which one is empty, or between which another record has
    /// come.
    Fragment,
    /// A record's version or type. The first bytes of it.
    Header([u8; HEADER_LEN]),
    /// A handshake message that may not come now, by its type.
    Message(u8),
    /// A record that is too long, or whose text is; its length after the header.
    Overflow(usize),
    /// Too many records that carry nothing.
    Idle,
    /// A record that the peer did not encrypt, or not at this place of the stream.
    Undecryptable,
}

/// Opens the records in one buffer. 0 <= data.start <= data.end <= start <= end <= buffer.len()
pub(crate) struct Opener {
    protection: Protection,
    buffer: Box<[u8]>,
    /// Decrypted, and not taken yet.
    data: Range<usize>,
    /// Where the records begin that are still encrypted, and where they end.
    start: usize,
    end: usize,
    /// The beginning of a handshake message that goes on in the next record.
    message: Vec<u8>,
    idle: u32,
    /// Whether there ever was a record with data.
    received_data: bool,
}

impl Opener {
    /// `encrypted` was received with the handshake.
    pub(crate) fn new(protection: Protection, encrypted: &[u8]) -> Self {
        let end = encrypted.len();
        let mut buffer = vec![0; end.max(BUFFER) + HEADER_LEN + MAX_PAYLOAD].into_boxed_slice();
        buffer.split_at_mut(end).0.copy_from_slice(encrypted);
        Self {
            protection,
            buffer,
            data: 0..0,
            start: 0,
            end,
            message: Vec::new(),
            idle: 0,
            received_data: false,
        }
    }

    /// Data that was opened and not taken yet.
    pub(crate) fn data(&self) -> &[u8] {
        self.buffer.get(self.data.clone()).unwrap_or_default()
    }

    /// Takes the first `count` bytes of the data, which must be there.
    pub(crate) fn take(&mut self, count: usize) {
        self.data.start = (self.data.start + count).min(self.data.end);
    }

    /// Whether the peer has sent data, ever.
    pub(crate) fn has_received_data(&self) -> bool {
        self.received_data
    }

    /// Bytes of a record that is not whole yet.
    pub(crate) fn partial(&self) -> usize {
        self.end - self.start
    }

    /// Where to put more bytes from the socket; never empty if there is no data and
    /// [`open`](Self::open) gave [`Opened::Nothing`].
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.data.is_empty() {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.buffer.len() - self.start < HEADER_LEN + MAX_PAYLOAD {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            self.data = self.start..self.start;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// Notes that `count` bytes were put into [`room`](Self::room).
    pub(crate) fn fill(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// Opens the next record. To be called when there is no data left.
    pub(crate) fn open(&mut self) -> Result<Opened, Bad> {
        let Some(len) = self.record_len()? else { return Ok(Opened::Nothing) };
        let at = self.start;
        let record = self.buffer.get_mut(at..at + len).ok_or(Bad::Undecryptable)?;
        let (content, text) = self.protection.open(record).map_err(|why| match why {
            Unopened::Overflow => Bad::Overflow(len - HEADER_LEN),
            Unopened::Unsound => Bad::Undecryptable,
        })?;
        self.start += len;
        let text = at + text.start..at + text.end;
        // RFC 8446 §5.1.
        let is_handshake = content == content::HANDSHAKE;
        if is_handshake && text.is_empty() || !is_handshake && !self.message.is_empty() {
            return Err(Bad::Fragment);
        }
        if content == content::APPLICATION_DATA && !text.is_empty() {
            (self.idle, self.received_data, self.data) = (0, true, text);
            return Ok(Opened::Data);
        }
        self.idle += 1;
        if self.idle > MAX_IDLE_RECORDS {
            return Err(Bad::Idle);
        }
        match content {
            content::APPLICATION_DATA => Ok(Opened::Other),
            content::ALERT => match self.buffer.get(text) {
                Some([level, description]) => Ok(Opened::Alert(*level, *description)),
                _ => Err(Bad::Undecryptable),
            },
            content::HANDSHAKE => self.handshake(text),
            other => Err(Bad::Header([other, 0, 0, 0, 0])),
        }
    }

    /// The key that the peer announced.
    pub(crate) fn rekey(&mut self, protection: Protection) {
        self.protection = protection;
    }

    /// The length of the next record, header included, if it is here as a whole.
    fn record_len(&self) -> Result<Option<usize>, Bad> {
        let encrypted = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some(header) = encrypted.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let [kind, major, _, high, low] = *header;
        let payload = usize::from(u16::from_be_bytes([high, low]));
        if !(20..=23).contains(&kind) || major != 3 {
            return Err(Bad::Header(*header));
        }
        if payload > self.protection.max_payload() {
            return Err(Bad::Overflow(payload));
        }
        let len = HEADER_LEN + payload;
        Ok((encrypted.len() >= len).then_some(len))
    }

    /// Messages of the handshake protocol that may come later: RFC 8446 §4.6.
    fn handshake(&mut self, text: Range<usize>) -> Result<Opened, Bad> {
        const NEW_SESSION_TICKET: u8 = 4;
        const KEY_UPDATE: u8 = 24;
        self.message.extend_from_slice(self.buffer.get(text).unwrap_or_default());
        let mut opened = Opened::Other;
        let mut rest = &self.message[..];
        while let Some(([kind, a, b, c], tail)) = rest.split_first_chunk::<4>() {
            let len = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap_or(usize::MAX);
            if len > MAX_MESSAGE {
                return Err(Bad::Message(*kind));
            }
            let Some((body, tail)) = tail.split_at_checked(len) else { break };
            opened = match (*kind, body) {
                (NEW_SESSION_TICKET, _) => Opened::Other,
                // The last of its record: what follows is under another key.
                (KEY_UPDATE, [wish @ (0 | 1)]) if tail.is_empty() => Opened::KeyUpdate(*wish == 1),
                _ => return Err(Bad::Message(*kind)),
            };
            rest = tail;
        }
        let done = self.message.len() - rest.len();
        self.message.drain(..done);
        Ok(opened)
    }
}
