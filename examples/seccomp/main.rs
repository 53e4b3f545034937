//! Each thread of a migration runs under a seccomp filter of its own, which lets through what
//! docs/embedding.md says of it.
//!
//! ```text
//!  thread_hook(name) ── on the new thread, before anything else ──> the filter of that name
//!  any other call ──> the process is killed by SIGSYS
//! ```
//!
//! The program runs itself twice: once the guest moves, on parallel channels and on main alone,
//! with an audit, and by post-copy; once a thread makes a call that its filter does not have, and
//! the process must be gone.

mod filters;

use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use filters::Filters;
use multifd_engine::{
    Configuration, Destination, DeviceState, Endpoint, HostMemory, Incoming, PAGE, PostcopyEnd, RamBlock,
    Report, Served, SoftwareLog, Source, UserfaultLog, Zstd,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn ram() -> Result<RamBlock> {
    Ok(RamBlock::new("guest.ram".try_into()?, HostMemory::anonymous(2048 * PAGE)?))
}

/// A guest moves within this process; every thread of both ends has its filter. `misbehave`: a
/// thread makes a call that it does not have.
fn migrate(channels: usize, misbehave: bool) -> Result<Report> {
    let filters = Filters::new()?;
    let (here, there) = (ram()?, ram()?);
    for page in 0..here.pages() / 2 {
        here.memory().slice(page * PAGE, 8).ok_or("no memory")?.copy_from(&page.to_le_bytes());
    }
    let at_destination = filters.clone();
    let destination = Destination::builder(vec![there.clone()])
        .deadline(Some(Duration::from_secs(600)))
        .thread_hook(move |thread| at_destination.install(thread))
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let to = destination.endpoint();
    let mut source = Source::builder(vec![here.clone()], Configuration::new("my-vmm-1.0"));
    if channels > 0 {
        source = source.channels(channels).codec(Arc::new(Zstd::level(1)?));
    }
    let source = source
        .audit(channels > 0)
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
    compare(&here, &there);
    Ok(report)
}

fn compare(here: &RamBlock, there: &RamBlock) {
    let (mut a, mut b) = ([0; PAGE], [1; PAGE]);
    for page in 0..here.pages() {
        assert!(here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b, "page {page}");
    }
}

fn send(source: Source, to: &Endpoint) -> Result<Report> {
    let mut precopy = source.connect(to)?;
    precopy.round()?;
    // Long enough for a sign of life: the guest is held between rounds.
    let held = Instant::now();
    while let Some(left) = Duration::from_millis(600).checked_sub(held.elapsed()) {
        thread::park_timeout(left);
    }
    precopy.round()?;
    Ok(precopy.stop_copy()?.commit(&DeviceState::none())?)
}

/// A guest goes on at the destination before its RAM is there; a thread reads all of it meanwhile,
/// which asks for it. `preempt`: what is asked for has a connection of its own.
fn postcopy(preempt: bool) -> Result<Report> {
    let filters = Filters::new()?;
    let (here, there) = (ram()?, ram()?);
    for page in 0..here.pages() / 2 {
        here.memory().slice(page * PAGE, 8).ok_or("no memory")?.copy_from(&page.to_le_bytes());
    }
    let at_destination = filters.clone();
    let destination = Destination::builder(vec![there.clone()])
        .postcopy(true)
        .thread_hook(move |thread| at_destination.install(thread))
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let to = destination.endpoint();
    let source = Source::builder(vec![here.clone()], Configuration::new("my-vmm-1.0"))
        .postcopy(true)
        .postcopy_preempt(preempt)
        .dirty_log(SoftwareLog::new(std::slice::from_ref(&here)))
        .thread_hook(move |thread| filters.install(thread))
        .build()?;
    thread::scope(|scope| {
        let receiving = scope.spawn(|| -> Result<()> {
            let Incoming::Postcopy(mut guest) = destination.receive_live()? else {
                return Err("no post-copy".into());
            };
            guest.loaded()?;
            compare(&here, &there);
            match guest.wait()? {
                PostcopyEnd::Completed(_) => Ok(()),
                PostcopyEnd::Paused(error) => Err(error.into()),
            }
        });
        let served = source.connect(&to)?.switch_to_postcopy(&DeviceState::none())?.serve()?;
        receiving.join().map_err(|_| "the destination panicked")??;
        match served {
            Served::Completed(report) => Ok(*report),
            Served::Paused(error) => Err(error.into()),
        }
    })
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
            match UserfaultLog::new() {
                Ok(_) => {
                    for preempt in [false, true] {
                        println!("{}", postcopy(preempt)?);
                    }
                }
                Err(error) => println!("no post-copy on this machine: {error}"),
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
