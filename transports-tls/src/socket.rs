//! What a handshake needs of the event loop that it runs in.

use std::io;
use std::time::Duration;

use socket2::Socket;

/// What a socket can be waited for to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// There are bytes, or the end.
    Readable,
    /// There is room for bytes.
    Writable,
}

/// A connected stream socket that does not block, in the hands of the caller's event loop.
///
/// This crate knows no runtime: a handshake waits by these methods only.
pub trait AsyncSocket: Sized {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// The system's error.
    fn new(socket: Socket) -> io::Result<Self>;

    /// Makes a call that does not block, again and again until it does not have to wait: until it
    /// is neither `WouldBlock` nor `Interrupted`.
    fn when_ready<T>(
        &self,
        ready: Ready,
        call: impl FnMut(&Socket) -> io::Result<T>,
    ) -> impl Future<Output = io::Result<T>>;

    /// What `work` comes to; `None` when `limit` has passed before.
    fn within<T>(limit: Duration, work: impl Future<Output = T>) -> impl Future<Output = Option<T>>;

    /// Gives the socket back, which does not block yet.
    ///
    /// # Errors
    /// The system's error.
    fn into_socket(self) -> io::Result<Socket>;
}

/// The first bytes of a client, by which the caller finds out what it is. How many are wanted may
/// depend on those that have come.
pub trait FirstBytes {
    /// Bytes that have come.
    fn received(&self) -> usize;

    /// Room for the bytes that are still to come; empty when all have.
    fn missing(&mut self) -> &mut [u8];

    /// Takes note of `count` bytes that were put into [`FirstBytes::missing`].
    fn note(&mut self, count: usize);
}
