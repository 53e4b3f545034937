//! From the announcement of a post-copy to LISTEN: what memory must be like, and how it is armed.

use std::sync::Arc;

use multifd_wire::Advise;

use super::Guest;
use super::serving::Serving;
use crate::destination::place::{BlockSinks, Pager};
use crate::destination::return_path::ReturnPath;
use crate::destination::shared::DestinationShared;
use crate::error::{Error, Phase, Result};

/// ADVISE: checks that this machine can be the destination of a post-copy at all.
pub(in crate::destination) fn check_kernel(guest: Guest) -> Result<()> {
    match guest {
        Guest::NoPostcopy | Guest::AtRest => Ok(()),
        Guest::Here => Pager::check_kernel(),
    }
}

/// Checks that pages can follow their guest into this memory, while the source can still go back.
pub(in crate::destination) fn check_memory(sinks: &BlockSinks, advise: Advise, guest: Guest) -> Result<()> {
    tracing::debug!(?advise, ?guest, blocks = sinks.len(), "the source may switch to post-copy");
    if guest != Guest::Here {
        // Pages come one after the other, whatever pages the source's host has.
        return Ok(());
    }
    let here = Pager::check(sinks)?;
    if here == advise.page_sizes {
        return Ok(());
    }
    let detail = format!(
        "the source may switch to postcopy, which needs the same page sizes at both ends: RAM blocks have {} at the source, \
         {} here (sums of bytes)",
        advise.page_sizes, here
    );
    Err(Error::incompatible(Phase::Setup, detail))
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
    let pager = match guest {
        Guest::NoPostcopy | Guest::AtRest => None,
        Guest::Here => Some(Arc::new(Pager::arm(sinks, &shared.session, shared.fault_threads)?)),
    };
    Ok(Serving::new(shared, sinks, pager, return_path))
}
