//! The record layer without a connection, for benches/tls.rs and for fuzzing.

use super::opener::{Opened, Opener};
use super::provider::TlsProvider;
use super::record::Protection;
use super::sealer::{self, Sealer};

/// Most bytes of a batch.
pub const MAX_BATCH_TEXT: usize = sealer::MAX_BATCH_TEXT;

/// Seals into memory.
pub struct Seal(Sealer);

/// Opens from memory.
pub struct Open(Opener);

impl Seal {
    /// With a fixed key.
    ///
    /// # Panics
    /// When the provider does not take a key of AES-256-GCM.
    pub fn new(provider: TlsProvider) -> Self {
        Self(Sealer::new(protection(provider), u64::MAX))
    }

    /// Seals `len` bytes that `fill` writes, at most [`MAX_BATCH_TEXT`], and gives the records.
    pub fn batch(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> &[u8] {
        self.0.clear();
        let encrypted = self.0.data(len, fill);
        debug_assert_eq!(encrypted, Ok(len));
        self.0.encrypted()
    }

    /// Seals one record that carries any `content`; `None` where the text is too long for it.
    pub fn record(&mut self, content: u8, text: &[u8]) -> Option<&[u8]> {
        self.0.clear();
        self.0.control(content, text).ok()?;
        Some(self.0.encrypted())
    }

    /// Begins anew, with the key of [`Seal::new`].
    pub fn rekey(&mut self, provider: TlsProvider) {
        self.0.rekey(protection(provider));
    }
}

impl Open {
    /// With the key of [`Seal::new`].
    ///
    /// # Panics
    /// As there.
    pub fn new(provider: TlsProvider) -> Self {
        Self(Opener::new(protection(provider), &[]))
    }

    /// Opens what a peer may send, and puts the data into `data`. An update of the key leads to
    /// that of [`Open::new`] again.
    ///
    /// # Errors
    /// What is wrong with a record.
    ///
    /// # Panics
    /// When there is no record, and no room for more bytes either.
    pub fn feed(
        &mut self,
        provider: TlsProvider,
        mut sealed: &[u8],
        data: &mut Vec<u8>,
    ) -> Result<(), String> {
        loop {
            match self.0.open().map_err(|bad| format!("{bad:?}"))? {
                Opened::Data => {
                    let opened = self.0.data();
                    data.extend_from_slice(opened);
                    let len = opened.len();
                    self.0.take(len);
                }
                Opened::KeyUpdate(_) => self.0.rekey(protection(provider)),
                Opened::Alert(..) | Opened::Other => {}
                Opened::Nothing if sealed.is_empty() => return Ok(()),
                Opened::Nothing => {
                    let room = self.0.room();
                    assert!(!room.is_empty(), "no room for the rest of a record");
                    let (next, later) = sealed.split_at(room.len().min(sealed.len()));
                    room.iter_mut().zip(next).for_each(|(to, from)| *to = *from);
                    self.0.fill(next.len());
                    sealed = later;
                }
            }
        }
    }

    /// Opens what `receive` puts into a buffer, as a socket would; gives the bytes of data in it.
    ///
    /// # Panics
    /// When the records are not those of a [`Seal`] in order.
    pub fn batch(&mut self, receive: &mut dyn FnMut(&mut [u8]) -> usize) -> usize {
        let count = receive(self.0.room());
        self.0.fill(count);
        let mut opened = 0;
        loop {
            match self.0.open() {
                Ok(Opened::Data) => {
                    let len = self.0.data().len();
                    self.0.take(len);
                    opened += len;
                }
                Ok(Opened::Nothing) => return opened,
                other => panic!("{other:?}"),
            }
        }
    }
}

fn protection(provider: TlsProvider) -> Protection {
    match Protection::fixed(provider) {
        Ok(protection) => protection,
        Err(unsound) => panic!("{unsound:?}"),
    }
}
