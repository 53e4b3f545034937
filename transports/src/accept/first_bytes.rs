//! The first bytes of a connection, which identify it as main or as a channel.

/// The length of a connection's whole opening message, given its first four bytes; less than four
/// is four.
pub type OpeningLen = fn([u8; FirstBytes::MOST]) -> usize;

/// What a connection has sent before anything is known of it. `received <= bytes.len()`
pub(crate) struct FirstBytes {
    bytes: Vec<u8>,
    received: usize,
    opening: OpeningLen,
}

impl FirstBytes {
    /// Bytes that tell the main channel from the others. Spec: docs/wire.md §12.
    pub(crate) const MOST: usize = 4;

    /// `wanted`: at most [`Self::MOST`]; `opening` is called when that many have been received.
    pub(crate) fn new(wanted: usize, opening: OpeningLen) -> Self {
        Self { bytes: vec![0; wanted], received: 0, opening }
    }

    /// Room for what is still to come; empty when all is here.
    pub(crate) fn missing(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.received..).unwrap_or_default()
    }

    /// `count` bytes were received into [`missing`](Self::missing).
    pub(crate) fn note(&mut self, count: usize) {
        self.received += count;
        if self.received == Self::MOST {
            let whole = (self.opening)(self.first());
            self.bytes.resize(whole.max(Self::MOST), 0);
        }
    }

    pub(crate) fn received(&self) -> usize {
        self.received
    }

    pub(crate) fn so_far(&self) -> &[u8] {
        self.bytes.get(..self.received).unwrap_or_default()
    }

    /// The first four; zeros where there are fewer.
    pub(crate) fn first(&self) -> [u8; Self::MOST] {
        let mut first = [0; Self::MOST];
        first.iter_mut().zip(&self.bytes).for_each(|(to, from)| *to = *from);
        first
    }
}
