//! What a process has cost, from the kernel's own account.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
    time::Duration,
};

/// The account of a process that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Time on a core, its own and the kernel's on its behalf, all threads.
    pub cpu: Duration,
    /// Page faults that found their page in memory, or made one: every page of a file or of fresh
    /// memory that was looked at through a mapping, for the first time, is one, unless the kernel
    /// mapped several at once.
    pub minor_faults: u64,
    /// Most memory that it ever had mapped and present, in bytes, pages of mapped files included.
    pub peak_resident_bytes: u64,
}

impl Usage {
    /// The account of the process behind `pidfd`, which has ended and was not reaped. Does not reap
    /// it.
    #[expect(unsafe_code, reason = "std and rustix know no rusage")]
    pub(crate) fn of(pidfd: BorrowedFd<'_>) -> io::Result<Self> {
        let no_info = ptr::null_mut::<libc::siginfo_t>();
        // SAFETY: all-zero bytes are a rusage: it consists of integers.
        let mut usage: libc::rusage = unsafe { mem::zeroed() };
        // The library's waitid lacks the last parameter; the kernel's fills in a rusage also with
        // WNOWAIT. SAFETY: the kernel writes one rusage to the last address, and nothing to a null
        // siginfo_t.
        let result = unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD,
                pidfd.as_raw_fd(),
                no_info,
                libc::WEXITED | libc::WNOWAIT,
                &raw mut usage,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let number = |value: libc::c_long| u64::try_from(value).unwrap_or(0);
        let time = |value: libc::timeval| {
            Duration::from_secs(number(value.tv_sec)) + Duration::from_micros(number(value.tv_usec))
        };
        Ok(Self {
            cpu: time(usage.ru_utime) + time(usage.ru_stime),
            minor_faults: number(usage.ru_minflt),
            // The kernel counts it in KiB.
            peak_resident_bytes: number(usage.ru_maxrss) << 10,
        })
    }
}
