//! Threads that wait for pages: of this process, and of those that share the memory.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::slice::Waiter;
use super::{BlockSink, Pager, Wanted, wake};
use crate::destination::sharing::SharedFault;
use crate::error::{Error, Phase, Result};

impl Pager {
    /// A thread waits at this address: what is to be asked for, if anything. False: ask again when
    /// events have been read.
    pub(crate) fn on_fault(&self, address: u64, thread: u32) -> Result<(Option<Wanted>, bool)> {
        let outside =
            || Error::bug(Phase::Active, format_args!("a fault at {address:#x}, outside of all blocks"));
        let (block, sink) = self.block_at(address).ok_or_else(outside)?;
        let (wanted, again) = self.on_wait(block, sink, address, Waiter::Thread(thread))?;
        Ok((wanted, again.is_none()))
    }

    /// The same of a thread of another process; gives back what is to be asked again.
    pub(crate) fn on_shared_fault(
        &self,
        fault: SharedFault,
    ) -> Result<(Option<Wanted>, Option<SharedFault>)> {
        let address = fault.here();
        let Some((block, sink)) = self.block_at(address) else {
            fault.fill();
            return Ok((None, None));
        };
        let (wanted, again) = self.on_wait(block, sink, address, Waiter::Shared(fault))?;
        match again {
            Some(Waiter::Shared(fault)) => Ok((wanted, Some(fault))),
            _ => Ok((wanted, None)),
        }
    }

    /// The block that this address is in, and its place in the order of addresses.
    fn block_at(&self, address: u64) -> Option<(usize, &Arc<BlockSink>)> {
        let at_or_before = self.blocks.partition_point(|sink| sink.block().memory().address() <= address);
        let index = at_or_before.checked_sub(1)?;
        let sink = self.blocks.get(index)?;
        let paged = sink.paged().ok()?;
        (address - paged.address < paged.len).then_some((index, sink))
    }

    fn on_wait(
        &self,
        block: usize,
        sink: &BlockSink,
        address: u64,
        waiter: Waiter,
    ) -> Result<(Option<Wanted>, Option<Waiter>)> {
        let paged = sink.paged()?;
        let outside = |error| Error::bug(Phase::Active, format_args!("a fault at {address:#x}: {error}"));
        let host = usize::try_from(address - paged.address).map_err(outside)? / paged.host_page;
        let first = host * paged.per();
        if sink.has_come(first) {
            let done = self.fault_on_dropped(sink, paged, host)?;
            if done {
                waiter.wake(paged.at(host), paged.host_page as u64);
            }
            return Ok((None, (!done).then_some(waiter)));
        }
        let slice = self.slice(paged, host)?;
        slice.note_waiting(paged.at(host), waiter);
        let asked_first = paged.requested.insert(host);
        fence(Ordering::SeqCst);
        if sink.has_come(first) {
            self.answered(slice, paged, host);
            wake(slice, paged, host);
            return Ok((None, None));
        }
        Ok((asked_first.then(|| Self::wanted(block, paged, host)), None))
    }
}
