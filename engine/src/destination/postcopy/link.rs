//! What a destination knows of the link of a post-copy that there is, or was.

use std::collections::BTreeSet;

use multifd_transports::Closer;
use multifd_wire::ReturnMessage;

use crate::destination::place::{Pager, Wanted};
use crate::destination::return_path::ReturnPath;
use crate::error::{Error, Phase, Result};

/// The connections to the source.
pub(super) struct Link {
    pub(super) return_path: ReturnPath,
    /// The connections beside main.
    pub(super) others: Vec<Closer>,
    /// The numbers of parallel channels that have come over a link that was replaced.
    pub(super) channels: BTreeSet<u8>,
    /// It has been hung up.
    pub(super) gone: bool,
    /// How many links there were before.
    pub(super) number: u64,
    /// Pages may be asked for: not while a new link is being set up.
    pub(super) asks: bool,
    /// The block of the last request: the next of the same block need not name it.
    pub(super) last_asked: Option<usize>,
    /// Nothing can go on, over whatever link.
    pub(super) for_good: bool,
    /// Why it is gone, if a channel other than main knows better than main.
    pub(super) broken: Option<Error>,
}

impl Link {
    pub(super) fn new(return_path: &ReturnPath, number: u64, asks: bool) -> Self {
        let return_path = return_path.clone();
        Self {
            return_path,
            others: Vec::new(),
            channels: BTreeSet::new(),
            gone: false,
            number,
            asks,
            last_asked: None,
            for_good: false,
            broken: None,
        }
    }

    /// Another connection beside main.
    pub(super) fn add(&mut self, closer: Closer) {
        if self.gone {
            closer.close();
        } else {
            self.others.push(closer);
        }
    }

    /// Asks for all of `wanted` in one piece.
    pub(super) fn ask(&mut self, pager: &Pager, wanted: &[Wanted]) -> Result<()> {
        let none = || Error::bug(Phase::Active, "a page of a block that is not there");
        let last_asked = &mut self.last_asked;
        let messages = wanted.iter().map(|wanted| {
            let block = pager.block(wanted.block).ok_or_else(none)?;
            let name = (last_asked.replace(wanted.block) != Some(wanted.block)).then(|| block.name().clone());
            Ok(ReturnMessage::RequestPages { block: name, offset: wanted.offset, len: wanted.len })
        });
        let messages: Vec<_> = messages.collect::<Result<_>>()?;
        self.return_path.send_all(Phase::Active, &messages)
    }

    /// It cannot go on: main finds out, and why, if nothing else has said so before.
    pub(super) fn break_off(&mut self, error: Error) {
        self.broken.get_or_insert(error);
        self.asks = false;
        self.return_path.hang_up();
    }
}
