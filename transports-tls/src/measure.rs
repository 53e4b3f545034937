//! The record layer without a connection, for benches/tls.rs.

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
}

impl Open {
    /// With the key of [`Seal::new`].
    ///
    /// # Panics
    /// As there.
    pub fn new(provider: TlsProvider) -> Self {
        Self(Opener::new(protection(provider), &[]))
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
