//! The first lines of a VMM on vm-memory: its guest's RAM moves to another host while vCPUs write.
//!
//! `cargo run --release --example embed`

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use multifd_codecs::Zstd;
use multifd_engine::transports::Endpoint;
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use multifd_engine::wire::Configuration;
use multifd_engine::{Destination, DeviceState, PAGE, RamBlock, RegionLog, Report, Source};

/// vm-memory marks every write through it in this bitmap.
type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two regions with a hole between them, as x86 guests have.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 32 << 20), (GuestAddress(4 << 30), 32 << 20)];

/// The part to copy: from a running guest to one that runs elsewhere.
fn migrate(memory: &Memory, vm: &Vm, to: &Endpoint) -> Result<Report, Box<dyn Error>> {
    let configuration = Configuration::new("my-vmm-1.0");
    let mut precopy = Source::builder(RamBlock::of_guest_memory(memory)?, configuration)
        .codec(Arc::new(Zstd::level(1)?))
        .channels(4)
        .downtime_limit(Duration::from_millis(300))
        .dirty_log(RegionLog::of_guest_memory(memory)?)
        .build()?
        .connect(to)?;
    while !precopy.converged() {
        println!("{}", precopy.round()?);
    }
    vm.pause();
    let state = DeviceState::opaque("my-vmm", 1, &vm.device_state());
    match precopy.stop_copy().and_then(|last| last.commit(&state)) {
        Ok(report) => Ok(report),
        Err(error) if error.source_may_resume() => {
            vm.resume();
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The other host's part.
fn receive(listener: Destination) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
    let arrived = listener.receive()?;
    let (version, state) = arrived.opaque_state("my-vmm").ok_or("not a guest of ours")?;
    assert_eq!(version, 1);
    let state = state.to_vec();
    // Load the state here, then take the guest over.
    arrived.accept()?;
    Ok(state)
}

/// Stands for your VMM: one "vCPU" that writes guest memory.
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

    fn vcpu(&self, memory: &Memory) {
        for count in 0_u64.. {
            let paused = self.paused.lock().expect("no vCPU panics");
            if *paused {
                break;
            }
            let (base, _) = REGIONS[(count % 2) as usize];
            memory
                .write_obj(count, GuestAddress(base.0 + count * 4099 % (8 << 20)))
                .expect("inside of the guest");
            drop(paused);
            thread::yield_now();
        }
    }

    fn device_state(&self) -> Vec<u8> {
        b"registers and rings".to_vec()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let here = Memory::from_ranges(&REGIONS)?;
    let there = Memory::from_ranges(&REGIONS)?;
    let destination =
        Destination::builder(RamBlock::of_guest_memory(&there)?).listen(&"tcp:127.0.0.1:0".parse()?)?;
    let endpoint = destination.endpoint();
    let vm = Vm::default();

    thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(destination));
        let vcpu = scope.spawn(|| vm.vcpu(&here));
        let moved = migrate(&here, &vm, &endpoint);
        vm.pause();
        vcpu.join().map_err(|_| "the vCPU panicked")?;
        println!("{}", moved?);
        let state =
            receiving.join().map_err(|_| "the destination panicked")?.map_err(|error| error.to_string())?;
        assert_eq!(state, vm.device_state());
        Ok::<_, Box<dyn Error>>(())
    })?;

    let mut pages = 0;
    for (here, there) in RamBlock::of_guest_memory(&here)?.iter().zip(RamBlock::of_guest_memory(&there)?) {
        let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
        for page in 0..here.pages() {
            assert!(
                here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b,
                "page {page} differs"
            );
            pages += 1;
        }
    }
    println!("embed: {pages} pages and the device state arrived equal");
    Ok(())
}
