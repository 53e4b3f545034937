//! Dirty logs that lie, and an audit that finds them out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_codecs::Zstd;
use multifd_engine::{
    Arrived, Coverage, Destination, DeviceState, DirtyBitmap, DirtyLog, DirtyLogError, Error, ErrorKind,
    HostMemory, MissedPages, PAGE, RamBlock, Report, Source, SourceBuilder,
};
use multifd_wire::Configuration;
use vm_memory::Bytes;

use crate::guest::next;

/// A million pages, 4 GiB, of which the guest touches few.
const MILLION: usize = 1_000_000;

/// Reports every page at each sync, but for those that it forgets: a log may report too much.
struct Forgetful {
    forgets: Vec<usize>,
    /// The guest has written.
    active: Arc<AtomicBool>,
}

impl DirtyLog for Forgetful {
    fn name(&self) -> &str {
        "forgetful"
    }

    fn start(&mut self, _: &[RamBlock]) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Whole
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        if self.active.load(Ordering::Relaxed) {
            bitmaps[0].set_range(0, bitmaps[0].pages());
            self.forgets.iter().for_each(|page| _ = bitmaps[0].take(*page));
        }
        Ok(())
    }

    fn stop(&mut self) {}
}

fn block(pages: usize) -> RamBlock {
    RamBlock::new("pc.ram".try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
}

fn write(block: &RamBlock, page: usize, value: u64) {
    block.memory().slice(page * PAGE + 80, 8).unwrap().write_obj(value, 0).unwrap();
}

/// Moves a guest that writes to `written` between two rounds, of which the log forgets some.
fn audited(
    here: &RamBlock,
    forgets: &[usize],
    written: &[usize],
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
) -> Result<Report, Error> {
    let destination =
        Destination::builder(vec![block(here.pages())]).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().and_then(Arrived::accept)).unwrap();
    let active = Arc::new(AtomicBool::new(false));
    let log = Forgetful { forgets: forgets.to_vec(), active: Arc::clone(&active) };
    let source =
        Source::builder(vec![here.clone()], Configuration::new("test-10.0")).dirty_log(log).audit(true);
    let mut precopy = set(source).build()?.connect(&to)?;
    precopy.round()?;
    written.iter().for_each(|page| write(here, *page, u64::MAX));
    active.store(true, Ordering::Relaxed);
    let result = precopy.stop_copy().and_then(|last| last.commit(&DeviceState::none()));
    assert_eq!(receiving.join().unwrap().is_ok(), result.is_ok());
    result
}

type Set = fn(SourceBuilder) -> SourceBuilder;

const WAYS: [Set; 4] = [
    |source| source,
    |source| source.channels(2),
    |source| source.channels(2).codec(Arc::new(Zstd::level(1).unwrap())),
    |source| source.channels(2).xbzrle(1 << 20),
];

#[test]
fn a_log_that_forgets_one_page_in_a_million_is_found_out() {
    for (seed, set) in (1..).zip(WAYS) {
        let here = block(MILLION);
        let mut random = seed;
        let written: Vec<usize> = (0..1000).map(|_| next(&mut random) as usize % MILLION).collect();
        written.iter().step_by(3).for_each(|page| write(&here, *page, 1));
        let forgotten = written[next(&mut random) as usize % written.len()];
        let error = audited(&here, &[forgotten], &written, set).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::GuestMemory, "seed {seed}: {}", error.chain());
        assert!(error.source_may_resume(), "seed {seed}");
        let text = format!("RAM block pc.ram: {forgotten}");
        assert!(error.to_string().ends_with(&text), "seed {seed}, page {forgotten}: {error}");
        let missed = std::error::Error::source(&error).unwrap().downcast_ref::<MissedPages>().unwrap();
        assert_eq!(missed.blocks, [(here.name().clone(), vec![forgotten])], "seed {seed}");
    }
}

#[test]
fn a_log_that_forgets_nothing_passes_the_audit() {
    for set in WAYS {
        let here = block(MILLION / 50);
        let written: Vec<usize> = (0..here.pages()).step_by(7).collect();
        let report = audited(&here, &[], &written, set).unwrap();
        assert_eq!(report.audit.unwrap().pages, here.pages() as u64);
    }
}

/// A page that is written and has the same bytes again was not missed: the destination has it.
#[test]
fn what_is_as_it_was_sent_was_not_missed() {
    let here = block(64);
    write(&here, 5, u64::MAX);
    audited(&here, &[5], &[5], |source| source).unwrap();
    let error = audited(&here, &[5, 6, 7, 9], &[5, 6, 7, 9], |source| source).unwrap_err();
    assert!(error.to_string().contains("3 pages") && error.to_string().ends_with("6..8, 9"), "{error}");
}
