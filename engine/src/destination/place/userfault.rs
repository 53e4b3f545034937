//! Pages placed by a pager: the guest runs, and a page is there as a whole or not at all.
//!
//! ```text
//!  bulk, urgent channels ── put ─> [host page whole?] ─> UFFDIO_COPY ─> came, who waited is counted
//!  fault thread ── fault ─> came? zero or wake : wait for it, ask once
//!               ── removed ─> came (as zeros), under the gate that every placement holds
//! ```
//!
//! A page is placed once. That a page has come is noted after it is there; that a thread waits for
//! it, before it is looked whether it has come: one of the two sees the other.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use super::{BlockSink, BlockSinks, PlacePages};
use crate::destination::postcopy::figures::FaultFigures;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{DirtyBitmap, Mappings, PAGE, RamBlock};
use crate::os::userfaultfd::{MemoryEvent, MissingPages, Wake};
use crate::run::stop::lock;

/// Fills the missing pages of all blocks.
pub(crate) struct Pager {
    missing: MissingPages,
    /// In the order of their addresses.
    blocks: Vec<Arc<BlockSink>>,
    /// Held for reading while a page is placed, for writing while events are read: between the
    /// kernel's word that a page is dropped and our note of it, none may be placed.
    gate: RwLock<()>,
    /// By the address of the host page.
    waiting: Mutex<HashMap<u64, Vec<Waiting>>>,
    figures: Mutex<FaultFigures>,
    wake: Wake,
    /// Nothing reads events any more.
    stopped: AtomicBool,
    /// Memory is being given back, or has been.
    released: AtomicBool,
}

/// What a pager knows of a block.
pub(crate) struct PagedBlock {
    address: u64,
    len: u64,
    /// Bytes.
    host_page: usize,
    /// The kernel may make huge pages of it again.
    may_be_huge: bool,
    /// Host pages that have been asked for.
    requested: DirtyBitmap,
    /// Host pages of which a part has come.
    gathered: Mutex<Vec<Gathered>>,
}

struct Waiting {
    thread: u32,
    since: Instant,
}

/// A huge page in the making.
struct Gathered {
    host: usize,
    content: Vec<u8>,
    here: Vec<bool>,
    zero: bool,
}

/// A page that is to be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) block: usize,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// Huge pages in the making: a source sends one at a time on each channel, of which it has 255 and those for urgent pages.
const MAX_GATHERED: usize = 255 + 9;

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

impl PagedBlock {
    /// What the block is to a pager; an error says why it can be none.
    fn of(block: &RamBlock, mappings: &Mappings) -> Result<Self, String> {
        let paging = mappings.paging(block)?;
        let pages = block.pages() * PAGE;
        if !pages.is_multiple_of(paging.host_page) {
            return Err(format!("its {pages} bytes are no whole number of pages of {}", paging.host_page));
        }
        Ok(Self {
            address: block.memory().address(),
            len: block.used_len(),
            host_page: paging.host_page,
            may_be_huge: paging.may_be_huge,
            requested: DirtyBitmap::new(pages / paging.host_page),
            gathered: Mutex::default(),
        })
    }

    /// Target pages in a host page.
    fn per(&self) -> usize {
        self.host_page / PAGE
    }

    fn at(&self, host: usize) -> u64 {
        self.address + (host * self.host_page) as u64
    }
}

impl Pager {
    /// Checks that a pager can fill the memory of `sinks`. Gives the sizes of its pages, OR-ed.
    pub(crate) fn check(sinks: &BlockSinks) -> Result<u64> {
        let missing = Self::open()?;
        let mappings = mappings()?;
        let mut sizes = 0;
        for sink in sinks.all() {
            let paged = PagedBlock::of(sink.block(), &mappings).map_err(|why| unfit(sink, &why))?;
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

    /// Drops all pages that have not come, and takes the faults on them.
    pub(crate) fn arm(sinks: &BlockSinks) -> Result<Self> {
        let mappings = mappings()?;
        let missing = Self::open()?;
        let mut blocks: Vec<_> = sinks.all().map(Arc::clone).collect();
        blocks.sort_by_key(|sink| sink.block().memory().address());
        for sink in &blocks {
            let paged = PagedBlock::of(sink.block(), &mappings).map_err(|why| unfit(sink, &why))?;
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
            missing.register(paged.address, paged.len).map_err(failed("taking page faults"))?;
            sink.page_by(paged)?;
        }
        let wake = Wake::new().map_err(|error| Error::io(Phase::Device, "an eventfd", error))?;
        Ok(Self {
            missing,
            blocks,
            gate: RwLock::default(),
            waiting: Mutex::default(),
            figures: Mutex::default(),
            wake,
            stopped: AtomicBool::new(false),
            released: AtomicBool::new(false),
        })
    }

    pub(crate) fn figures(&self) -> FaultFigures {
        lock(&self.figures).clone()
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
            // Whole by now, over another channel: what was gathered of this copy would wait for its rest for ever.
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
        loop {
            let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            // Twice, or dropped meanwhile.
            if sink.has_come(first) {
                return Ok(());
            }
            match self.fill(sink, paged, host, content) {
                Ok(()) => {
                    sink.note_written(first, per);
                    break;
                }
                // Another thread was faster; whether it has woken who waits is its business.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    sink.note_written(first, per);
                    drop(gate);
                    self.wake(paged, host);
                    break;
                }
                // Pages are being dropped: the fault thread has to hear of it first.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && !self.has_stopped() => {
                    drop(gate);
                    std::thread::yield_now();
                }
                Err(error) => return Err(sink.fault("placing", first..first + per, error)),
            }
        }
        if per > 1 {
            paged.forget(host);
        }
        fence(Ordering::SeqCst);
        if paged.requested.test(host) {
            self.answered(paged.at(host));
        }
        Ok(())
    }

    fn fill(
        &self,
        sink: &BlockSink,
        paged: &PagedBlock,
        host: usize,
        content: Option<&[u8]>,
    ) -> io::Result<()> {
        let placing = Placing { missing: &self.missing, paged };
        let offset = host * paged.host_page;
        match content {
            Some(content) => placing.place(sink.block(), offset, content, || false),
            None if paged.per() == 1 => self.missing.zero(paged.at(host), paged.host_page),
            // Huge pages have no zero page.
            None => placing.place(sink.block(), offset, &vec![0; paged.host_page], || false),
        }
    }

    fn wake(&self, paged: &PagedBlock, host: usize) {
        if let Err(error) = self.missing.wake(paged.at(host), paged.host_page as u64) {
            tracing::debug!(%error, "waking threads that wait for a page");
        }
    }

    /// Who waited for the host page at this address goes on.
    fn answered(&self, at: u64) {
        let Some(waited) = lock(&self.waiting).remove(&at) else { return };
        let mut figures = lock(&self.figures);
        waited.iter().for_each(|waiting| figures.count(waiting.thread, waiting.since.elapsed()));
    }

    /// Waits for events, and notes pages that were dropped. Gives faults; `None` when it is over.
    pub(crate) fn events(&self) -> Result<Option<Vec<MemoryEvent>>> {
        let failed = |error| Error::io(Phase::Active, "waiting for page faults", error);
        if !self.missing.wait(&self.wake).map_err(failed)? {
            return Ok(None);
        }
        let mut events = Vec::new();
        let gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.missing.read(&mut events).map_err(failed)?;
        for event in &events {
            match event {
                MemoryEvent::Removed { start, end } => self.on_removed(*start, *end),
                MemoryEvent::Other(kind) => tracing::warn!(kind, "an event that was not asked for"),
                MemoryEvent::Fault { .. } => {}
            }
        }
        drop(gate);
        Ok(Some(events))
    }

    /// The pages are zero from now on, whatever the source has.
    fn on_removed(&self, start: u64, end: u64) {
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
                    self.answered(paged.at(host));
                    self.wake(paged, host);
                }
            }
        }
    }

    /// A thread waits at this address: what is to be asked for, if anything. False: ask again when
    /// events have been read.
    pub(crate) fn on_fault(&self, address: u64, thread: u32) -> Result<(Option<Wanted>, bool)> {
        let at_or_before = self.blocks.partition_point(|sink| sink.block().memory().address() <= address);
        let index = at_or_before.checked_sub(1);
        let found = index.and_then(|index| Some((index, self.blocks.get(index)?)));
        let outside =
            || Error::bug(Phase::Active, format_args!("a fault at {address:#x}, outside of all blocks"));
        let (block, sink) = found.ok_or_else(outside)?;
        let paged = sink.paged()?;
        let host = usize::try_from(address - paged.address).unwrap_or(usize::MAX) / paged.host_page;
        if host >= paged.requested.pages() {
            return Err(outside());
        }
        let first = host * paged.per();
        if sink.has_come(first) {
            return self.fault_on_dropped(sink, paged, host).map(|done| (None, done));
        }
        let waiting = Waiting { thread, since: Instant::now() };
        lock(&self.waiting).entry(paged.at(host)).or_default().push(waiting);
        let asked_first = paged.requested.insert(host);
        fence(Ordering::SeqCst);
        if sink.has_come(first) {
            self.answered(paged.at(host));
            self.wake(paged, host);
            return Ok((None, true));
        }
        Ok((asked_first.then(|| Self::wanted(block, paged, host)), true))
    }

    fn wanted(block: usize, paged: &PagedBlock, host: usize) -> Wanted {
        #[expect(clippy::cast_possible_truncation, reason = "no host page is longer than 1 GiB")]
        let len = paged.host_page as u32;
        Wanted { block, offset: (host * paged.host_page) as u64, len }
    }

    /// A fault on a page that has come: it is there by now, or it was dropped after that.
    fn fault_on_dropped(&self, sink: &BlockSink, paged: &PagedBlock, host: usize) -> Result<bool> {
        match self.fill(sink, paged, host, None) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                self.wake(paged, host);
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
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
        let waiting: Vec<u64> = lock(&self.waiting).keys().copied().collect();
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

    /// Every page is here, or will never be: nothing waits for one any more. The order matters: while
    /// the descriptor is there, memory is taken back from it, and only then it is closed.
    pub(crate) fn release(&self) -> Result<()> {
        self.released.store(true, Ordering::Release);
        for sink in &self.blocks {
            let paged = sink.paged()?;
            self.missing.unregister(paged.address, paged.len).map_err(|error| {
                Error::io(Phase::Active, format!("giving RAM block {} back", sink.block().name()), error)
            })?;
            // The kernel wakes who waits before it takes the memory back: a thread that comes in between, to a page that is a hole
            // and came as zeros, would wait for ever.
            self.missing.wake(paged.address, paged.len).map_err(|error| {
                Error::io(
                    Phase::Active,
                    format!("waking threads at RAM block {}", sink.block().name()),
                    error,
                )
            })?;
            if paged.may_be_huge
                && let Err(error) = sink.block().memory().allow_huge_pages(true)
            {
                tracing::debug!(%error, block = %sink.block().name(), "allowing huge pages");
            }
        }
        self.missing.let_go();
        self.stop();
        Ok(())
    }

    /// Ends the thread that reads events.
    pub(crate) fn stop(&self) {
        self.wake.fire();
    }

    /// Nothing reads events from now on.
    pub(crate) fn note_stopped(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    fn has_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

impl PagedBlock {
    /// The host page has come: no part of another copy is kept.
    fn forget(&self, host: usize) {
        lock(&self.gathered).retain(|gathered| gathered.host != host);
    }

    /// Adds a target page; the host page, if that makes it whole.
    fn gather(&self, page: usize, content: Option<&[u8]>) -> Result<Option<Gathered>> {
        let (host, index) = (page / self.per(), page % self.per());
        let mut all = lock(&self.gathered);
        let at = match all.iter().position(|gathered| gathered.host == host) {
            Some(at) => at,
            None if all.len() >= MAX_GATHERED => {
                let detail = format!("parts of more than {MAX_GATHERED} huge pages, expected whole ones");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            None => {
                let (content, here) = (vec![0; self.host_page], vec![false; self.per()]);
                all.push(Gathered { host, content, here, zero: true });
                all.len() - 1
            }
        };
        let none = || Error::bug(Phase::Active, "a huge page in the making is gone");
        let gathered = all.get_mut(at).ok_or_else(none)?;
        let place = gathered.content.get_mut(index * PAGE..(index + 1) * PAGE).ok_or_else(none)?;
        match content {
            Some(content) => place.copy_from_slice(content),
            None => place.fill(0),
        }
        gathered.zero &= content.is_none();
        *gathered.here.get_mut(index).ok_or_else(none)? = true;
        let whole = gathered.here.iter().all(|here| *here);
        Ok(whole.then(|| all.swap_remove(at)))
    }
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
