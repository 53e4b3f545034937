//! Channels of pages that were asked for (postcopy-preempt): records of RAM without a header.
//! Spec: docs/wire.md §15.3.

use std::sync::Arc;

use multifd_transports::Channel;

use super::serving::Serving;
use crate::destination::ram_reader::{Mark, RamReader};
use crate::destination::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::ChannelCounters;
use crate::run::workers::Crew;
use crate::stream::MainReader;

/// Whether these bytes can begin such a channel: a record begins with the offset of a page, and no
/// guest has 2^48 bytes.
pub(in crate::destination) fn can_begin(first: [u8; 4]) -> bool {
    first.starts_with(&[0, 0])
}

/// Reads pages on a connection that the source has made beside main, on a thread of its own.
///
/// Its first bytes do not say what it is. Until a page of a block that is there has come, it is a
/// stranger's, and its end means nothing. It is a part of link number `link`, and of none that
/// replaces that one.
pub(in crate::destination) fn start(
    channel: Channel,
    link: u64,
    shared: &Arc<DestinationShared>,
    crew: &Crew,
) -> Result<()> {
    shared.check_client(&channel)?;
    let candidate = shared.urgent_candidate()?;
    let channel = shared.session.adopt(channel, Phase::Active)?;
    let shared = Arc::clone(shared);
    crew.spawn("mig-urgent", Phase::Active, move || {
        // Before LISTEN, there is nothing that can be urgent.
        let Ok(serving) = shared.serving() else { return Ok(()) };
        serving.add_urgent(link, channel.closer());
        let counters = shared.session.counters.urgent(&channel);
        let mut reader = MainReader::of_main(Arc::clone(&channel), &shared.session);
        let mut ram = RamReader::of_urgent(&serving);
        let ended = records(&mut reader, &mut ram, &counters, &serving);
        channel.closer().close();
        drop(candidate);
        match ended {
            Ok(()) => {}
            Err(error) if ram.has_placed() => serving.channel_ended(link, Err(error.on("urgent pages"))),
            Err(error) => shared.refusals.note(&error.on(channel.peer())),
        }
        Ok(())
    })
}

/// Until the source ends the channel, between two records. It is silent for as long as the guest
/// waits for nothing.
fn records(
    reader: &mut MainReader,
    ram: &mut RamReader,
    counters: &ChannelCounters,
    serving: &Serving,
) -> Result<()> {
    const WHAT: &str = "an urgent page";
    loop {
        while reader.buffered().is_empty() {
            serving.note_pages();
            match reader.fill(Phase::Active, WHAT) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Deadline => {}
                Err(error) => return Err(error),
            }
        }
        // Machine types up to 7.2 end it by the end of a section, others not at all.
        if ram.read_one(reader, counters)? == Some(Mark::Flush) {
            return Err(Error::misbehaved(Phase::Active, "a sync point among urgent pages"));
        }
    }
}
