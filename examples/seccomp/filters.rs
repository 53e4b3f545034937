//! The system calls of each thread, and filters made of them. docs/embedding.md has the same list,
//! which a test compares with this one.

use std::collections::BTreeMap;
use std::sync::Arc;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use super::Result;

/// What every thread makes: memory, locks, its own begin and end. `clock_gettime` and `getrandom`
/// are calls only where the kernel has no vDSO for them; the C library's allocator opens and reads
/// the list of CPUs, once, on any thread.
const ALWAYS: &[i64] = &[
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_openat,
    libc::SYS_prctl,
    libc::SYS_read,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// A thread inherits the filter of the one that starts it, and can only add to it. `mig-accept`
/// starts the threads of the channels: it must let through what those do, and the call that
/// installs a filter.
const INHERITED: (&str, &[&str]) = ("mig-accept", &["mig-recv", "mig-urgent"]);

/// Threads without a filter here: one runs what the system resolves names with, the others the
/// embedder's `ByteStream`.
const UNFILTERED: &[&str] = &["mig-lookup", "mig-stream-"];

/// What the threads make beside that, by the begin of their names; the longest that fits counts.
const THREADS: &[(&str, &[i64])] = &[
    (
        "mig-accept",
        &[
            libc::SYS_accept4,
            libc::SYS_clone3,
            libc::SYS_eventfd2,
            libc::SYS_fcntl,
            libc::SYS_getpeername,
            libc::SYS_getsockname,
            libc::SYS_getsockopt,
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_read,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_setsockopt,
            libc::SYS_shutdown,
            libc::SYS_write,
        ],
    ),
    (
        "mig-audit",
        &[
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_process_vm_readv,
            libc::SYS_shutdown,
        ],
    ),
    ("mig-alive", &[libc::SYS_getsockopt, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_shutdown]),
    ("mig-deadline", &[libc::SYS_getsockopt, libc::SYS_shutdown]),
    (
        "mig-fault",
        &[
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_mincore,
            libc::SYS_poll,
            libc::SYS_sendmsg,
            libc::SYS_shutdown,
            libc::SYS_write,
        ],
    ),
    (
        "mig-fault-vhost",
        &[
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_wait,
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_mincore,
            libc::SYS_sendmsg,
            libc::SYS_shutdown,
            libc::SYS_write,
        ],
    ),
    (
        "mig-postcopy",
        &[
            libc::SYS_fcntl,
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_process_vm_readv,
            libc::SYS_recvfrom,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_setsockopt,
            libc::SYS_shutdown,
            libc::SYS_write,
        ],
    ),
    (
        "mig-recv",
        &[
            libc::SYS_fcntl,
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_pread64,
            libc::SYS_process_vm_readv,
            libc::SYS_pwrite64,
            libc::SYS_pwritev,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_shutdown,
        ],
    ),
    ("mig-return", &[libc::SYS_getsockopt, libc::SYS_recvfrom, libc::SYS_shutdown]),
    (
        "mig-send",
        &[
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_process_vm_readv,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ],
    ),
    (
        "mig-urgent",
        &[
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_process_vm_readv,
            libc::SYS_recvfrom,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ],
    ),
    ("mig-urgent-in", &[libc::SYS_getsockopt, libc::SYS_recvfrom, libc::SYS_shutdown]),
    (
        "mig-verify",
        &[
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_pread64,
            libc::SYS_process_vm_readv,
            libc::SYS_shutdown,
        ],
    ),
];

/// A filter for each kind of thread, made before any of them is there: what makes it needs more
/// than they may.
#[derive(Clone)]
pub(super) struct Filters(Arc<BTreeMap<&'static str, BpfProgram>>);

impl Filters {
    pub(super) fn new() -> Result<Self> {
        let filter = |(name, calls): &(&'static str, &[i64])| {
            let started = if *name == INHERITED.0 { INHERITED.1 } else { &[] };
            let theirs = THREADS.iter().filter(|(other, _)| started.contains(other));
            let theirs =
                theirs.flat_map(|(_, calls)| *calls).chain(started.iter().map(|_| &libc::SYS_seccomp));
            let rules = ALWAYS.iter().chain(*calls).chain(theirs).map(|call| (*call, Vec::new())).collect();
            let (refused, let_through) = (SeccompAction::KillProcess, SeccompAction::Allow);
            let filter = SeccompFilter::new(rules, refused, let_through, std::env::consts::ARCH.try_into()?)?;
            Ok((*name, filter.try_into()?))
        };
        Ok(Self(Arc::new(THREADS.iter().map(filter).collect::<Result<_>>()?)))
    }

    /// To be called on the thread. A panic of the hook ends the migration: no thread runs without
    /// its filter.
    pub(super) fn install(&self, thread: &str) {
        if UNFILTERED.iter().any(|name| thread.starts_with(name)) {
            return;
        }
        let filter = self.0.iter().rev().find(|(name, _)| thread.starts_with(**name));
        let (_, filter) = filter.unwrap_or_else(|| panic!("no filter for a thread {thread}"));
        apply_filter(filter).unwrap_or_else(|error| panic!("the filter of thread {thread}: {error}"));
    }
}
