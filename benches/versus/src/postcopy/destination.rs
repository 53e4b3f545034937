//! Our destination, a process of its own: threads read its memory at random while that comes.

use std::fs::File;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use multifd_engine::vm_memory::Bytes as _;
use multifd_engine::wire::BlockEntry;
use multifd_engine::{
    Destination, FreshRam, HostMemory, Incoming, PAGE, PostcopyEnd, PostcopyGuest, RamBlock,
};
use multifd_tests::{Failure, Outcome};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};

use super::guest::{Walk, log2_pages, touches};

/// How the bench starts itself for that.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Faulting {
    /// Where to listen
    #[arg(long, hide = true, value_name = "URI")]
    pub(crate) destination: Option<String>,
    /// What the RAM must be at the end
    #[arg(long, hide = true, value_name = "FILE", requires = "destination")]
    pub(crate) expect: Option<PathBuf>,
    /// Threads that fault at the destination, QEMU's vCPUs or our threads
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) threads: u32,
    /// Threads of our destination that hear of faults
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) fault_threads: usize,
    /// Send buffer of our source's connections, which is what a page that is asked for waits behind
    /// on a slow link
    #[arg(long, value_name = "SIZE")]
    pub(crate) send_buffer: Option<String>,
}

/// What it says first.
pub(crate) const LISTENING: &str = "listening on ";

/// The block whose pages are touched, and compared.
pub(crate) const MAIN_RAM: &str = "pc.ram";

/// Pages below are the firmware's, the interrupt table and a stack: written at QEMU's destination.
pub(crate) const COMPARED_FROM: usize = (1 << 20) / PAGE;

const TIMEOUT: Duration = Duration::from_secs(120);

/// Receives one guest, and prints the figures.
pub(crate) fn run(uri: &str, flags: &Faulting) -> Outcome {
    let ram = FreshRam::of(in_memory_file);
    let destination = Destination::builder(ram.clone())
        .postcopy(true)
        .fault_threads(flags.fault_threads)
        .timeout(TIMEOUT)
        .listen(&uri.parse().map_err(fail)?)
        .map_err(fail)?;
    println!("{LISTENING}{}", destination.endpoint());
    let Incoming::Postcopy(guest) = destination.receive_live().map_err(fail)? else {
        return Err(Failure::new("the source did not switch"));
    };
    let blocks = ram.blocks();
    let main = blocks.iter().find(|block| block.name().as_str() == MAIN_RAM);
    let main = main.ok_or_else(|| Failure::new("no main RAM"))?;
    let figures = run_on(guest, main, flags)?;
    if let Some(expected) = &flags.expect {
        check(main, expected)?;
    }
    writeln!(io::stdout(), "{figures}")?;
    Ok(())
}

fn run_on(mut guest: PostcopyGuest, main: &RamBlock, flags: &Faulting) -> Outcome<Value> {
    guest.loaded().map_err(fail)?;
    let running = SystemTime::now().duration_since(UNIX_EPOCH).map_err(fail)?;
    let ram_mib = u32::try_from(main.used_len() >> 20).map_err(fail)?;
    let start = |number: u32| {
        let (main, count) = (main.clone(), touches(ram_mib, flags.threads));
        // When the move fails they wait for ever, and end with the process.
        thread::Builder::new().spawn(move || touch(&main, Walk::new(number, log2_pages(ram_mib)), count))
    };
    let threads = (0..flags.threads).map(start).collect::<Result<Vec<_>, _>>()?;
    let PostcopyEnd::Completed(report) = guest.wait().map_err(fail)? else {
        return Err(Failure::new("the link broke"));
    };
    for thread in threads {
        thread.join().map_err(|_| Failure::new("a thread panicked"))?;
    }
    let running = running.as_micros().to_string();
    Ok(
        json!({ "running_at_us": running, "postcopy": report.postcopy, "downtime_ms": report.figures().downtime_ms }),
    )
}

fn touch(main: &RamBlock, walk: Walk, count: u32) {
    for page in walk.take(count as usize) {
        let mut word = [0; 4];
        let slice = main.memory().slice(page * PAGE, word.len());
        let read = slice.is_some_and(|slice| slice.read_slice(&mut word, 0).is_ok());
        std::hint::black_box((read, word));
    }
}

fn check(main: &RamBlock, expected: &Path) -> Outcome {
    let expected = File::open(expected)?;
    let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
    for page in COMPARED_FROM..main.pages() {
        expected.read_exact_at(&mut there, (page * PAGE) as u64)?;
        if !main.read_page(page, &mut here) || here != there {
            return Err(Failure::new(format!("page {page} is not the source's")));
        }
    }
    Ok(())
}

/// Shared with a file, as QEMU's is.
fn in_memory_file(entry: &BlockEntry) -> io::Result<HostMemory> {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, entry.used_len)?;
    HostMemory::map_file(file, usize::try_from(entry.used_len).map_err(io::Error::other)?)
}

fn fail(error: impl std::error::Error) -> Failure {
    Failure::new(error.to_string())
}
