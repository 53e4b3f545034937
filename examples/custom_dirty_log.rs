//! A dirty log of your own: a device model that writes guest memory notes what it wrote, and the
//! migration asks it.
//!
//! `cargo run --release --example custom_dirty_log`

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use multifd_engine::wire::Configuration;
use multifd_engine::{
    Coverage, Destination, DeviceState, DirtyBitmap, DirtyLog, DirtyLogError, HostMemory, PAGE, RamBlock,
    Source,
};

const PAGES: usize = 4096;

/// What a device wrote since the last sync, as it likes to keep it: a list of pages.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<usize>>>);

impl Journal {
    /// The device calls this *after* each write: then a write is never missed, at worst sent twice.
    fn note(&self, page: usize) {
        self.0.lock().expect("no thread panics with the lock").push(page);
    }
}

impl DirtyLog for Journal {
    fn name(&self) -> &str {
        "device journal"
    }

    fn start(&mut self, _ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        Ok(())
    }

    /// All of the one block that there is: nothing but the device writes to this guest. Beside
    /// vCPUs it would be `Nothing`.
    fn covers(&self, block: &RamBlock) -> Coverage {
        if block.name().as_str() == "ram" { Coverage::Whole } else { Coverage::Nothing }
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        let noted =
            std::mem::take(&mut *self.0.lock().map_err(|_| DirtyLogError::new("locking the journal"))?);
        let ram = bitmaps.first().ok_or_else(|| DirtyLogError::new("finding the RAM block"))?;
        noted.into_iter().for_each(|page| ram.set(page));
        Ok(())
    }

    fn stop(&mut self) {}
}

/// A device that writes one page after another until it is stopped.
fn device(ram: &RamBlock, journal: &Journal, stopped: &AtomicBool) {
    for count in 0_u64.. {
        if stopped.load(Ordering::Acquire) {
            break;
        }
        let page = (count * 7919) as usize % PAGES;
        if let Some(slice) = ram.memory().slice(page * PAGE, 8) {
            slice.copy_from(&count.to_le_bytes()[..]);
        }
        journal.note(page);
        thread::yield_now();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let here = RamBlock::new("ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?);
    let there = RamBlock::new("ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?);
    let destination = Destination::builder(vec![there.clone()]).listen(&"tcp:127.0.0.1:0".parse()?)?;
    let endpoint = destination.endpoint();
    let receiving = thread::spawn(move || destination.receive()?.accept());

    let (journal, stopped) = (Journal::default(), Arc::new(AtomicBool::new(false)));
    let writing = {
        let (here, journal, stopped) = (here.clone(), journal.clone(), Arc::clone(&stopped));
        thread::spawn(move || device(&here, &journal, &stopped))
    };

    let configuration = Configuration::new("example");
    let mut precopy = Source::builder(vec![here.clone()], configuration)
        .channels(2)
        .dirty_log(journal)
        .build()?
        .connect(&endpoint)?;
    while !precopy.converged() || precopy.decisions().len() < 3 {
        println!("{}", precopy.round()?);
    }
    // Stop the guest: the device writes no more, and what it wrote is in the journal.
    stopped.store(true, Ordering::Release);
    writing.join().map_err(|_| "the device panicked")?;
    let report = precopy.stop_copy()?.commit(&DeviceState::none())?;
    receiving.join().map_err(|_| "the destination panicked")??;

    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    let equal =
        (0..PAGES).all(|page| here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b);
    assert!(equal, "memory differs");
    println!("{}", report.ledger);
    println!("custom_dirty_log: {PAGES} pages arrived equal while a device wrote them");
    Ok(())
}
