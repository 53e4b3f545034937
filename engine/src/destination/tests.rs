//! A guest that does not arrive after all.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use multifd_wire::{BlockEntry, Configuration};

use super::*;
use crate::guest::{HostMemory, PAGE, RamBlock};
use crate::os::userfaultfd::MissingPages;
use crate::source::{DeviceState, Source};

const PAGES: usize = 16;

/// Memory in whose announcement the caller cancels; that this has ended the migration, nothing has
/// been told when RUN comes.
struct Cancelled(Vec<RamBlock>, Arc<Session>);

impl IncomingRam for Cancelled {
    fn open(
        &mut self,
        _: &Configuration,
        _: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        self.1.enter(MigrationState::Cancelling)?;
        Ok(self.0.clone())
    }
}

fn block() -> RamBlock {
    let memory = HostMemory::anonymous(PAGES * PAGE).unwrap();
    memory.slice(0, PAGES * PAGE).unwrap().copy_from(&[7_u8; PAGES * PAGE]);
    RamBlock::new("ram".try_into().unwrap(), memory)
}

#[test]
fn a_cancel_at_the_switch_to_postcopy_leaves_no_memory_that_waits_for_pages() {
    if let Err(error) = MissingPages::open() {
        eprintln!("skipped: userfaultfd: {error}");
        return;
    }
    let (here, there) = (block(), block());
    let (ours, theirs) = Channel::pair().unwrap();
    let destination = Destination::builder(vec![there.clone()]).postcopy(true);
    let mut destination = destination.over(theirs, Vec::new()).unwrap();
    destination.ram = Some(Box::new(Cancelled(vec![there.clone()], Arc::clone(&destination.session))));
    let source = Source::builder(vec![here], Configuration::new("test-10.0"));
    let source = source.paused_guest().postcopy(true).build().unwrap();
    thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let precopy = source.connect_over(ours, Vec::new())?;
            precopy.switch_to_postcopy(&DeviceState::opaque("devices", 1, b"state"))?.serve()
        });
        let error = destination.receive_live().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(serving.join().unwrap().is_err_and(|error| error.source_may_resume()));
    });
    let (read, has_read) = mpsc::channel();
    // Not joined: if it waits for a page, it waits for as long as the process lives.
    let reader = thread::Builder::new().spawn(move || {
        let mut bytes = [0_u8; PAGE];
        for page in 0..PAGES {
            there.memory().slice(page * PAGE, PAGE).unwrap().copy_to(&mut bytes);
        }
        read.send(()).unwrap();
    });
    drop(reader.unwrap());
    assert!(has_read.recv_timeout(Duration::from_secs(60)).is_ok(), "a thread waits for a page");
}
