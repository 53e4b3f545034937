//! A connected byte channel with blocking calls.

use std::io::{self, ErrorKind, IoSlice};
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use socket2::Socket;

use crate::SocketOptions;
use crate::channel::byte_stream::Copying;
use crate::channel::closer::{Closer, Link};
use crate::channel::stream::Stream;
use crate::file::FileStream;
use crate::os::socket;

mod acknowledged;
pub(crate) mod broken;
mod bulk;
pub(crate) mod byte_stream;
pub(crate) mod closer;
mod command;
pub(crate) mod pipe;
pub(crate) mod send_queue;
pub(crate) mod stream;
pub(crate) mod zero_copy;

/// A connected, blocking byte channel, in both directions unless it is a [pipe](Self::is_two_way).
///
/// All methods take `&self`: one thread may send while another receives, and any thread may hold
/// the [`closer`](Self::closer). Two threads that send at the same time get their bytes mixed, and
/// so do two that receive. Dropping the channel closes it.
#[derive(Debug)]
pub struct Channel {
    peer: String,
    link: Arc<Link>,
    /// Of a stream that is no descriptor: threads that copy.
    copying: Option<Arc<Copying>>,
    pushed_back: PushedBack,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Channel {
    /// Takes a connected, blocking socket; `first` is what was received on it already.
    pub(crate) fn new(socket: Socket, peer: String, first: &[u8]) -> Self {
        Self::over(Stream::Socket(socket), peer).push_back(first)
    }

    /// A channel that writes to a file, or reads it.
    pub(crate) fn of_file(file: FileStream, peer: String) -> Self {
        Self::over(Stream::File(Arc::new(file)), peer)
    }

    /// A channel over any kind of stream.
    pub(crate) fn over(stream: Stream, peer: String) -> Self {
        Self {
            peer,
            link: Arc::new(Link::new(stream)),
            copying: None,
            pushed_back: PushedBack::new(&[]),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    /// Lets `first`, all that was received so far, be received again.
    pub(crate) fn push_back(self, first: &[u8]) -> Self {
        Self { pushed_back: PushedBack::new(first), received: AtomicU64::new(0), ..self }
    }

    /// The plain socket of a channel on which nothing was received that is still to be read, and
    /// the peer's name.
    pub(crate) fn into_socket(self) -> io::Result<(Socket, String)> {
        match &self.link.stream {
            Stream::Socket(socket) if self.pushed_back.is_empty() && self.copying.is_none() => {
                Ok((socket.try_clone()?, self.peer))
            }
            _ => Err(io::Error::new(ErrorKind::Unsupported, "TLS goes over plain sockets")),
        }
    }

    /// A duplicate of the descriptor that becomes readable when bytes have come.
    pub(crate) fn readable_end(&self) -> io::Result<OwnedFd> {
        self.link.stream.readable_end()
    }

    /// Two channels connected to each other, within this process.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self::try_from(one)?, Self::try_from(other)?))
    }

    /// A channel that writes to the regular file `fd` from `offset` on; what is after that is cut
    /// off now. See [`FileStream`].
    ///
    /// # Errors
    /// `InvalidInput` for anything but a regular file that is open for writing.
    pub fn writing_to_file(fd: OwnedFd, offset: u64, peer: String) -> io::Result<Self> {
        Ok(Self::of_file(FileStream::writing_to(fd, offset)?, peer))
    }

    /// A channel that reads the regular file `fd` from `offset` on.
    ///
    /// # Errors
    /// `InvalidInput` for anything but a regular file that is open for reading, and has `offset`
    /// bytes.
    pub fn reading_file(fd: OwnedFd, offset: u64, peer: String) -> io::Result<Self> {
        Ok(Self::of_file(FileStream::reading_from(fd, offset)?, peer))
    }

    /// The other end: `tcp:10.0.0.7:51234`, `unix:/run/x.sock`.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// `TimedOut` after the timeout, `ConnectionAborted` after [`Closer::close`], otherwise the
    /// system's word. How much was sent is unknown then, so the channel must not be used any more.
    pub fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_vectored(&mut [IoSlice::new(bytes)])
    }

    /// Sends all bytes of all `bufs`, in order; there may be any number of them. The slices are
    /// used up: what they hold afterwards is unspecified.
    ///
    /// # Errors
    /// As [`send_all`](Self::send_all).
    pub fn send_vectored(&self, mut bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
        // Advancing drops empty slices from the front, so a batch always begins with a byte to send
        // and 0 means that nothing can be sent.
        IoSlice::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            let batch = bufs.get(..Stream::MAX_SLICES).unwrap_or(bufs);
            match self.link.stream.send_vectored(batch) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    self.note_direct_sent(sent as u64);
                    IoSlice::advance_slices(&mut bufs, sent);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain(error)),
            }
        }
        Ok(())
    }

    /// Receives what is there, at least one byte; 0 is the end of what the peer sends.
    ///
    /// # Errors
    /// `TimedOut` after the timeout, `ConnectionAborted` after [`Closer::close`], otherwise the
    /// system's word.
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let received = match self.pushed_back.take(buf) {
            0 => self.recv_from_stream(buf)?,
            taken => taken,
        };
        self.note_direct_received(received as u64);
        Ok(received)
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the peer ends before it is full, otherwise as [`recv`](Self::recv).
    pub fn recv_exact(&self, buf: &mut [u8]) -> io::Result<()> {
        let wanted = buf.len();
        let mut rest = buf;
        while !rest.is_empty() {
            let received = self.recv(rest)?;
            if received == 0 {
                return Err(ended(wanted - rest.len(), wanted));
            }
            rest = rest.split_at_mut(received).1;
        }
        Ok(())
    }

    /// The bare socket, for `sendmsg` and `recvmsg` with iovecs over guest memory; bytes sent or
    /// received on it are to be counted by [`note_direct_sent`](Self::note_direct_sent) and
    /// [`note_direct_received`](Self::note_direct_received).
    ///
    /// `None` while bytes that [`Listener::serve`](crate::Listener::serve) received are still to
    /// come out of [`recv`](Self::recv), and always `None` if the channel's bytes are not the
    /// socket's. It blocks as the channel does: the timeout gives `EAGAIN`; after [`Closer::close`]
    /// it receives 0 bytes, which [`check_end`](Self::check_end) tells from the peer's end.
    pub fn direct(&self) -> Option<BorrowedFd<'_>> {
        if self.pushed_back.is_empty() { self.link.stream.direct() } else { None }
    }

    /// The number of the channel's descriptor, to name it by; of two pipes the one that receives.
    /// `None` if it is closed.
    pub fn descriptor_number(&self) -> Option<i32> {
        self.link.stream.descriptor_number()
    }

    /// The file behind the channel, if it is one.
    pub(crate) fn file(&self) -> Option<&FileStream> {
        self.link.stream.file().map(AsRef::as_ref)
    }

    /// The file behind the channel, if it is one; it stays open for as long as the channel or this
    /// handle is there.
    pub fn file_handle(&self) -> Option<Arc<FileStream>> {
        self.link.stream.file().cloned()
    }

    /// Sets the timeout: how long one call may wait without a byte moving. `None`, the default, is
    /// for ever. A call that is blocked already keeps its limit; one that sent a part before the
    /// peer stalled may take twice as long.
    ///
    /// # Errors
    /// `InvalidInput` if the timeout is zero.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        if limit == Some(Duration::ZERO) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "timeout of 0s, expected more"));
        }
        // The kernel counts microseconds, and takes 0 of them for "no limit".
        self.link.stream.set_timeout(limit.map(|limit| limit.max(Duration::from_micros(1))))
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.link.stream
    }

    pub(crate) fn timeout(&self) -> io::Result<Option<Duration>> {
        self.link.stream.timeout()
    }

    /// Ends the channel from any thread.
    pub fn closer(&self) -> Closer {
        Closer::new(Arc::downgrade(&self.link))
    }

    /// Whether a [`Closer`] ended the channel.
    pub fn is_closed(&self) -> bool {
        self.link.is_closed()
    }

    /// Ends sending; receiving goes on. With TLS, sends a `close_notify` first. A file is durable
    /// when this returns.
    ///
    /// # Errors
    /// `NotConnected` if the connection is gone; for a file the system's error.
    pub fn finish_sending(&self) -> io::Result<()> {
        self.link.stream.finish_sending().map_err(|error| self.explain(error))
    }

    /// Whether bytes can come back: not over a pipe or a file. A command can answer, but few do.
    pub fn is_two_way(&self) -> bool {
        self.link.stream.is_two_way()
    }

    /// Whether this is a socket with a peer at its other end: no pipe, no command and no file.
    pub fn is_connection(&self) -> bool {
        self.link.stream.is_connection()
    }

    /// Ends what is sent to a command, and waits until the command has ended well; or waits until a
    /// [`ByteStream`](crate::ByteStream) has sent all that was sent before
    /// [`finish_sending`](Self::finish_sending). Other channels have nothing to wait for.
    ///
    /// # Errors
    /// Names the command, and the exit status if that is not 0; the stream's error; `TimedOut` if
    /// it takes longer than `limit`.
    pub fn settle(&self, limit: Duration) -> io::Result<()> {
        let settled = match &self.copying {
            Some(copying) => copying.settle(limit),
            None => self.link.stream.settle(limit),
        };
        if self.is_closed() { Err(closed()) } else { settled }
    }

    /// Bytes sent so far, those by [`direct`](Self::direct) included. A blocked call counts when
    /// the system lets go of it: when all is sent, or the timeout has passed.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes received so far, those by [`direct`](Self::direct) included; pushed-back bytes count
    /// when [`recv`](Self::recv) gives them.
    pub fn bytes_received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// How often the key that seals what is sent was changed. Always 0 without TLS.
    pub fn keys_refreshed(&self) -> u64 {
        match &self.link.stream {
            Stream::Tls(tls) => tls.keys_refreshed(),
            Stream::File(_) | Stream::Pipe(_) | Stream::Socket(_) => 0,
        }
    }

    /// The certificate, in DER, by which a TLS client has authenticated itself to this end. `None`
    /// for any other channel.
    pub fn client_certificate(&self) -> Option<&[u8]> {
        match &self.link.stream {
            Stream::Tls(tls) => tls.client_certificate(),
            Stream::File(_) | Stream::Pipe(_) | Stream::Socket(_) => None,
        }
    }

    /// Counts bytes that were sent on [`direct`](Self::direct).
    pub fn note_direct_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that were received on [`direct`](Self::direct).
    pub fn note_direct_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    fn recv_from_stream(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.link.stream.recv(buf) {
                Ok(0) => return self.check_end().map(|()| 0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                outcome => return outcome.map_err(|error| self.explain(error)),
            }
        }
    }

    /// Why the stream that is copied has failed.
    fn failure_below(&self) -> Option<io::Error> {
        self.copying.as_ref()?.failure()
    }
}

impl TryFrom<TcpStream> for Channel {
    type Error = io::Error;

    /// Takes a connected socket from elsewhere and makes it what [`dial`](crate::dial) gives:
    /// blocking, no delay, keepalive.
    fn try_from(stream: TcpStream) -> io::Result<Self> {
        adopt(stream.into())
    }
}

impl TryFrom<UnixStream> for Channel {
    type Error = io::Error;

    /// Takes a connected socket from elsewhere and makes it blocking.
    fn try_from(stream: UnixStream) -> io::Result<Self> {
        adopt(stream.into())
    }
}

/// Bytes that were received before the channel was, to be received again. 0 <= taken <=
/// bytes.len().
#[derive(Debug)]
struct PushedBack {
    bytes: Box<[u8]>,
    taken: AtomicUsize,
}

impl PushedBack {
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.into(), taken: AtomicUsize::new(0) }
    }

    /// Moves bytes to the front of `buf`; 0 when there are none left.
    fn take(&self, buf: &mut [u8]) -> usize {
        let taken = self.taken.load(Ordering::Relaxed);
        let left = self.bytes.get(taken..).unwrap_or_default();
        for (to, from) in buf.iter_mut().zip(left) {
            *to = *from;
        }
        let moved = left.len().min(buf.len());
        // Plain load and store: one thread receives.
        self.taken.store(taken + moved, Ordering::Relaxed);
        moved
    }

    fn is_empty(&self) -> bool {
        self.left() == 0
    }

    fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.taken.load(Ordering::Relaxed))
    }
}

fn adopt(socket: Socket) -> io::Result<Channel> {
    let peer = socket::peer_name(&socket)?;
    socket::into_channel(socket, peer, &[], &SocketOptions::default())
}

fn ended(received: usize, wanted: usize) -> io::Error {
    let text = format!("end of stream after {received} of {wanted} bytes");
    io::Error::new(ErrorKind::UnexpectedEof, text)
}

fn closed() -> io::Error {
    io::Error::new(ErrorKind::ConnectionAborted, "the channel was closed on this side")
}

#[cfg(test)]
mod tests;
