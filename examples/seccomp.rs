//! Each thread of a migration runs under a seccomp filter of its own, which lets through what docs/embedding.md says of it.
//!
//! ```text
//!  thread_hook(name) ── on the new thread, before anything else ──> the filter of that name
//!  any other call ──> the process is killed by SIGSYS
//! ```
//!
//! The program runs itself twice: once the guest moves, on parallel channels and on main alone; once a thread makes a call that
//! its filter does not have, and the process must be gone.

use std::collections::BTreeMap;
use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread;

use multifd_engine::{
    Configuration, Destination, DeviceState, Endpoint, HostMemory, PAGE, RamBlock, Report, SoftwareLog,
    Source, Zstd,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What every thread makes: memory, locks, its own begin and end. `clock_gettime` and `getrandom` are calls only where the kernel
/// has no vDSO for them; the C library's allocator opens and reads the list of CPUs, once, on any thread.
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

/// A thread inherits the filter of the one that starts it, and can only add to it. `mig-accept` starts `mig-recv`: it must let
/// through what that one does, and the call that installs a filter.
const INHERITED: (&str, &[&str]) = ("mig-accept", &["mig-recv"]);

/// What the threads make beside that, by the begin of their names.
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
    ("mig-alive", &[libc::SYS_getsockopt, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_shutdown]),
    (
        "mig-recv",
        &[
            libc::SYS_fcntl,
            libc::SYS_getsockopt,
            libc::SYS_ioctl,
            libc::SYS_lseek,
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
            libc::SYS_process_vm_readv,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ],
    ),
];

/// A filter for each kind of thread, made before any of them is there: what makes it needs more than they may.
#[derive(Clone)]
struct Filters(Arc<BTreeMap<&'static str, BpfProgram>>);

impl Filters {
    fn new() -> Result<Self> {
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

    /// To be called on the thread. A panic of the hook ends the migration: no thread runs without its filter.
    fn install(&self, thread: &str) {
        let filter = self.0.iter().find(|(name, _)| thread.starts_with(**name));
        let (_, filter) = filter.unwrap_or_else(|| panic!("no filter for a thread {thread}"));
        apply_filter(filter).unwrap_or_else(|error| panic!("the filter of thread {thread}: {error}"));
    }
}

fn ram() -> Result<RamBlock> {
    Ok(RamBlock::new("guest.ram".try_into()?, HostMemory::anonymous(2048 * PAGE)?))
}

/// A guest moves within this process; every thread of both ends has its filter. `misbehave`: a thread makes a call that it does
/// not have.
fn migrate(channels: usize, misbehave: bool) -> Result<Report> {
    let filters = Filters::new()?;
    let (here, there) = (ram()?, ram()?);
    for page in 0..here.pages() / 2 {
        here.memory().slice(page * PAGE, 8).ok_or("no memory")?.copy_from(&page.to_le_bytes());
    }
    let at_destination = filters.clone();
    let destination = Destination::builder(vec![there.clone()])
        .thread_hook(move |thread| at_destination.install(thread))
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let to = destination.endpoint();
    let mut source = Source::builder(vec![here.clone()], Configuration::new("my-vmm-1.0"));
    if channels > 0 {
        source = source.channels(channels).codec(Arc::new(Zstd::level(1)?));
    }
    let source = source
        .dirty_log(SoftwareLog::new(std::slice::from_ref(&here)))
        .thread_hook(move |thread| {
            filters.install(thread);
            if misbehave && thread.starts_with("mig-return") {
                // As an attacker would who has taken over the thread.
                let _socket = std::net::UdpSocket::bind("127.0.0.1:0");
            }
        })
        .build()?;
    let report = thread::scope(|scope| {
        let receiving = scope.spawn(|| -> Result<()> {
            destination.receive()?.accept()?;
            Ok(())
        });
        let report = send(source, &to)?;
        receiving.join().map_err(|_| "the destination panicked")??;
        Ok::<_, Box<dyn Error + Send + Sync>>(report)
    })?;
    let (mut a, mut b) = ([0; PAGE], [1; PAGE]);
    for page in 0..here.pages() {
        assert!(here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b, "page {page}");
    }
    Ok(report)
}

fn send(source: Source, to: &Endpoint) -> Result<Report> {
    let mut precopy = source.connect(to)?;
    precopy.round()?;
    // Long enough for a sign of life: the guest is held between rounds.
    thread::park_timeout(std::time::Duration::from_millis(600));
    precopy.round()?;
    Ok(precopy.stop_copy()?.commit(&DeviceState::none())?)
}

/// This program with another argument.
fn run(argument: &str) -> Result<ExitStatus> {
    Ok(Command::new(std::env::current_exe()?).arg(argument).status()?)
}

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("moves") => {
            for channels in [0, 3] {
                println!("{}", migrate(channels, false)?);
            }
        }
        Some("misbehaves") => drop(migrate(2, true)?),
        _ => {
            let moves = run("moves")?;
            assert!(moves.success(), "under its filters, the migration ended by {moves}");
            let killed = run("misbehaves")?.signal();
            assert_eq!(killed, Some(libc::SIGSYS), "a call that is not in the filter");
            println!("seccomp: the guest moved under filters, and a thread that left its own was killed");
        }
    }
    Ok(())
}
