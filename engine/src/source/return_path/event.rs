//! What a destination says, in terms of the migration.

use std::ops::Range;
use std::time::Duration;

use multifd_wire::{BlockName, Failure, MigrationId, ReturnMessage};

use crate::error::{Error, Phase, Result};
use crate::guest::PAGE;
use crate::run::secret;
use crate::source::outgoing::OutgoingRam;
use crate::work::BlockIndex;

/// A message of the destination that means something to this source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ReturnEvent {
    /// The destination is alive, and not done yet.
    Alive,
    /// The destination has failed. Its refusal follows.
    Failing(Failure),
    /// The destination is multifd, and can do this beyond QEMU's protocol.
    Hello { features: u64 },
    /// What the destination knows this migration by, if it goes on over another link.
    Id(MigrationId),
    /// The destination's half of the secret of a pre-copy that can go on over another link.
    ResumeKey([u8; secret::LEN]),
    /// The destination has loaded the device state, in this time. Its word that the guest has
    /// arrived follows.
    Loaded(Duration),
    /// All before the PING with this value has been dealt with.
    Pong(u32),
    /// The guest at the destination waits for these pages.
    RequestPages { block: BlockIndex, pages: Range<usize> },
    /// The bitmap of this block's pages that have arrived follows.
    Received { block: BlockIndex },
    /// The destination of a post-copy goes on.
    Resumed,
    /// The last message: 0 if the guest has arrived.
    Shut(u32),
    /// The devices are ready for the switchover.
    SwitchoverAck,
    /// A message of a later version of the dialect, which can be left out.
    Unknown,
}

/// Makes events of messages: a request for pages may name the block of the request before.
#[derive(Default)]
pub(super) struct ReturnEvents {
    last_block: Option<BlockIndex>,
}

impl ReturnEvents {
    /// `urgent`: pages may be asked for.
    ///
    /// # Errors
    /// `Incompatible` for messages of a post-copy where there is none; `PeerMisbehaved` for pages
    /// that are not there.
    pub(super) fn event(
        &mut self,
        message: ReturnMessage,
        ram: &OutgoingRam,
        urgent: bool,
    ) -> Result<ReturnEvent> {
        Ok(match message {
            ReturnMessage::Alive => ReturnEvent::Alive,
            ReturnMessage::Extension { .. } => ReturnEvent::Unknown,
            ReturnMessage::Failure(failure) => ReturnEvent::Failing(failure),
            ReturnMessage::Loaded(micros) => ReturnEvent::Loaded(Duration::from_micros(micros)),
            ReturnMessage::Hello(hello) => ReturnEvent::Hello { features: hello.features },
            ReturnMessage::Id(id) => ReturnEvent::Id(id),
            ReturnMessage::ResumeKey(key) => ReturnEvent::ResumeKey(key),
            ReturnMessage::Pong(value) => ReturnEvent::Pong(value),
            ReturnMessage::Shut(status) => ReturnEvent::Shut(status),
            ReturnMessage::SwitchoverAck => ReturnEvent::SwitchoverAck,
            ReturnMessage::RequestPages { block, offset, len } if urgent => {
                let block = self.block(block, ram)?;
                ReturnEvent::RequestPages { block, pages: pages(ram, block, offset, len)? }
            }
            ReturnMessage::RecvBitmap(name) if urgent => {
                let block = ram.find(name.as_str()).ok_or_else(|| {
                    let detail = format!("a bitmap of RAM block {name}, which is not in this guest");
                    Error::misbehaved(Phase::Postcopy, detail)
                })?;
                ReturnEvent::Received { block }
            }
            ReturnMessage::ResumeAck(_) if urgent => ReturnEvent::Resumed,
            other @ (ReturnMessage::Challenge { .. }
            | ReturnMessage::NotKnown
            | ReturnMessage::Standing(_)) => {
                let detail = format!("{other:?}, which is said of a new link before its stream");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            other @ (ReturnMessage::RequestPages { .. }
            | ReturnMessage::RecvBitmap(_)
            | ReturnMessage::ResumeAck(_)) => {
                let detail = format!("{other:?}, but no postcopy is under way");
                return Err(Error::incompatible(Phase::Active, detail));
            }
        })
    }

    fn block(&mut self, name: Option<BlockName>, ram: &OutgoingRam) -> Result<BlockIndex> {
        if let Some(name) = name {
            let block = ram.find(name.as_str());
            self.last_block = Some(block.ok_or_else(|| {
                let detail = format!("a request for pages of RAM block {name}, which is not in this guest");
                Error::misbehaved(Phase::Active, detail)
            })?);
        }
        self.last_block.ok_or_else(|| {
            Error::misbehaved(Phase::Active, "a request for pages that names no RAM block, before any has")
        })
    }
}

/// The pages of a request: whole host pages, at least one, all in the block.
fn pages(ram: &OutgoingRam, block: BlockIndex, offset: u64, len: u32) -> Result<Range<usize>> {
    let outgoing = ram.blocks.at(block);
    let (block, host_page) = (&outgoing.block, outgoing.per_host * PAGE);
    let end = offset.checked_add(u64::from(len)).filter(|end| *end <= block.used_len());
    let page = |at: u64| usize::try_from(at).ok().filter(|at| at % host_page == 0).map(|at| at / PAGE);
    match (page(offset), end.and_then(page)) {
        (Some(first), Some(end)) if first < end => Ok(first..end),
        _ => {
            let detail = format!(
                "a request for {len} bytes at {offset:#x} of RAM block {}, expected whole pages of {host_page:#x} bytes \
                 within {:#x} bytes",
                block.name(),
                block.used_len()
            );
            Err(Error::misbehaved(Phase::Active, detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::source::shared::tests::ram;

    fn request(block: Option<&str>, offset: u64, len: u32) -> ReturnMessage {
        let block = block.map(|name| BlockName::try_from(name).unwrap());
        ReturnMessage::RequestPages { block, offset, len }
    }

    #[test]
    fn a_request_without_a_block_is_for_that_of_the_request_before() {
        let ram = ram(&[("a", 8), ("b", 4)]);
        let mut events = ReturnEvents::default();
        let b = ram.find("b").unwrap();
        let event = events.event(request(Some("b"), 4096, 8192), &ram, true).unwrap();
        assert_eq!(event, ReturnEvent::RequestPages { block: b, pages: 1..3 });
        let event = events.event(request(None, 0, 4096), &ram, true).unwrap();
        assert_eq!(event, ReturnEvent::RequestPages { block: b, pages: 0..1 });
    }

    #[test]
    fn a_request_for_what_is_not_there_is_the_peers_fault() {
        let ram = ram(&[("a", 8)]);
        for message in [
            request(None, 0, 4096),
            request(Some("z"), 0, 4096),
            request(Some("a"), 0, 0),
            request(Some("a"), 1, 4096),
            request(Some("a"), 0, 4097),
            request(Some("a"), 7 * 4096, 8192),
            request(Some("a"), u64::MAX - 4095, 8192),
        ] {
            let error = ReturnEvents::default().event(message.clone(), &ram, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerMisbehaved, "{message:?}");
            assert!(error.to_string().contains("request for"), "{error}");
        }
    }

    #[test]
    fn messages_of_a_postcopy_are_refused_by_name_where_pages_cannot_be_asked_for() {
        let ram = ram(&[("a", 8)]);
        let bitmap = ReturnMessage::RecvBitmap("a".try_into().unwrap());
        let events = &mut ReturnEvents::default();
        let block = ram.find("a").unwrap();
        assert_eq!(events.event(bitmap.clone(), &ram, true).unwrap(), ReturnEvent::Received { block });
        let unknown = ReturnMessage::RecvBitmap("z".try_into().unwrap());
        assert_eq!(events.event(unknown, &ram, true).unwrap_err().kind(), ErrorKind::PeerMisbehaved);
        for message in [request(Some("a"), 0, 4096), bitmap, ReturnMessage::ResumeAck(1)] {
            let name = format!("{message:?}");
            let error = ReturnEvents::default().event(message, &ram, false).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Incompatible);
            assert!(error.to_string().contains(&format!("{name}, but no postcopy is under way")), "{error}");
        }
    }
}
