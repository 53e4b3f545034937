//! vhost-user messages with a deadline. The `vhost` crate's front-end waits for a reply for ever,
//! and takes only replies to SET_LOG_BASE that are as long as its own back-ends': others send 0 or
//! 8 bytes.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use socket2::SockRef;
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::sys;
use crate::run::stop::lock;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const VERSION_MASK: u32 = 3;
/// Request, flags, length of the body: 4 bytes each, in the machine's byte order as all of
/// vhost-user.
const HEADER: usize = 12;

/// The socket of a back-end.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    /// The longest wait for a reply.
    timeout: Mutex<Duration>,
    /// Held from a request to the last byte of its reply: the end of a post-copy is said by a
    /// thread of the engine's own.
    turn: Mutex<()>,
    /// The timeout does not count meanwhile: a thread that waits may be the one that answers.
    page_waits: Mutex<PageWaits>,
    /// Why it was broken off here.
    why: OnceLock<String>,
    /// REPLY_ACK is negotiated: every request can be confirmed.
    reply_ack: bool,
    /// A reply is missing: what comes next would be taken for it.
    broken: AtomicBool,
}

/// Waits of the back-end's threads for pages of the guest's memory.
#[derive(Debug, Default)]
struct PageWaits {
    threads: usize,
    /// When the last one ended.
    ended: Option<Instant>,
}

impl Connection {
    /// Over the socket of `front_end`.
    pub(super) fn over(front_end: &impl AsRawFd, reply_ack: bool, timeout: Duration) -> io::Result<Self> {
        let socket = UnixStream::from(sys::duplicate(front_end)?);
        Ok(Self {
            socket,
            timeout: Mutex::new(timeout),
            turn: Mutex::default(),
            page_waits: Mutex::default(),
            why: OnceLock::new(),
            reply_ack,
            broken: AtomicBool::new(false),
        })
    }

    pub(super) fn set_timeout(&self, timeout: Duration) {
        *lock(&self.timeout) = timeout;
    }

    pub(super) fn timeout(&self) -> Duration {
        *lock(&self.timeout)
    }

    /// The number of the back-end's threads that wait for a page has grown, or shrunk.
    pub(super) fn note_page_wait(&self, more: bool) {
        let mut waits = lock(&self.page_waits);
        if more {
            waits.threads += 1;
        } else {
            (waits.threads, waits.ended) = (waits.threads - 1, Some(Instant::now()));
        }
    }

    /// Asks for something: the body of the reply.
    pub(super) fn ask(&self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> io::Result<Vec<u8>> {
        let _turn = self.turn();
        self.exchange(request, 0, body, fds)
    }

    /// Asks for a descriptor; `None`: the reply has none.
    pub(super) fn ask_descriptor(&self, request: FrontendReq) -> io::Result<Option<OwnedFd>> {
        let _turn = self.turn();
        self.usable()?;
        let mut deadline = Instant::now() + self.timeout();
        self.send(request, 0, &[], &[], deadline)
            .and_then(|()| self.receive_with_descriptor(request, &mut deadline))
            .map(|(_, descriptor)| descriptor)
            .map_err(|error| self.fail(self.explain(request, error)))
    }

    /// Tells something to which there is no reply: a thread of the back-end's that waits for a page
    /// may be the one that reads it.
    pub(super) fn say(&self, request: FrontendReq, body: &[u8]) -> io::Result<()> {
        let _turn = self.turn();
        self.usable()?;
        let deadline = Instant::now() + self.timeout();
        self.send(request, 0, body, &[], deadline).map_err(|error| self.fail(self.explain(request, error)))
    }

    /// Ends the connection: every call fails with this reason from now on.
    pub(super) fn break_off(&self, why: &str) {
        self.why.get_or_init(|| why.to_owned());
        self.broken.store(true, Ordering::Relaxed);
        // It may be closed already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Asks for a number.
    pub(super) fn ask_u64(&self, request: FrontendReq) -> io::Result<u64> {
        self.ask_u64_with(request, &[], &[])
    }

    /// Asks for a number about something.
    pub(super) fn ask_u64_with(&self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> io::Result<u64> {
        let body = self.ask(request, body, fds)?;
        let number = body.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
        number.ok_or_else(|| self.fail(misbehaved(request, format_args!("{} bytes", body.len()), "8")))
    }

    /// Tells something, and returns when the back-end has done it.
    pub(super) fn tell(&self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let turn = self.turn();
        if !self.reply_ack {
            self.usable()?;
            let deadline = Instant::now() + self.timeout();
            self.send(request, 0, body, fds, deadline)
                .map_err(|error| self.fail(self.explain(request, error)))?;
            drop(turn);
            // Messages are worked off in their order: the answer to the next says that this one is
            // done.
            return self.ask_u64(FrontendReq::GET_FEATURES).map(drop);
        }
        let reply = self.exchange(request, NEED_REPLY, body, fds)?;
        match reply.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes)) {
            Some(0) => Ok(()),
            status => {
                let status = status.map_or_else(|| "nothing".to_owned(), |status| status.to_string());
                Err(io::Error::other(format!("the back-end refuses {}: status {status}", name(request))))
            }
        }
    }

    /// Fails if the back-end has hung up.
    pub(super) fn check(&self) -> io::Result<()> {
        self.usable()?;
        let mut byte = [MaybeUninit::uninit()];
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        match SockRef::from(&self.socket).recv_with_flags(&mut byte, flags) {
            Ok(0) => Err(self.fail(closed())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            // An unsolicited message: the reader of the next reply reports it.
            Ok(_) => Ok(()),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn exchange(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<Vec<u8>> {
        self.usable()?;
        let mut deadline = Instant::now() + self.timeout();
        self.send(request, flags, body, fds, deadline)
            .and_then(|()| self.receive(request, &mut deadline))
            .map_err(|error| self.fail(self.explain(request, error)))
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
        deadline: Instant,
    ) -> io::Result<()> {
        let len = u32::try_from(body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        for field in [u32::from(request), VERSION | flags, len] {
            message.extend(field.to_ne_bytes());
        }
        message.extend(body);
        self.socket.set_write_timeout(Some(left(deadline)?))?;
        let sent = self
            .socket
            .send_with_fds(&[&message[..]], fds)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // Messages are far shorter than a socket's buffer: one is taken whole or not at all.
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&self, request: FrontendReq, deadline: &mut Instant) -> io::Result<Vec<u8>> {
        let mut header = [0; HEADER];
        self.fill(&mut header, deadline)?;
        self.receive_body(request, header, deadline)
    }

    fn receive_with_descriptor(
        &self,
        request: FrontendReq,
        deadline: &mut Instant,
    ) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut header = [0; HEADER];
        let (count, file) = loop {
            self.socket.set_read_timeout(Some(self.left(deadline)?))?;
            match self.socket.recv_with_fd(&mut header) {
                Ok((0, _)) => return Err(closed()),
                Ok(received) => break received,
                Err(error) => may_wait_on(io::Error::from_raw_os_error(error.errno()))?,
            }
        };
        // Close-on-exec, which the one that came is not.
        let descriptor = file.map(|file| file.try_clone().map(OwnedFd::from)).transpose()?;
        let rest = header.get_mut(count..).ok_or_else(|| io::Error::other("more came than was asked for"))?;
        self.fill(rest, deadline)?;
        Ok((self.receive_body(request, header, deadline)?, descriptor))
    }

    fn receive_body(
        &self,
        request: FrontendReq,
        header: [u8; HEADER],
        deadline: &mut Instant,
    ) -> io::Result<Vec<u8>> {
        let [code, flags, len] = fields(header);
        if code != u32::from(request) || flags & (REPLY | VERSION_MASK) != REPLY | VERSION {
            let seen = format!("a message {code} with flags {flags:#x}");
            return Err(misbehaved(
                request,
                seen,
                format!("{} with {:#x}", u32::from(request), REPLY | VERSION),
            ));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_MSG_SIZE {
            return Err(misbehaved(request, format_args!("{len} bytes"), format!("up to {MAX_MSG_SIZE}")));
        }
        let mut body = vec![0; len];
        self.fill(&mut body, deadline)?;
        Ok(body)
    }

    fn fill(&self, mut into: &mut [u8], deadline: &mut Instant) -> io::Result<()> {
        while !into.is_empty() {
            self.socket.set_read_timeout(Some(self.left(deadline)?))?;
            match (&self.socket).read(into) {
                Ok(0) => return Err(closed()),
                Ok(count) => into = into.get_mut(count..).unwrap_or_default(),
                Err(error) => may_wait_on(error)?,
            }
        }
        Ok(())
    }

    /// What is left of the time for a reply, which begins anew as long as a thread of the
    /// back-end's waits for a page, and when it has it.
    fn left(&self, deadline: &mut Instant) -> io::Result<Duration> {
        let now = Instant::now();
        if now >= *deadline {
            let waits = lock(&self.page_waits);
            let from = if waits.threads > 0 { Some(now) } else { waits.ended };
            *deadline = from.map_or(*deadline, |from| from + self.timeout());
        }
        left(*deadline)
    }

    /// Whether the connection is broken for good.
    fn fail(&self, error: io::Error) -> io::Error {
        self.broken.store(true, Ordering::Relaxed);
        error
    }

    fn usable(&self) -> io::Result<()> {
        match self.broken.load(Ordering::Relaxed) {
            true => {
                let why = self.why.get().map_or("the connection broke before", String::as_str);
                Err(io::Error::new(io::ErrorKind::NotConnected, why))
            }
            false => Ok(()),
        }
    }

    fn explain(&self, request: FrontendReq, error: io::Error) -> io::Error {
        let name = name(request);
        if let Some(why) = self.why.get() {
            return io::Error::new(io::ErrorKind::NotConnected, format!("{name}: {why}"));
        }
        let text = match error.kind() {
            // A socket's own timeout.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                let text = format!("no reply to {name} within {:?}", self.timeout());
                return io::Error::new(io::ErrorKind::TimedOut, text);
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => closed().to_string(),
            _ => error.to_string(),
        };
        io::Error::new(error.kind(), format!("{name}: {text}"))
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn fields(header: [u8; HEADER]) -> [u32; 3] {
    let mut words = header.as_chunks().0.iter().map(|bytes| u32::from_ne_bytes(*bytes));
    [0; 3].map(|nothing: u32| words.next().unwrap_or(nothing))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Errors after which it is looked whether there is time left.
fn may_wait_on(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(()),
        _ => Err(error),
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the back-end closed the connection")
}

fn misbehaved(
    request: FrontendReq,
    seen: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> io::Error {
    let text = format!("the reply to {} is {seen}, expected {expected}", name(request));
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// As the protocol calls it.
fn name(request: FrontendReq) -> String {
    format!("{request:?}")
}
