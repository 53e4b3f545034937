//! Pages placed by a pager: the guest runs, and a page is there as a whole or not at all.
//!
//! ```text
//!  bulk, urgent channels ── put ─> [host page whole?] ─> UFFDIO_COPY ─> came, who waited is counted
//!  fault thread ── fault ─> came? zero or wake : wait for it, ask once
//!               ── removed ─> came (as zeros), under the gate that every placement holds
//! ```
//!
//! RAM is cut into slices, each with a descriptor and a thread that hears of its faults; one slice
//! unless the caller wants more.
//!
//! A page is placed once. That a page has come is noted after it is there; that a thread waits for
//! it, before it is looked whether it has come: one of the two sees the other.

mod block;
mod poison;
mod slice;
mod wait;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use super::{BlockSink, BlockSinks, PlacePages};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Mappings, PAGE, RamBlock};
use crate::os::userfaultfd::{MemoryEvent, MissingPages, Wake};
use crate::run::counters::Counters;
use crate::run::session::Session;
use crate::run::stop::lock;

pub(crate) use block::PagedBlock;
use slice::{Slice, Waiter};

/// Fills the missing pages of all blocks.
pub(crate) struct Pager {
    slices: Vec<Slice>,
    /// In the order of their addresses.
    blocks: Vec<Arc<BlockSink>>,
    /// Where waits are counted.
    session: Arc<Session>,
    wake: Wake,
    /// Memory is being given back, or has been.
    released: AtomicBool,
}

/// A page that is to be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) block: usize,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// Places whole host pages of one block.
struct Placing<'p> {
    missing: &'p MissingPages,
    paged: &'p PagedBlock,
}

impl PlacePages for Placing<'_> {
    fn place(&self, _: &RamBlock, offset: usize, content: &[u8], _: impl FnOnce() -> bool) -> io::Result<()> {
        self.missing.copy(self.paged.address + offset as u64, content)
    }
}

impl Pager {
    /// Checks that a pager can fill the memory of `sinks`. Gives the sizes of its pages, OR-ed.
    pub(crate) fn check(sinks: &BlockSinks) -> Result<u64> {
        let missing = Self::open()?;
        let mappings = mappings()?;
        let mut sizes = 0;
        for sink in sinks.all() {
            let paged = PagedBlock::of(sink.block(), &mappings, 1).map_err(|why| unfit(sink, &why))?;
            sizes |= paged.host_page as u64;
            let range = (paged.address, paged.len);
            missing
                .register(range.0, range.1)
                .and_then(|()| missing.unregister(range.0, range.1))
                .map_err(|error| unfit(sink, "userfaultfd does not take it").because(error))?;
        }
        missing.let_go();
        Ok(sizes)
    }

    /// Checks that there can be a pager at all.
    pub(crate) fn check_kernel() -> Result<()> {
        Self::open().map(|missing| missing.let_go())
    }

    fn open() -> Result<MissingPages> {
        MissingPages::open().map_err(|error| {
            let detail = "the source may switch to postcopy, which needs userfaultfd here (CAP_SYS_PTRACE, /dev/userfaultfd or \
                vm.unprivileged_userfaultfd=1): switch off capability postcopy-ram at the source";
            Error::incompatible(Phase::Setup, detail).because(error)
        })
    }

    /// Drops all pages that have not come, and takes the faults on them, by that many descriptors.
    pub(crate) fn arm(sinks: &BlockSinks, session: &Arc<Session>, slices: usize) -> Result<Self> {
        let mut blocks: Vec<_> = sinks.all().map(Arc::clone).collect();
        blocks.sort_by_key(|sink| sink.block().memory().address());
        let slices = (0..slices.max(1)).map(|_| Self::open().map(Slice::new)).collect::<Result<_>>()?;
        let wake = Wake::new().map_err(|error| Error::io(Phase::Device, "an eventfd", error))?;
        let released = AtomicBool::new(false);
        let pager = Self { slices, blocks, session: Arc::clone(session), wake, released };
        pager.arm_blocks().inspect_err(|_| pager.disarm())?;
        Ok(pager)
    }

    fn arm_blocks(&self) -> Result<()> {
        let mappings = mappings()?;
        for sink in &self.blocks {
            let paged = PagedBlock::of(sink.block(), &mappings, self.slices.len());
            let paged = paged.map_err(|why| unfit(sink, &why))?;
            let failed = |doing: &'static str| {
                move |error| {
                    Error::io(Phase::Device, format!("{doing} of RAM block {}", sink.block().name()), error)
                }
            };
            let memory = sink.block().memory();
            // A huge page in the place of a few that are here would fill the rest with zeros.
            if paged.may_be_huge {
                memory.allow_huge_pages(false).map_err(failed("forbidding huge pages"))?;
            }
            for gap in sink.missing(paged.per())? {
                memory.drop_pages(gap.start * PAGE, gap.len() * PAGE).map_err(failed("dropping pages"))?;
            }
            sink.page_by(paged)?;
            for (slice, (at, len)) in self.parts(sink)? {
                slice.missing.register(at, len).map_err(failed("taking page faults"))?;
            }
        }
        Ok(())
    }

    /// The guest does not come: nothing waits for its pages, and the memory is as it is.
    fn disarm(&self) {
        for (slice, (at, len)) in self.blocks.iter().filter_map(|sink| self.parts(sink).ok()).flatten() {
            // It may never have been registered.
            let _ = slice.missing.unregister(at, len);
        }
        self.slices.iter().for_each(|slice| slice.missing.let_go());
    }

    /// Address and length of what each slice has of the block.
    fn parts(&self, sink: &BlockSink) -> Result<Vec<(&Slice, (u64, u64))>> {
        let paged = sink.paged()?;
        let parts = self.slices.iter().enumerate().map(|(number, slice)| (slice, paged.part_at(number)));
        // A block of a few pages has none in some slices.
        Ok(parts.filter(|(_, (_, len))| *len > 0).collect())
    }

    /// How many descriptors there are, each with its own events.
    pub(crate) fn slices(&self) -> usize {
        self.slices.len()
    }

    fn slice(&self, paged: &PagedBlock, host: usize) -> Result<&Slice> {
        let none = || Error::bug(Phase::Active, "a page of a slice that is not there");
        self.slices.get(paged.slice_of(host)).ok_or_else(none)
    }

    /// A page has come: `None` is zeros.
    pub(crate) fn put(&self, sink: &BlockSink, page: usize, content: Option<&[u8]>) -> Result<()> {
        let paged = sink.paged()?;
        if paged.per() == 1 {
            return self.put_whole(sink, paged, page, content);
        }
        if sink.has_come(page) {
            return Ok(());
        }
        let Some(whole) = paged.gather(page, content)? else {
            // Whole by now, over another channel: what was gathered of this copy would wait for its
            // rest for ever.
            if sink.has_come(page) {
                paged.forget(page / paged.per());
            }
            return Ok(());
        };
        let content = (!whole.zero).then_some(&whole.content[..]);
        self.put_whole(sink, paged, whole.host, content)
    }

    fn put_whole(
        &self,
        sink: &BlockSink,
        paged: &PagedBlock,
        host: usize,
        content: Option<&[u8]>,
    ) -> Result<()> {
        let (first, per) = (host * paged.per(), paged.per());
        let slice = self.slice(paged, host)?;
        loop {
            let gate = slice.placing();
            // Twice, or dropped meanwhile.
            if sink.has_come(first) {
                return Ok(());
            }
            match fill(slice, sink, paged, host, content) {
                Ok(()) => {
                    sink.note_written(first, per);
                    break;
                }
                // Another thread was faster; whether it has woken who waits is its business.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) && is_there(sink, paged, host)? => {
                    sink.note_written(first, per);
                    drop(gate);
                    wake(slice, paged, host);
                    break;
                }
                // Pages are being dropped: the fault thread has to hear of it first.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && !slice.has_stopped() => {
                    drop(gate);
                    std::thread::yield_now();
                }
                Err(error) => return Err(not_placed(sink, paged, host, error)),
            }
        }
        if per > 1 {
            paged.forget(host);
        }
        fence(Ordering::SeqCst);
        if paged.requested.test(host) {
            self.answered(slice, paged, host);
        } else {
            Counters::add(&self.session.counters.pages_pushed, per);
        }
        Ok(())
    }

    /// Who waited for the host page goes on.
    fn answered(&self, slice: &Slice, paged: &PagedBlock, host: usize) {
        let at = paged.at(host);
        let waited = slice.answered(at);
        if waited.is_empty() {
            return;
        }
        waited.iter().for_each(|waiting| waiting.waiter.wake(at, paged.host_page as u64));
        let mut figures = lock(&self.session.counters.faults);
        for waiting in &waited {
            match &waiting.waiter {
                Waiter::Thread(thread) => figures.count(*thread, waiting.waited()),
                Waiter::Shared(fault) => figures.count_shared(fault.name(), waiting.waited()),
            }
        }
    }

    /// Waits for events of a slice, for `limit` if there is one, and notes pages that were dropped.
    /// Gives faults; `None` when it is over.
    pub(crate) fn events(&self, slice: usize, limit: Option<Duration>) -> Result<Option<Vec<MemoryEvent>>> {
        let none = || Error::bug(Phase::Active, "the events of a slice that is not there");
        let slice = self.slices.get(slice).ok_or_else(none)?;
        if slice.missing.wait(&self.wake, limit).map_err(not_heard)? {
            return self.read_events(slice).map(Some);
        }
        Ok(None)
    }

    /// What has happened since the last call. Pages that were dropped are noted.
    fn read_events(&self, slice: &Slice) -> Result<Vec<MemoryEvent>> {
        let mut events = Vec::new();
        let gate = slice.reading();
        slice.missing.read(&mut events).map_err(not_heard)?;
        for event in &events {
            match event {
                MemoryEvent::Removed { start, end } => self.on_removed(slice, *start, *end),
                MemoryEvent::Other(kind) => tracing::warn!(kind, "an event that was not asked for"),
                MemoryEvent::Fault { .. } => {}
            }
        }
        drop(gate);
        Ok(events)
    }

    /// The pages are zero from now on, whatever the source has.
    fn on_removed(&self, slice: &Slice, start: u64, end: u64) {
        for sink in &self.blocks {
            let Ok(paged) = sink.paged() else { continue };
            let (from, to) = (start.max(paged.address), end.min(paged.address + paged.len));
            if from >= to {
                continue;
            }
            let host_page = paged.host_page as u64;
            let index = |bytes: u64| usize::try_from(bytes / host_page).unwrap_or(usize::MAX);
            let first = index((from - paged.address).next_multiple_of(host_page));
            let last = index(to - paged.address);
            for host in first..last {
                sink.note_written(host * paged.per(), paged.per());
                lock(&paged.gathered).retain(|gathered| gathered.host != host);
                if paged.requested.test(host) {
                    self.answered(slice, paged, host);
                    wake(slice, paged, host);
                }
            }
        }
    }

    fn wanted(block: usize, paged: &PagedBlock, host: usize) -> Wanted {
        #[expect(clippy::cast_possible_truncation, reason = "no host page is longer than 1 GiB")]
        let len = paged.host_page as u32;
        Wanted { block, offset: (host * paged.host_page) as u64, len }
    }

    /// A fault on a page that has come: it is there by now, or it was dropped after that.
    fn fault_on_dropped(&self, sink: &BlockSink, paged: &PagedBlock, host: usize) -> Result<bool> {
        let slice = self.slice(paged, host)?;
        match fill(slice, sink, paged, host, None) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && is_there(sink, paged, host)? => {
                wake(slice, paged, host);
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
            Err(error) if lacks_memory(&error) => {
                let why = not_placed(sink, paged, host, error);
                tracing::warn!("a thread waits for a page that was dropped: {}", why.chain());
                Ok(false)
            }
            // Heard of when the block was its own again: giving it back has woken all who waited.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOENT) && self.released.load(Ordering::Acquire) =>
            {
                Ok(true)
            }
            Err(error) => Err(sink.fault("clearing", host * paged.per()..(host + 1) * paged.per(), error)),
        }
    }

    /// Pages that threads wait for, of the block at this place of the order of addresses.
    pub(crate) fn pending(&self) -> Vec<Wanted> {
        let waiting: Vec<u64> = self.slices.iter().flat_map(Slice::waited_for).collect();
        let mut pending = Vec::with_capacity(waiting.len());
        for (block, sink) in self.blocks.iter().enumerate() {
            let Ok(paged) = sink.paged() else { continue };
            let inside = waiting.iter().filter(|at| (paged.address..paged.address + paged.len).contains(at));
            pending.extend(inside.map(|at| {
                let host = usize::try_from(at - paged.address).unwrap_or(usize::MAX) / paged.host_page;
                Self::wanted(block, paged, host)
            }));
        }
        pending
    }

    /// The block of a [`Wanted`].
    pub(crate) fn block(&self, index: usize) -> Option<&RamBlock> {
        self.blocks.get(index).map(|sink| sink.block())
    }

    /// Over a new link, huge pages in the making begin anew.
    pub(crate) fn forget_parts(&self) {
        self.blocks
            .iter()
            .filter_map(|sink| sink.paged().ok())
            .for_each(|paged| lock(&paged.gathered).clear());
    }

    /// Every page is here, or will never be: nothing waits for one any more. The order matters:
    /// while the descriptor is there, memory is taken back from it, and only then it is closed.
    pub(crate) fn release(&self) -> Result<()> {
        self.released.store(true, Ordering::Release);
        for sink in &self.blocks {
            let paged = sink.paged()?;
            for (slice, (at, len)) in self.parts(sink)? {
                let failed = |error| {
                    Error::io(Phase::Active, format!("giving RAM block {} back", sink.block().name()), error)
                };
                slice.missing.unregister(at, len).map_err(failed)?;
                // The kernel wakes who waits before it takes the memory back: a thread that comes
                // in between, to a page that is a hole and came as zeros, would wait for ever.
                slice.missing.wake(at, len).map_err(failed)?;
            }
            if paged.may_be_huge
                && let Err(error) = sink.block().memory().allow_huge_pages(true)
            {
                tracing::debug!(%error, block = %sink.block().name(), "allowing huge pages");
            }
        }
        self.slices.iter().for_each(|slice| slice.missing.let_go());
        self.stop();
        Ok(())
    }

    /// Ends the threads that read events.
    pub(crate) fn stop(&self) {
        self.wake.fire();
    }

    /// Nothing reads events of this slice from now on.
    pub(crate) fn note_stopped(&self, slice: usize) {
        self.slices.iter().skip(slice).take(1).for_each(Slice::note_stopped);
    }
}

fn fill(
    slice: &Slice,
    sink: &BlockSink,
    paged: &PagedBlock,
    host: usize,
    content: Option<&[u8]>,
) -> io::Result<()> {
    let placing = Placing { missing: &slice.missing, paged };
    let offset = host * paged.host_page;
    match content {
        Some(content) => placing.place(sink.block(), offset, content, || false),
        None if paged.per() == 1 => slice.missing.zero(paged.at(host), paged.host_page),
        // Huge pages have no zero page.
        None => placing.place(sink.block(), offset, &vec![0; paged.host_page], || false),
    }
}

fn wake(slice: &Slice, paged: &PagedBlock, host: usize) {
    if let Err(error) = slice.missing.wake(paged.at(host), paged.host_page as u64) {
        tracing::debug!(%error, "waking threads that wait for a page");
    }
}

/// Whether a host page is there, where the kernel has said EEXIST: of huge pages it says so as well
/// when it has none left.
fn is_there(sink: &BlockSink, paged: &PagedBlock, host: usize) -> Result<bool> {
    if paged.per() == 1 {
        return Ok(true);
    }
    let pages = host * paged.per()..(host + 1) * paged.per();
    let resident = sink.block().memory().resident(host * paged.host_page, paged.per());
    let resident = resident.map_err(|error| sink.fault("looking for", pages, error))?;
    Ok(resident.first() == Some(&true))
}

/// Of EEXIST: for a page that is not there.
fn lacks_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC | libc::EEXIST))
}

/// Why a page is not placed, and what the operator can do.
fn not_placed(sink: &BlockSink, paged: &PagedBlock, host: usize, error: io::Error) -> Error {
    let no_memory = lacks_memory(&error);
    let error = sink.fault("placing", host * paged.per()..(host + 1) * paged.per(), error);
    match (no_memory, paged.per()) {
        (false, _) => error,
        (true, 1) => error.noting("this host has no memory left for it: free some, then recover"),
        (true, _) => error.noting(format_args!(
            "no page of {} KiB is left in this host's pool of huge pages: add to nr_hugepages, then recover",
            paged.host_page >> 10
        )),
    }
}

fn not_heard(error: io::Error) -> Error {
    Error::io(Phase::Active, "waiting for page faults", error)
}

fn mappings() -> Result<Mappings> {
    Mappings::read_with_pagers().map_err(|error| Error::io(Phase::Setup, "how guest memory is mapped", error))
}

fn unfit(sink: &BlockSink, why: &str) -> Error {
    let detail = format!(
        "the source may switch to postcopy, but pages cannot follow into RAM block {}: {why}",
        sink.block().name()
    );
    Error::new(ErrorKind::Incompatible, Phase::Setup, detail)
}
