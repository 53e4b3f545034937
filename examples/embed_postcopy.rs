//! A VMM on vm-memory whose guest goes on at the other host before its RAM is there, also when the
//! link breaks.
//!
//! `cargo run --release --example embed_postcopy`
//!
//! ```text
//!  source                                          destination
//!  a round while the guest runs ─────────────────> RAM
//!  guest paused; what is stale, device state ────> device state: loaded(), the guest runs
//!  serve() <──────────────────────────── requests  its threads wait for pages
//!        ──────────────────────────────── pages >
//!  Paused ─ recover() ═══════ the link broke ════> Paused ─ recover()
//!  Completed ────────────────────────────────────> Completed
//! ```

use std::error::Error;
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::transports::{Endpoint, Listener};
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Control, Destination, DeviceState, ErrorKind, Incoming, MigrationState, PAGE, Postcopy, PostcopyEnd,
    PostcopyGuest, RamBlock, RegionLog, Report, Served, Source, UserfaultLog,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// vm-memory marks every write through it in this bitmap.
type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two regions with a hole between them, as x86 guests have.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 8 << 20), (GuestAddress(4 << 30), 8 << 20)];

/// How long each end waits for the other when the link is gone.
const RECOVER: Duration = Duration::from_secs(60);

/// The part to copy: a guest goes on elsewhere, and its RAM follows. Its memory may be given back
/// when this has returned.
fn migrate(source: Source, vm: &Vm, to: &Endpoint) -> Result<Report> {
    let mut precopy = source.connect(to)?;
    // As many as you like: what the guest does not write afterwards is never waited for.
    // `Limits::on_stall` tells when to stop.
    println!("{}", precopy.round()?);
    precopy.prepare_postcopy()?;
    vm.pause();
    let state = DeviceState::opaque("my-vmm", 1, &vm.device_state());
    let moved = precopy.switch_to_postcopy(&state).and_then(|mut postcopy| serve(&mut postcopy, to));
    moved.map_err(|error| {
        if error.source_may_resume() {
            vm.resume();
        }
        error.into()
    })
}

fn serve(postcopy: &mut Postcopy, to: &Endpoint) -> std::result::Result<Report, multifd_engine::Error> {
    loop {
        match postcopy.serve()? {
            Served::Completed(report) => return Ok(*report),
            Served::Paused(why) => {
                println!("source: {why}");
                recover(postcopy, to)?;
            }
        }
    }
}

/// Nothing is lost as long as this process lives, and a recovery that fails may be tried again: the
/// destination may not have noticed yet that the link broke, and hang up on a new connection.
fn recover(postcopy: &mut Postcopy, to: &Endpoint) -> std::result::Result<(), multifd_engine::Error> {
    let until = Instant::now() + RECOVER;
    loop {
        match postcopy.recover(to, RECOVER) {
            Err(error) if error.kind() == ErrorKind::Transport && Instant::now() < until => {
                println!("source: {error}");
            }
            done => return done,
        }
    }
}

/// The other host's part.
fn receive(destination: Destination, vm: &Vm, memory: &Memory, expected: &Memory) -> Result<Report> {
    let at = destination.endpoint();
    match destination.receive_live()? {
        // A source that did not switch.
        Incoming::Arrived(arrived) => Ok(arrived.accept()?),
        Incoming::Postcopy(mut guest) => {
            let (version, state) = guest.opaque_state("my-vmm").ok_or("not a guest of ours")?;
            assert_eq!((version, state), (1, &vm.device_state()[..]));
            // The device state is loaded here; from the next line on the guest may run.
            guest.loaded()?;
            thread::scope(|scope| {
                let vcpus = [1, 3].map(|step| scope.spawn(move || vm.reading_vcpu(memory, expected, step)));
                let report = wait(&mut guest, &at)?;
                for vcpu in vcpus {
                    vcpu.join().map_err(|_| "a vCPU panicked")??;
                }
                Ok(report)
            })
        }
    }
}

/// Until all of RAM is here. The vCPUs run meanwhile.
fn wait(guest: &mut PostcopyGuest, at: &Endpoint) -> Result<Report> {
    loop {
        match guest.wait()? {
            PostcopyEnd::Completed(report) => return Ok(*report),
            PostcopyEnd::Paused(why) => {
                println!("destination: {why}");
                guest.recover(Listener::bind(at)?, RECOVER)?;
            }
        }
    }
}

/// Stands for your VMM.
#[derive(Default)]
struct Vm {
    paused: Mutex<bool>,
}

impl Vm {
    /// Returns when no vCPU writes any more: a pause that only asks for it would lose the last
    /// write.
    fn pause(&self) {
        *self.paused.lock().expect("no vCPU panics") = true;
    }

    fn resume(&self) {
        *self.paused.lock().expect("no vCPU panics") = false;
    }

    /// At the source: writes all over its memory until it is paused.
    fn writing_vcpu(&self, memory: &Memory) -> Result<()> {
        for count in 1_u64.. {
            let paused = self.paused.lock().map_err(|_| "a vCPU panicked")?;
            if *paused {
                break;
            }
            let (base, _) = REGIONS[(count % 2) as usize];
            memory.write_obj(count, GuestAddress(base.0 + count * 4099 % (7 << 20)))?;
        }
        Ok(())
    }

    /// At the destination: finds in each page what the paused guest had there, however long that
    /// takes to come.
    fn reading_vcpu(&self, memory: &Memory, expected: &Memory, step: usize) -> Result<()> {
        let (mut here, mut there) = ([0; PAGE], [0; PAGE]);
        for (base, len) in REGIONS {
            let pages = len / PAGE;
            for page in (0..pages).map(|turn| turn * step % pages) {
                let at = GuestAddress(base.0 + (page * PAGE) as u64);
                memory.read_slice(&mut here, at)?;
                expected.read_slice(&mut there, at)?;
                assert!(here == there, "page {page} at {:#x} is not the source's", base.0);
            }
        }
        Ok(())
    }

    fn device_state(&self) -> Vec<u8> {
        b"registers and rings".to_vec()
    }
}

/// Plays the network that fails: when some pages have been asked for. Then all goes as fast as it
/// can.
fn break_once(control: &Control) -> Result<()> {
    let changes = control.state_changes();
    while control.progress().requests < 8 && !control.state().is_final() {
        thread::yield_now();
    }
    control.pause_postcopy()?;
    changes.iter().find(|state| *state == MigrationState::PostcopyRecover || state.is_final());
    control.set_max_postcopy_bandwidth(None);
    Ok(())
}

fn main() -> Result<()> {
    if let Err(error) = UserfaultLog::new() {
        println!("embed_postcopy: skipped: no userfaultfd: {error}");
        return Ok(());
    }
    let (here, there) = (Memory::from_ranges(&REGIONS)?, Memory::from_ranges(&REGIONS)?);
    let destination = Destination::builder(RamBlock::of_guest_memory(&there)?)
        .postcopy(true)
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let endpoint = destination.endpoint();
    let source = Source::builder(RamBlock::of_guest_memory(&here)?, Configuration::new("my-vmm-1.0"))
        .dirty_log(RegionLog::of_guest_memory(&here)?)
        .postcopy(true)
        .postcopy_preempt(true)
        // So slow that pages are waited for in an example, too.
        .max_postcopy_bandwidth(NonZeroU64::new(1))
        .build()?;
    let (control, vm) = (source.control(), Vm::default());

    let (sent, received) = thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(destination, &vm, &there, &here));
        let vcpu = scope.spawn(|| vm.writing_vcpu(&here));
        let network = scope.spawn(|| break_once(&control));
        let moved = migrate(source, &vm, &endpoint);
        vm.pause();
        vcpu.join().map_err(|_| "the vCPU panicked")??;
        let sent = moved?;
        network.join().map_err(|_| "the network panicked")??;
        let received = receiving.join().map_err(|_| "the destination panicked")??;
        Ok::<_, Box<dyn Error + Send + Sync>>((sent, received))
    })?;

    let sent = sent.postcopy.ok_or("no post-copy")?;
    let received = received.postcopy.ok_or("no post-copy")?;
    let faults = received.faults.ok_or("no faults")?;
    println!("source: {sent}");
    assert_eq!((sent.recoveries, received.recoveries), (1, 1));
    println!(
        "embed_postcopy: every page was the source's, {} of them waited for, p99 {} us; over one link and then another",
        faults.faults, faults.fault_us.p99
    );
    Ok(())
}
