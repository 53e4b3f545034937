//! What goes next over a link of a post-copy: pages that are asked for, their neighbours, the
//! background stream.

use std::sync::{Arc, Mutex};

use multifd_transports::Pacer;

use crate::error::{Error, Phase, Result};
use crate::guest::DirtyBitmap;
use crate::run::counters::Counters;
use crate::run::stop::lock;
use crate::source::shared::SourceShared;
use crate::work::{BlockIndex, PerBlock, ScanPlace, UrgentPages};

/// Where the background stream is: all threads that send it claim from here, and go on behind the
/// page that was asked for last.
pub(in crate::source) struct Scan(Mutex<ScanPlace>);

/// Why pages go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// They were asked for.
    Asked,
    /// They were asked for, and had gone before, behind others.
    Again,
    /// Those before them were asked for in order.
    Neighbours,
}

/// Pages of one block that go before their turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    pub(super) block: BlockIndex,
    pub(super) why: Why,
}

/// Pages that go before their turn over one link.
pub(super) struct Wanted {
    shared: Arc<SourceShared>,
    scan: Arc<Scan>,
    pacer: Arc<Pacer>,
    /// What has gone over the channels for pages that are asked for. `None`: a page that has gone
    /// is never sent again.
    ///
    /// The background stream's channels are deep: a page that was claimed there and is asked for
    /// afterwards may be behind megabytes of others, most of all at the end, when everything has
    /// been claimed and nothing is left to be sent first. It goes again on its own channel, once;
    /// the destination takes the copy that comes first.
    gone: Option<PerBlock<DirtyBitmap>>,
    /// The system may be told to keep little of the background stream.
    short_queues: bool,
}

impl Scan {
    pub(super) fn new(place: ScanPlace) -> Arc<Self> {
        Arc::new(Self(Mutex::new(place)))
    }

    /// The next pages of the background stream, at most `most`, but one host page at least. `None`:
    /// nothing is left.
    pub(super) fn claim(
        &self,
        shared: &SourceShared,
        most: usize,
        pages: &mut Vec<usize>,
    ) -> Option<BlockIndex> {
        shared.ram.host_pages.claim(&mut lock(&self.0), most, pages)
    }
}

impl Wanted {
    /// `again`: pages that have gone in the background go once more when they are asked for.
    pub(super) fn new(shared: &Arc<SourceShared>, scan: &Arc<Scan>, pacer: &Arc<Pacer>, again: bool) -> Self {
        let gone = again.then(|| shared.ram.dirty.map(|dirty| DirtyBitmap::new(dirty.pages())));
        let (shared, scan, pacer) = (Arc::clone(shared), Arc::clone(scan), Arc::clone(pacer));
        Self { shared, scan, pacer, gone, short_queues: false }
    }

    /// `may`: the system may be told to keep little of the background stream before it leaves.
    pub(super) fn with_short_queues(self, may: bool) -> Self {
        Self { short_queues: may, ..self }
    }

    pub(super) fn has_short_queues(&self) -> bool {
        self.short_queues
    }

    pub(super) fn shared(&self) -> &SourceShared {
        &self.shared
    }

    pub(super) fn scan(&self) -> &Arc<Scan> {
        &self.scan
    }

    pub(super) fn pacer(&self) -> &Arc<Pacer> {
        &self.pacer
    }

    fn urgent(&self) -> Result<&UrgentPages> {
        let urgent = self.shared.urgent.get();
        urgent.ok_or_else(|| Error::bug(Phase::Postcopy, "no queue for wanted pages"))
    }

    /// True if nothing is wanted.
    pub(super) fn is_empty(&self) -> bool {
        self.shared.urgent.get().is_none_or(UrgentPages::is_empty)
            && self.shared.neighbours.get().is_none_or(|neighbours| neighbours.is_empty())
    }

    /// The page that was asked for first; without one, neighbours. `None`: nothing is wanted.
    pub(super) fn claim(&self, pages: &mut Vec<usize>) -> Result<Option<Before>> {
        let (urgent, host_pages) = (self.urgent()?, &self.shared.ram.host_pages);
        let gone = self.gone.as_ref();
        if let Some((block, behind, owed)) = host_pages.claim_wanted(urgent, gone, pages) {
            *lock(&self.scan.0) = behind;
            let why = if owed { Why::Asked } else { Why::Again };
            return Ok(Some(Before { block, why }));
        }
        let Some(neighbours) = self.shared.neighbours.get() else { return Ok(None) };
        while let Some(run) = neighbours.next() {
            if host_pages.claim_run(run.block, run.pages, gone, pages) {
                return Ok(Some(Before { block: run.block, why: Why::Neighbours }));
            }
        }
        Ok(None)
    }

    /// They have been sent, in so many bytes.
    pub(super) fn sent(&self, before: Before, pages: &[usize], bytes: usize) {
        self.charge(bytes);
        self.note_sent(before, pages);
    }

    /// So many bytes went before their turn: they count, but have not waited.
    pub(super) fn charge(&self, bytes: usize) {
        self.pacer.charge(bytes);
    }

    /// They have been sent.
    pub(super) fn note_sent(&self, before: Before, pages: &[usize]) {
        let counters = &self.shared.session.counters;
        match before.why {
            Why::Asked => {}
            Why::Again => Counters::add(&counters.pages_repeated, pages.len()),
            Why::Neighbours => Counters::add(&counters.neighbours_pushed, pages.len()),
        }
    }

    /// They have not been sent.
    pub(super) fn put_back(&self, before: Before, pages: &[usize]) {
        if before.why != Why::Again {
            self.shared.ram.host_pages.put_back(before.block, pages);
        }
    }
}
