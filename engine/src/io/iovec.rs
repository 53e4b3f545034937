//! Lists of byte ranges, private and guest memory, that the kernel sends or receives in one call.
#![expect(unsafe_code, reason = "guest memory is moved by the kernel, to and from pointers")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use multifd_transports::{Channel, ZeroCopy};
use vm_memory::VolatileSlice;

use super::main_file::MainFile;
use crate::guest::HostMemory;
use crate::os::retry;

/// A list of memory ranges, private and guest, that the kernel reads or fills in one call.
///
/// The list's buffer is kept in [`IoVecs`] between packets.
pub(crate) struct Ranges<'a> {
    list: &'a mut Vec<libc::iovec>,
    memory: PhantomData<&'a HostMemory>,
}

/// The reusable buffer of [`Ranges`].
#[derive(Default)]
pub(crate) struct IoVecs(Vec<libc::iovec>);

// SAFETY: the pointers in it are only used by the `Ranges` that wrote them, which clears the list
// first.
unsafe impl Send for IoVecs {}

/// Most ranges the kernel takes in one call (UIO_MAXIOV).
pub(super) const MAX_RANGES_PER_CALL: usize = 1024;

impl IoVecs {
    pub(crate) fn start<'a>(&'a mut self) -> Ranges<'a> {
        self.0.clear();
        Ranges { list: &mut self.0, memory: PhantomData }
    }
}

impl<'a> Ranges<'a> {
    /// Adds private bytes to be sent.
    pub(crate) fn private(&mut self, bytes: &'a [u8]) {
        self.list.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
    }

    /// Adds guest memory, joined with the range before it if they touch.
    pub(crate) fn guest(&mut self, slice: &VolatileSlice<'a>) {
        let start = slice.ptr_guard_mut().as_ptr();
        match self.list.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => {
                last.iov_len += slice.len();
            }
            _ => self.list.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() }),
        }
    }

    /// Sends all of it.
    pub(crate) fn send(self, channel: &Channel) -> io::Result<()> {
        let Some(fd) = channel.direct() else { return self.send_copied(channel) };
        send_ranges(channel, self.list, |left| retry(|| send_once(fd, left, 0)))
    }

    /// Writes all of it to the stream in `file`.
    pub(crate) fn write(self, file: &MainFile) -> io::Result<()> {
        super::file::write_all(self.list, file.channel(), file.stream())
    }

    /// Sends the bytes of `header`, then all of it without copying guest memory, which may change
    /// for as long as `account` has sends outstanding: what arrives then is newer than the page
    /// that was asked for, and the page is dirty again. Gives the calls that had to copy because
    /// the kernel had no room to keep track of more.
    pub(crate) fn send_zero_copy(
        self,
        header: &[u8],
        channel: &Channel,
        account: &mut ZeroCopy,
    ) -> io::Result<usize> {
        let Some(fd) = channel.direct() else { return Err(io::ErrorKind::Unsupported.into()) };
        // A header alone must not wait for pages that never come.
        let more = if self.list.is_empty() { 0 } else { libc::MSG_MORE };
        let mut start = [libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() }];
        send_ranges(channel, &mut start, |left| retry(|| send_once(fd, left, more)))?;
        let mut refused = 0;
        send_ranges(channel, self.list, |left| match retry(|| send_once(fd, left, libc::MSG_ZEROCOPY)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                refused += 1;
                retry(|| send_once(fd, left, 0))
            }
            outcome => outcome.inspect(|_| account.note_send()),
        })?;
        Ok(refused)
    }

    /// A channel that is not a plain socket takes private bytes only.
    fn send_copied(self, channel: &Channel) -> io::Result<()> {
        let len = self.list.iter().map(|range| range.iov_len).sum();
        let mut left = &mut self.list[..];
        channel.send_filled(len, &mut |mut into| {
            while let (Some(range), false) = (left.first(), into.is_empty()) {
                let (now, later) = into.split_at_mut(range.iov_len.min(into.len()));
                // SAFETY: every range lies in memory borrowed for 'a, see `private` and `guest`.
                let slice = unsafe { VolatileSlice::new(range.iov_base.cast(), now.len()) };
                slice.copy_to(now);
                left = advance(std::mem::take(&mut left), now.len());
                into = later;
            }
        })
    }

    /// Fills all of it. `UnexpectedEof` says that the peer ended before that.
    pub(crate) fn receive(self, channel: &Channel) -> io::Result<()> {
        let Some(fd) = channel.direct() else { return self.receive_copied(channel) };
        let mut left = &mut self.list[..];
        while !left.is_empty() {
            let received = retry(|| receive_once(fd, left)).map_err(|error| channel.explain(error))?;
            if received == 0 {
                channel.check_end()?;
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            channel.note_direct_received(received as u64);
            left = advance(left, received);
        }
        Ok(())
    }

    fn receive_copied(self, channel: &Channel) -> io::Result<()> {
        let len = self.list.iter().map(|range| range.iov_len).sum();
        let mut left = &mut self.list[..];
        channel.recv_each(len, &mut |mut from| {
            while let (Some(range), false) = (left.first(), from.is_empty()) {
                let (now, later) = from.split_at(range.iov_len.min(from.len()));
                // SAFETY: as in `send_copied`; received ranges come from `guest` only, whose memory
                // may be written.
                let slice = unsafe { VolatileSlice::new(range.iov_base.cast(), now.len()) };
                slice.copy_from(now);
                left = advance(std::mem::take(&mut left), now.len());
                from = later;
            }
        })
    }
}

/// Calls `send` until all of `left` has been taken.
fn send_ranges(
    channel: &Channel,
    mut left: &mut [libc::iovec],
    mut send: impl FnMut(&mut [libc::iovec]) -> io::Result<usize>,
) -> io::Result<()> {
    while !left.is_empty() {
        let sent = send(left).map_err(|error| channel.explain(error))?;
        channel.note_direct_sent(sent as u64);
        left = advance(left, sent);
    }
    Ok(())
}

fn message(ranges: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeros means "nothing".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_mut_ptr();
    message.msg_iovlen = ranges.len().min(MAX_RANGES_PER_CALL);
    message
}

fn send_once(fd: BorrowedFd<'_>, ranges: &mut [libc::iovec], flags: i32) -> isize {
    let message = message(ranges);
    // SAFETY: `message` points to valid ranges; the kernel pins what it sends later (MSG_ZEROCOPY).
    // MSG_NOSIGNAL: a closed peer is an error, not a signal.
    unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | flags) }
}

fn receive_once(fd: BorrowedFd<'_>, ranges: &mut [libc::iovec]) -> isize {
    let mut message = message(ranges);
    // SAFETY: `message` points to valid, writable ranges. MSG_WAITALL: one call a packet instead of
    // one a segment.
    unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) }
}

/// Drops the first `count` bytes.
pub(super) fn advance(ranges: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    let done = ranges
        .iter()
        .take_while(|range| {
            let whole = count >= range.iov_len;
            count -= if whole { range.iov_len } else { 0 };
            whole
        })
        .count();
    let (_, left) = ranges.split_at_mut(done);
    if let Some(first) = left.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(count);
        first.iov_len -= count;
    }
    left
}
