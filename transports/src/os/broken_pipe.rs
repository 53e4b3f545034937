//! Writing to a pipe without a reader is an error instead of SIGPIPE.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Calls `write` so that a broken pipe is an error only: the process belongs to the embedder, and
/// may not ignore SIGPIPE. What sockets have a flag for takes pipes two more system calls.
pub(crate) fn as_error<T>(write: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let mut pipe = SigSet::empty();
    pipe.add(Signal::SIGPIPE);
    let before = pipe.thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(into_errno)?;
    let outcome = write();
    if before.contains(Signal::SIGPIPE) {
        return outcome;
    }
    // It is sent to the thread that wrote. If it cannot be taken back it stays blocked, which does
    // no harm.
    if matches!(outcome, Err(rustix::io::Errno::PIPE)) {
        let Ok(pending) = SignalFd::with_flags(&pipe, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) else {
            return outcome;
        };
        if pending.read_signal().is_err() {
            return outcome;
        }
    }
    before.thread_set_mask().map_err(into_errno)?;
    outcome
}

fn into_errno(error: Errno) -> rustix::io::Errno {
    rustix::io::Errno::from_raw_os_error(error as i32)
}
