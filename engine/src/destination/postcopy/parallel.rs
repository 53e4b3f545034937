//! A parallel channel after the switch: its pages are placed as those on main are. Spec:
//! docs/wire.md §27.10.
//!
//! ```text
//!  before LISTEN   packets into memory ─ SYNC ┐ waits (ChannelSync::hold)
//!  main            ... POSTCOPY_CHANNELS ─────┤ DISCARD.. PACKAGED { LISTEN: memory is armed ┐ .. RUN }
//!  after LISTEN                               └──────────────────────────────────────────────┴ packets to the pager
//! ```
//!
//! All copies of a page that come after the switch are the same, since the guest's memory at the
//! source does not change any more: which of them comes first, over which channel and over which
//! link, makes no difference.

use std::sync::Arc;

use super::serving::Serving;
use crate::destination::place::BlockSink;
use crate::error::{Error, ErrorKind, Phase, Result};

/// A channel's part in a link.
pub(in crate::destination) struct LinkPart {
    serving: Arc<Serving>,
    /// The number of the link.
    link: u64,
}

impl LinkPart {
    pub(super) fn new(serving: &Arc<Serving>, link: u64) -> Self {
        Self { serving: Arc::clone(serving), link }
    }

    /// Puts a page in its place: `None` is zeros. One that is there stays as it is.
    pub(in crate::destination) fn put(
        &self,
        sink: &BlockSink,
        page: usize,
        content: Option<&[u8]>,
    ) -> Result<()> {
        match (self.serving.pager(), content) {
            (Some(pager), content) => pager.put(sink, page, content),
            (None, _) if sink.has_come(page) => Ok(()),
            (None, Some(content)) => sink.write(page, content, &sink.best_place()),
            (None, None) => sink.clear([page]),
        }
    }

    /// Pages have come.
    pub(in crate::destination) fn note_pages(&self) {
        self.serving.note_pages();
    }

    /// The channel has ended, which breaks its link unless all of RAM is here.
    pub(in crate::destination) fn ended(self, result: Result<()>) {
        self.serving.channel_ended(self.link, result);
    }
}

impl Drop for LinkPart {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let detail = "the thread that reads a channel panicked";
            self.serving.break_link_of(self.link, Error::new(ErrorKind::Panicked, Phase::Active, detail));
        }
    }
}
