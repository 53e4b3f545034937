//! System calls that no crate wraps.
#![expect(unsafe_code, reason = "a descriptor's number and a socket option's bytes are bare integers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Looks at a descriptor by its number, and gives it to `look`.
pub(crate) fn borrow<T>(number: RawFd, look: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
    // SAFETY:
    // - `number` is not -1: endpoints take 0..=i32::MAX only;
    // - a number that is not open is an error of the calls that `look` makes, which read flags and
    //   nothing else.
    look(unsafe { BorrowedFd::borrow_raw(number) })
}

/// Takes over a descriptor by its number.
///
/// The caller has made sure that it was inherited and that nothing in this process owns it: see
/// `descriptor::take`.
pub(crate) fn own(number: RawFd) -> OwnedFd {
    // SAFETY: it is open, and without an owner: what this process opens is close-on-exec, and this
    // one was not.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Lets a socket send without copying (`SO_ZEROCOPY`).
pub(crate) fn allow_zero_copy(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `on` is read, as the int that the option is, before the call returns.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            INT_LEN,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that were sent on a socket and that the peer has not taken: not read, on a unix socket;
/// not acknowledged, by TCP.
pub(crate) fn unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the call writes one int, to `count`.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if outcome == 0 { Ok(usize::try_from(count).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// The beginning of `TCP_INFO`; of multipath TCP, of the first subflow.
pub(crate) struct TcpState {
    /// `TCP_ESTABLISHED` is 1, `TCP_CLOSE` 7.
    pub(crate) state: u8,
    /// Times that what is not acknowledged was sent again.
    pub(crate) retransmits: u8,
    /// Probes since the peer was last heard.
    pub(crate) probes: u8,
}

/// How a TCP connection is.
pub(crate) fn tcp_state(socket: BorrowedFd<'_>) -> io::Result<TcpState> {
    // The first four fields of libc's `tcp_info`, whose length differs between C libraries.
    let mut head = [0_u8; TCP_INFO_HEAD_LEN as usize];
    let mut len = TCP_INFO_HEAD_LEN;
    // SAFETY: the call writes at most `len` bytes, the length of `head`, to it.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut head).cast(),
            &raw mut len,
        )
    };
    let [state, _, retransmits, probes] = head;
    if outcome == 0 { Ok(TcpState { state, retransmits, probes }) } else { Err(io::Error::last_os_error()) }
}

const TCP_INFO_HEAD_LEN: libc::socklen_t = 4;

/// How fast a TCP connection is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpPace {
    /// The shortest round trip of the last minutes.
    pub(crate) round_trip: Duration,
    /// Delivered to the peer, as it was measured last; 0: nothing was.
    pub(crate) bytes_per_second: u64,
}

/// The pace of a TCP connection, by `TCP_INFO` of Linux 4.9 and later; an error for a kernel that
/// does not tell.
pub(crate) fn tcp_pace(socket: BorrowedFd<'_>) -> io::Result<TcpPace> {
    // Up to `tcpi_delivery_rate` of the kernel's `tcp_info`, which not every libc has.
    let mut info = [0_u8; TCP_INFO_PACE_LEN as usize];
    let mut len = TCP_INFO_PACE_LEN;
    // SAFETY: the call writes at most `len` bytes, the length of `info`, to it.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    let min_rtt = info.get(148..).and_then(|field| field.first_chunk()).map(|us| u32::from_ne_bytes(*us));
    let rate = info.get(160..).and_then(|field| field.first_chunk()).map(|rate| u64::from_ne_bytes(*rate));
    match (min_rtt, rate) {
        (Some(min_rtt), Some(bytes_per_second)) if len == TCP_INFO_PACE_LEN => {
            Ok(TcpPace { round_trip: Duration::from_micros(min_rtt.into()), bytes_per_second })
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

const TCP_INFO_PACE_LEN: libc::socklen_t = 168;

const INT_LEN: libc::socklen_t = 4;
const _: () = assert!(size_of::<libc::c_int>() == INT_LEN as usize);
