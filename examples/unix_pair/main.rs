//! A guest moves over connections that this program has made, with an engine that has no codec, no
//! TLS and needs no C compiler.
//!
//! `cargo run --release --package multifd-unix-pair`
//!
//! ```text
//!  a device thread writes, and marks what it wrote     main and 2 channels: three pairs of unix sockets
//!  rounds, until the rest is small ──────────────────> RAM
//!  the thread is paused; last pages, device state ───> the same RAM, the same state
//! ```

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex};
use std::thread;

use multifd_engine::vm_memory::Bytes;
use multifd_engine::{
    Channel, Configuration, Destination, DeviceState, DirtyMarker, HostMemory, PAGE, RamBlock, Report,
    SoftwareLog, Source,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const PAGES: usize = 8192;
const CHANNELS: usize = 2;
/// Rounds at least: the guest must have written while it moved.
const ROUNDS: usize = 3;
const STATE: &[u8] = b"registers and rings";

/// Stands for the VMM: a device that writes guest memory from a thread of the VMM.
#[derive(Default)]
struct Vm {
    state: Mutex<State>,
    wrote: Condvar,
}

#[derive(Default)]
struct State {
    paused: bool,
    writes: u64,
}

impl Vm {
    /// Returns when nothing writes any more: the device writes with the lock held.
    fn pause(&self) {
        self.state.lock().expect("no thread panics").paused = true;
    }

    fn run_device(&self, ram: &RamBlock, marker: &DirtyMarker) -> Result<()> {
        for write in 0_u64.. {
            let mut state = self.state.lock().expect("no thread panics");
            if state.paused {
                break;
            }
            let page = usize::try_from(write * 4099 % (PAGES as u64 / 8))?;
            let memory = ram.memory().slice(page * PAGE, PAGE).ok_or("a page of the guest")?;
            memory.write_obj(write, 8)?;
            // After the write, not before it: a round in between would send the old page and take
            // the mark.
            marker.mark(0, (page * PAGE) as u64, PAGE as u64);
            state.writes += 1;
            drop(state);
            self.wrote.notify_one();
            thread::yield_now();
        }
        Ok(())
    }

    /// Waits for so many writes more.
    fn wait_for_writes(&self, more: u64) {
        let state = self.state.lock().expect("no thread panics");
        let enough = state.writes + more;
        let waited = self.wrote.wait_while(state, |state| state.writes < enough);
        drop(waited.expect("no thread panics"));
    }
}

fn memory() -> Result<RamBlock> {
    Ok(RamBlock::new("guest.ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?))
}

/// The source: main and the channels are connected, whatever they are.
fn migrate(
    ram: &RamBlock,
    log: SoftwareLog,
    vm: &Vm,
    main: Channel,
    channels: Vec<Channel>,
) -> Result<Report> {
    let mut precopy = Source::builder(vec![ram.clone()], Configuration::new("my-vmm-1.0"))
        .dirty_log(log)
        .build()?
        .connect_over(main, channels)?;
    while !precopy.converged() || precopy.decisions().len() < ROUNDS {
        vm.wait_for_writes(100);
        println!("{}", precopy.round()?);
    }
    vm.pause();
    Ok(precopy.stop_copy()?.commit(&DeviceState::opaque("my-vmm", 1, STATE))?)
}

fn receive(ram: &RamBlock, main: Channel, channels: Vec<Channel>) -> Result<()> {
    let arrived = Destination::builder(vec![ram.clone()]).over(main, channels)?.receive()?;
    assert_eq!(arrived.opaque_state("my-vmm"), Some((1, STATE)));
    arrived.accept()?;
    Ok(())
}

fn main() -> Result<()> {
    let (here, there) = (memory()?, memory()?);
    let log = SoftwareLog::new(std::slice::from_ref(&here));
    let marker = log.marker();
    let mut ends = (Vec::new(), Vec::new());
    for _ in 0..=CHANNELS {
        let (one, other) = UnixStream::pair()?;
        ends.0.push(Channel::try_from(one)?);
        ends.1.push(Channel::try_from(other)?);
    }
    let (main_here, main_there) = (ends.0.remove(0), ends.1.remove(0));

    let vm = Vm::default();
    let report = thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(&there, main_there, ends.1));
        let device = scope.spawn(|| vm.run_device(&here, &marker));
        let moved = migrate(&here, log, &vm, main_here, ends.0);
        vm.pause();
        device.join().map_err(|_| "the device panicked")??;
        receiving.join().map_err(|_| "the destination panicked")??;
        moved
    })?;
    println!("{report}");

    let (mut left, mut right) = ([0; PAGE], [1; PAGE]);
    for page in 0..PAGES {
        assert!(here.read_page(page, &mut left) && there.read_page(page, &mut right));
        assert!(left == right, "page {page} differs");
    }
    let dirtied: u64 = report.decisions.iter().map(|round| round.remaining_bytes).sum();
    assert!(dirtied > 0, "the guest wrote nothing while it moved");
    println!("unix_pair: {PAGES} pages and the device state arrived equal over {CHANNELS} channels");
    Ok(())
}
