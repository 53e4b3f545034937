//! What never comes is poisoned: threads that need it get a signal instead of waiting.

use std::ops::Range;

use super::slice::Slice;
use super::{PagedBlock, Pager};
use crate::error::{Error, ErrorKind, Phase, Result};

impl Pager {
    /// Whether [`Self::poison_missing`] can be.
    pub(crate) fn can_poison(&self) -> bool {
        self.slices.iter().all(|slice| slice.missing.can_poison())
    }

    /// Poisons what has not come, and gives memory back. Gives the number of pages of the target.
    /// Nothing may be placed any more, and nothing reads events.
    pub(crate) fn poison_missing(&self) -> Result<usize> {
        if !self.can_poison() {
            let detail = "the kernel has no UFFDIO_POISON (Linux 6.6): threads that need a page which has not come wait";
            return Err(Error::new(ErrorKind::Incompatible, Phase::Active, detail));
        }
        let mut poisoned = 0;
        for sink in &self.blocks {
            let paged = sink.paged()?;
            let (per, name) = (paged.per(), sink.block().name());
            for gap in sink.missing(per)? {
                let hosts = gap.start / per..gap.end / per;
                let count = self.poison_hosts(paged, hosts).map_err(|error| {
                    error.noting(format_args!("pages {}..{} of RAM block {name}", gap.start, gap.end))
                })?;
                poisoned += count * per;
            }
        }
        self.release()?;
        Ok(poisoned)
    }

    fn poison_hosts(&self, paged: &PagedBlock, hosts: Range<usize>) -> Result<usize> {
        let (mut host, mut poisoned) = (hosts.start, 0);
        while host < hosts.end {
            let slice = self.slice(paged, host)?;
            let end = paged.part(paged.slice_of(host)).end.min(hosts.end);
            match slice.missing.poison(paged.at(host), ((end - host) * paged.host_page) as u64) {
                Ok(bytes) => {
                    let done = usize::try_from(bytes).unwrap_or(usize::MAX) / paged.host_page;
                    if done == 0 {
                        return Err(Error::bug(Phase::Active, "a part of a page was poisoned"));
                    }
                    (host, poisoned) = (host + done, poisoned + done);
                }
                // It came, or its owner has dropped it and touched it since.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => host += 1,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => self.hear_of_drops(slice)?,
                Err(error) => return Err(Error::io(Phase::Active, "poisoning pages", error)),
            }
        }
        Ok(poisoned)
    }

    /// A thread that drops pages waits until that was read.
    fn hear_of_drops(&self, slice: &Slice) -> Result<()> {
        self.read_events(slice)?;
        std::thread::yield_now();
        Ok(())
    }
}
