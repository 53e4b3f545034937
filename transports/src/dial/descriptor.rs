//! Descriptors that another process opened: inherited, or handed over on a unix socket.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::socket_acceptconn;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket2::{Socket, Type};

use crate::channel::pipe::Pipe;
use crate::channel::stream::Stream;
use crate::file::FileStream;
use crate::os::socket;
use crate::{Channel, Endpoint, SocketOptions};

/// What a descriptor turned out to be.
#[derive(Debug)]
pub(crate) enum Found {
    Connected(Socket),
    /// A regular file.
    File(OwnedFd),
    Listening(Socket),
    /// The reading end of a pipe.
    Readable(OwnedFd),
    /// The writing end of a pipe.
    Writable(OwnedFd),
}

/// Receives one descriptor that the other side sends on the socket with `SCM_RIGHTS`, beside at
/// least one byte, which is dropped: as QEMU's `getfd` and libvirt send them. Waits for as long as
/// the socket's read timeout says.
///
/// # Errors
/// `UnexpectedEof` if the other side closed, `InvalidData` if it sent bytes without a descriptor or
/// with several; else what the system says.
pub fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_AT_ONCE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?.bytes,
        }
    };
    if received == 0 {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "closed before a descriptor was handed over"));
    }
    let mut handed: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            handed.extend(descriptors);
        }
    }
    match (handed.pop(), handed.len()) {
        (Some(descriptor), 0) => Ok(descriptor),
        (last, before) => {
            let text =
                format!("{} descriptors were handed over, expected 1", before + usize::from(last.is_some()));
            Err(io::Error::new(ErrorKind::InvalidData, text))
        }
    }
}

impl TryFrom<OwnedFd> for Channel {
    type Error = io::Error;

    /// Takes a connected stream socket or an end of a pipe, and closes it when the channel ends.
    fn try_from(descriptor: OwnedFd) -> io::Result<Self> {
        match classify(descriptor)? {
            Found::Connected(socket) => {
                let peer = socket::peer_name(&socket)?;
                socket::into_channel(socket, peer, &[], &SocketOptions::default())
            }
            Found::Listening(_) => Err(unfit("a listening socket, expected a connected one")),
            Found::File(_) => Err(unfit("a regular file: say whether to write or to read it")),
            Found::Readable(end) => Ok(Self::over(Stream::Pipe(Pipe::incoming(end)?), "pipe".to_owned())),
            Found::Writable(end) => Ok(Self::over(Stream::Pipe(Pipe::outgoing(end)?), "pipe".to_owned())),
        }
    }
}

/// The source's end of a descriptor.
pub(crate) fn dialled(
    descriptor: OwnedFd,
    endpoint: &Endpoint,
    options: &SocketOptions,
) -> io::Result<Channel> {
    match classify(descriptor)? {
        Found::Connected(socket) => connected(socket, endpoint, options),
        Found::File(file) => {
            let offset = position(&file)?;
            Ok(filed(FileStream::writing_to(file, offset)?, endpoint))
        }
        Found::Listening(_) => Err(unfit("a listening socket, a source needs a connected one")),
        Found::Readable(_) => Err(unfit("the reading end of a pipe, a source needs the writing end")),
        Found::Writable(end) => Ok(piped(Pipe::outgoing(end)?, endpoint)),
    }
}

/// The destination's end of a descriptor that is not a listening socket; that one is given back.
pub(crate) fn arrived(
    descriptor: OwnedFd,
    endpoint: &Endpoint,
    options: &SocketOptions,
) -> io::Result<Result<Channel, Socket>> {
    match classify(descriptor)? {
        Found::Connected(socket) => connected(socket, endpoint, options).map(Ok),
        Found::File(file) => {
            let offset = position(&file)?;
            Ok(Ok(filed(FileStream::reading_from(file, offset)?, endpoint)))
        }
        Found::Listening(socket) => Ok(Err(socket)),
        Found::Readable(end) => Ok(Ok(piped(Pipe::incoming(end)?, endpoint))),
        Found::Writable(_) => Err(unfit("the writing end of a pipe, a destination needs the reading end")),
    }
}

/// Takes over an inherited descriptor.
///
/// What this process has opened itself is close-on-exec, as a rule without exceptions in Rust; what
/// it inherited cannot be. So the flag tells them apart, and setting it marks what was taken.
pub(crate) fn take(number: i32) -> io::Result<OwnedFd> {
    static TAKING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(number, 1 | 2) {
        return Err(unfit("standard output and standard error are for what is said to the user"));
    }
    let inherited = crate::os::sys::borrow(number, |descriptor| match fcntl_getfd(descriptor) {
        Err(_) => Err(unfit("no such descriptor is open")),
        Ok(flags) if flags.contains(FdFlags::CLOEXEC) => {
            Err(unfit("this descriptor was not inherited, or is in use already"))
        }
        Ok(_) if number == 0 => fcntl_dupfd_cloexec(descriptor, 3).map(Some).map_err(io::Error::from),
        Ok(flags) => Ok(fcntl_setfd(descriptor, flags | FdFlags::CLOEXEC).map(|()| None)?),
    })?;
    match inherited {
        // The next file that is opened must not get the number of standard input.
        Some(stdin) => {
            rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
            Ok(stdin)
        }
        None => Ok(crate::os::sys::own(number)),
    }
}

/// Receives a descriptor from the process that listens at `path`, within `limit`.
pub(crate) fn fetch(path: &Path, limit: Duration) -> io::Result<OwnedFd> {
    let late = |error: io::Error| match error.kind() {
        ErrorKind::WouldBlock => {
            io::Error::new(ErrorKind::TimedOut, format!("no descriptor was handed over within {limit:?}"))
        }
        _ => error,
    };
    let stream: UnixStream = {
        let socket = Socket::new(socket2::Domain::UNIX, Type::STREAM, None)?;
        // Also for how long to wait for a place in the listener's queue.
        socket.set_write_timeout(Some(limit))?;
        socket.connect(&socket::unix_address(path)?).map_err(late)?;
        OwnedFd::from(socket).into()
    };
    stream.set_read_timeout(Some(limit))?;
    receive_descriptor(&stream).map_err(late)
}

/// Classifies a descriptor by its type.
fn classify(descriptor: OwnedFd) -> io::Result<Found> {
    match FileType::from_raw_mode(fstat(&descriptor)?.st_mode) {
        FileType::Socket => stream_socket(descriptor),
        FileType::Fifo => match fcntl_getfl(&descriptor)? & OFlags::RWMODE {
            OFlags::RDONLY => Ok(Found::Readable(descriptor)),
            OFlags::WRONLY => Ok(Found::Writable(descriptor)),
            _ => Err(unfit("a FIFO open for reading and writing, which has no end; open it for one of them")),
        },
        FileType::RegularFile => Ok(Found::File(descriptor)),
        other => Err(unfit(format!("{other:?}, expected a stream socket, an end of a pipe, or a file"))),
    }
}

fn stream_socket(descriptor: OwnedFd) -> io::Result<Found> {
    let listening = socket_acceptconn(descriptor.as_fd())?;
    let socket = Socket::from(descriptor);
    if socket.r#type()? != Type::STREAM {
        return Err(unfit(format!("a socket of type {:?}, expected a stream socket", socket.r#type()?)));
    }
    if listening {
        return Ok(Found::Listening(socket));
    }
    match socket.peer_addr() {
        Ok(_) => Ok(Found::Connected(socket)),
        Err(error) if error.kind() == ErrorKind::NotConnected => {
            Err(unfit("a socket that is neither connected nor listening"))
        }
        Err(error) => Err(error),
    }
}

fn connected(socket: Socket, endpoint: &Endpoint, options: &SocketOptions) -> io::Result<Channel> {
    let peer = format!("{endpoint}, {}", socket::peer_name(&socket)?);
    socket::into_channel(socket, peer, &[], options)
}

fn filed(file: FileStream, endpoint: &Endpoint) -> Channel {
    Channel::of_file(file, format!("{endpoint}, file"))
}

/// Where in a file its opener left off: there the stream begins.
fn position(file: &OwnedFd) -> io::Result<u64> {
    Ok(rustix::fs::tell(file)?)
}

fn piped(pipe: Pipe, endpoint: &Endpoint) -> Channel {
    Channel::over(Stream::Pipe(pipe), format!("{endpoint}, pipe"))
}

fn unfit(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, text.into())
}

/// Descriptors in one message that are looked at; the kernel drops the others.
const MOST_AT_ONCE: usize = 4;

#[cfg(test)]
mod tests;
