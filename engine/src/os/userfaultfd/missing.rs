//! A userfaultfd that fills pages which are missing: the requests of a pager.

use std::fs::File;
use std::io;
use std::mem::{ManuallyDrop, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Features, Range, Register, Userfault, ask};
use crate::os::ioctl::request;
use crate::os::retry;

const REGISTER_MODE_MISSING: u64 = 1;

const UFFDIO_WAKE: libc::Ioctl = request(2, 0xaa, 2, size_of::<Range>());
const UFFDIO_COPY: libc::Ioctl = request(3, 0xaa, 3, size_of::<Copy>());
const UFFDIO_ZEROPAGE: libc::Ioctl = request(3, 0xaa, 4, size_of::<Zeropage>());
const UFFDIO_POISON: libc::Ioctl = request(3, 0xaa, 8, size_of::<Poison>());

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct Poison {
    range: Range,
    mode: u64,
    poisoned: i64,
}

/// uffd_msg.
#[derive(Clone, std::marker::Copy)]
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    /// Of a fault: flags, address, thread. Of pages that went: start, end.
    arguments: [u64; 3],
}

const _: () = {
    assert!(size_of::<Copy>() == 40 && size_of::<Zeropage>() == 32 && size_of::<Message>() == 32);
    assert!(UFFDIO_WAKE == 0x8010_aa02 && UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(size_of::<Poison>() == 32 && UFFDIO_POISON == 0xc020_aa08);
};

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

/// Messages that are read at a time.
const MESSAGES: usize = 64;

/// What has happened to the memory.
#[derive(Clone, std::marker::Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryEvent {
    /// A thread waits for the page at this address.
    Fault { address: u64, thread: u32 },
    /// The owner of the memory has dropped this range: its pages are zero now.
    Removed { start: u64, end: u64 },
    /// One that was not asked for.
    Other(u8),
}

/// The userfaultfd of memory whose pages are filled as they come.
///
/// When its last descriptor is closed, pages that are missing read as zero, and nothing tells. So
/// dropping this closes nothing, unless [`let_go`](Self::let_go) has said before that nothing is
/// missing: threads that need a page wait for it as long as the process lives.
pub(crate) struct MissingPages {
    descriptor: ManuallyDrop<OwnedFd>,
    can_poison: bool,
    lets_go: AtomicBool,
}

impl MissingPages {
    /// Faults of system calls and vCPUs count, too: that takes CAP_SYS_PTRACE, /dev/userfaultfd, or
    /// vm.unprivileged_userfaultfd = 1.
    ///
    /// # Errors
    /// `Unsupported` names what the kernel lacks; others are the system's.
    pub(crate) fn open() -> io::Result<Self> {
        let here = Userfault::open_for_kernel()?.enable(Features(0))?;
        let missing = Features::PAGER.missing_in(here);
        if !missing.is_empty() {
            let text = format!("the kernel has no {}", missing.join(", "));
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        // Features are chosen once a descriptor.
        let Userfault(descriptor) = {
            let userfault = Userfault::open_for_kernel()?;
            userfault.enable(Features::PAGER.with_poison_of(here))?;
            userfault
        };
        let (can_poison, lets_go) = (here.has_poison(), AtomicBool::new(false));
        Ok(Self { descriptor: ManuallyDrop::new(descriptor), can_poison, lets_go })
    }

    /// From now on, a thread that touches a missing page of these waits for it.
    pub(crate) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register { range: Range { start, len }, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the request reads and writes a Register, and changes nothing that the memory
        // holds.
        unsafe { ask(&*self.descriptor, super::UFFDIO_REGISTER, &raw mut register) }.map(drop)
    }

    /// Takes `register` back and wakes who waits: what is missing reads as zero from now on.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: the request reads a Range.
        unsafe { ask(&*self.descriptor, super::UFFDIO_UNREGISTER, &raw mut range) }.map(drop)
    }

    /// Makes missing pages at `to` of a whole number of host pages, with this content, and wakes
    /// who waits for them.
    ///
    /// # Errors
    /// EEXIST: a page is there. EAGAIN: pages are being dropped, read the events first.
    pub(crate) fn copy(&self, to: u64, content: &[u8]) -> io::Result<()> {
        in_steps(content.len(), |done| {
            let Some(rest) = content.get(done..) else {
                return (0, Err(io::Error::other("more was copied than there was (a bug in multifd)")));
            };
            let mut copy = Copy {
                to: to + done as u64,
                from: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: the request reads and writes a Copy; what it reads `from` is `rest`, and what
            // it writes `to` are pages that no thread has seen yet.
            let asked = unsafe { ask(&*self.descriptor, UFFDIO_COPY, &raw mut copy) };
            (copy.copied, asked)
        })
    }

    /// The same with zeros. Not for huge pages.
    pub(crate) fn zero(&self, to: u64, len: usize) -> io::Result<()> {
        zero_range(&*self.descriptor, to, len)
    }

    /// Whether the kernel has UFFDIO_POISON.
    pub(crate) fn can_poison(&self) -> bool {
        self.can_poison
    }

    /// Makes missing pages from `start` on such that threads which touch them get SIGBUS, up to the
    /// first that is there, and wakes who waits for them. Gives how many bytes, at least one page.
    ///
    /// # Errors
    /// EEXIST: the first page is there. EAGAIN: as for [`copy`](Self::copy).
    pub(crate) fn poison(&self, start: u64, len: u64) -> io::Result<u64> {
        let mut poison = Poison { range: Range { start, len }, mode: 0, poisoned: 0 };
        // SAFETY: the request reads and writes a Poison, and changes pages that no thread has seen.
        let asked = unsafe { ask(&*self.descriptor, UFFDIO_POISON, &raw mut poison) };
        match (u64::try_from(poison.poisoned), asked) {
            (Ok(bytes @ 1..), _) => Ok(bytes),
            (_, asked) => asked.and(Err(io::ErrorKind::WriteZero.into())),
        }
    }

    /// Wakes who waits for these pages.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        wake_range(&*self.descriptor, start, len)
    }

    /// What has happened since the last call; `false` if nothing has.
    pub(crate) fn read(&self, into: &mut Vec<MemoryEvent>) -> io::Result<bool> {
        read_events(&*self.descriptor, into)
    }

    /// Waits until there is something to read, or `limit` is over. False: woken by `wake` instead.
    pub(crate) fn wait(&self, wake: &Wake, limit: Option<Duration>) -> io::Result<bool> {
        let limit = limit.map_or(-1, |limit| i32::try_from(limit.as_millis()).unwrap_or(i32::MAX));
        let polled = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [polled(wake.0.as_raw_fd()), polled(self.descriptor.as_raw_fd())];
        // SAFETY: the array is two pollfds.
        retry(|| unsafe { libc::poll(fds.as_mut_ptr(), 2, limit) as isize })?;
        let [woken, _] = fds;
        Ok(woken.revents == 0)
    }

    /// Nothing is missing: dropping this closes the descriptor.
    pub(crate) fn let_go(&self) {
        self.lets_go.store(true, Ordering::Release);
    }
}

impl Drop for MissingPages {
    fn drop(&mut self) {
        if *self.lets_go.get_mut() {
            // SAFETY: this is the only place that drops it, and the last one that sees it.
            unsafe { ManuallyDrop::drop(&mut self.descriptor) }
        } else {
            tracing::warn!("pages are missing: threads that need one wait as long as this process lives");
        }
    }
}

/// What a userfaultfd that does not block has to say; `false` if nothing.
pub(super) fn read_events(descriptor: &impl AsRawFd, into: &mut Vec<MemoryEvent>) -> io::Result<bool> {
    let mut messages = [Message { event: 0, reserved: [0; 7], arguments: [0; 3] }; MESSAGES];
    let fd = descriptor.as_raw_fd();
    // SAFETY: the kernel writes whole messages to the array, for which any bytes are valid.
    let read = retry(|| unsafe { libc::read(fd, messages.as_mut_ptr().cast(), size_of_val(&messages)) });
    let read = match read {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        read => read?,
    };
    into.extend(messages.iter().take(read / size_of::<Message>()).map(|message| {
        let [first, second, third] = message.arguments;
        match message.event {
            #[expect(clippy::cast_possible_truncation, reason = "a thread's number is in the lower half")]
            EVENT_PAGEFAULT => MemoryEvent::Fault { address: second, thread: third as u32 },
            EVENT_REMOVE => MemoryEvent::Removed { start: first, end: second },
            other => MemoryEvent::Other(other),
        }
    }));
    Ok(read > 0)
}

/// Makes missing pages of zeros, and wakes who waits for them.
pub(super) fn zero_range(descriptor: &impl AsRawFd, to: u64, len: usize) -> io::Result<()> {
    in_steps(len, |done| {
        let range = Range { start: to + done as u64, len: (len - done) as u64 };
        let mut zeropage = Zeropage { range, mode: 0, zeroed: 0 };
        // SAFETY: the request reads and writes a Zeropage, and makes pages that no thread has seen.
        let asked = unsafe { ask(descriptor, UFFDIO_ZEROPAGE, &raw mut zeropage) };
        (zeropage.zeroed, asked)
    })
}

/// Wakes the threads that wait for pages of this range.
pub(super) fn wake_range(descriptor: &impl AsRawFd, start: u64, len: u64) -> io::Result<()> {
    let mut range = Range { start, len };
    // SAFETY: the request reads a Range.
    unsafe { ask(descriptor, UFFDIO_WAKE, &raw mut range) }.map(drop)
}

/// Ends waits, once and for all.
#[derive(Debug)]
pub(crate) struct Wake(File);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, owned here only.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    pub(crate) fn fire(&self) {
        use std::io::Write;
        // Fails only when the counter is full, which takes 2^64 - 2 calls.
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }
}

/// Repeats a request until all of `len` bytes are done. `step` is told how many are, and gives the
/// kernel's count and answer.
fn in_steps(len: usize, mut step: impl FnMut(usize) -> (i64, io::Result<usize>)) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match step(done) {
            (count, Ok(_)) if usize::try_from(count).is_ok_and(|count| count >= len - done) => return Ok(()),
            // A part was done: the rest may have an error of its own.
            (count @ 1.., _) => done += usize::try_from(count).unwrap_or(0),
            (_, asked) => return asked.and(Err(io::ErrorKind::WriteZero.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel answers, one call after the other, and what it was asked.
    fn asked(len: usize, answers: &[(i64, Option<i32>)]) -> (io::Result<()>, Vec<usize>) {
        let (mut answers, mut begins) = (answers.iter(), Vec::new());
        let done = in_steps(len, |done| {
            begins.push(done);
            let (count, error) = answers.next().unwrap();
            (*count, error.map_or(Ok(0), |error| Err(io::Error::from_raw_os_error(error))))
        });
        (done, begins)
    }

    #[test]
    fn a_part_that_was_placed_is_not_placed_again_and_the_error_is_that_of_the_rest() {
        let again = Some(libc::EAGAIN);
        let (done, begins) = asked(0x4000, &[(0x4000, None)]);
        assert!(done.is_ok() && begins == [0]);
        let (done, begins) = asked(0x4000, &[(0x1000, again), (0x2000, again), (0x1000, None)]);
        assert!(done.is_ok() && begins == [0, 0x1000, 0x3000]);
        // The kernel says an error in the count's place when nothing was done.
        let exists = i64::from(-libc::EEXIST);
        let (done, begins) = asked(0x4000, &[(0x1000, again), (exists, Some(libc::EEXIST))]);
        assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::EEXIST));
        assert_eq!(begins, [0, 0x1000]);
        let (done, _) = asked(0x1000, &[(0, None)]);
        assert_eq!(done.unwrap_err().kind(), io::ErrorKind::WriteZero, "neither pages nor an error");
    }
}
