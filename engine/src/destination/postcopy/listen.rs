//! From the announcement of a post-copy to LISTEN: what memory must be like, and how it is armed.

use std::sync::Arc;

use multifd_wire::Advise;

use super::Guest;
use super::serving::Serving;
use crate::destination::place::BlockSinks;
use crate::destination::return_path::ReturnPath;
use crate::destination::shared::DestinationShared;
use crate::error::Result;

/// Checks that pages can follow their guest into this memory, while the source can still go back.
pub(in crate::destination) fn check_memory(sinks: &BlockSinks, advise: Advise, guest: Guest) -> Result<()> {
    tracing::debug!(?advise, ?guest, blocks = sinks.len(), "the source may switch to post-copy");
    match guest {
        // Pages come one after the other, whatever pages the source's host has.
        Guest::NoPostcopy | Guest::AtRest => Ok(()),
    }
}

/// LISTEN: pages that are not here follow.
pub(in crate::destination) fn arm(
    shared: &Arc<DestinationShared>,
    sinks: &Arc<BlockSinks>,
    guest: Guest,
    return_path: &ReturnPath,
) -> Result<Arc<Serving>> {
    let missing: usize = sinks.gaps().iter().map(|gap| gap.pages).sum();
    tracing::debug!(missing, ?guest, "pages follow the guest");
    Ok(Serving::new(shared, sinks, return_path))
}
