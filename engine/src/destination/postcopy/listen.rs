//! From the announcement of a post-copy to LISTEN: what memory must be like, and how it is armed.

use std::sync::Arc;

use multifd_wire::Advise;

use super::Guest;
use super::serving::Serving;
use crate::destination::place::{BlockSinks, Pager};
use crate::destination::return_path::ReturnPath;
use crate::destination::shared::DestinationShared;
use crate::error::{Error, Phase, Result};

/// ADVISE: checks that this machine can be the destination of a post-copy at all, and the processes
/// that share the guest's memory.
pub(in crate::destination) fn check_kernel(shared: &DestinationShared, guest: Guest) -> Result<()> {
    match guest {
        Guest::NoPostcopy | Guest::AtRest => Ok(()),
        Guest::Here => {
            Pager::check_kernel()?;
            shared.sharing.as_ref().map_or(Ok(()), |sharing| sharing.advise())
        }
    }
}

/// Checks that pages can follow their guest into this memory, while the source can still go back.
pub(in crate::destination) fn check_memory(
    shared: &DestinationShared,
    sinks: &BlockSinks,
    advise: Advise,
    guest: Guest,
) -> Result<()> {
    tracing::debug!(?advise, ?guest, blocks = sinks.len(), "the source may switch to post-copy");
    if guest != Guest::Here {
        // Pages come one after the other, whatever pages the source's host has.
        return Ok(());
    }
    let here = Pager::check(sinks)?;
    check_shared(shared, sinks)?;
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

/// What other processes share must be memory that comes.
fn check_shared(shared: &DestinationShared, sinks: &BlockSinks) -> Result<()> {
    let Some(sharing) = &shared.sharing else { return Ok(()) };
    for (address, len, name) in sharing.memory() {
        let comes = sinks.all().any(|sink| {
            let (memory, used) = (sink.block().memory(), sink.block().used_len());
            let within = address.checked_sub(memory.address());
            within.and_then(|within| within.checked_add(len)).is_some_and(|end| end <= used)
        });
        if !comes {
            let detail =
                format!("{name} is shared with back-ends, and is in none of the source's RAM blocks");
            return Err(Error::incompatible(Phase::Setup, detail));
        }
    }
    Ok(())
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
        Guest::Here => {
            shared.sharing.as_ref().map_or(Ok(()), |sharing| sharing.listen())?;
            Some(Arc::new(Pager::arm(sinks, &shared.session, shared.fault_threads)?))
        }
    };
    Ok(Serving::new(shared, sinks, pager, return_path))
}
