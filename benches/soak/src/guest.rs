//! What a soak moves.

use multifd_engine::{HostMemory, RamBlock, SourceBuilder};

use crate::Result;
use crate::random::Random;

/// A guest on a host of its own.
pub(crate) trait Guest: Sized {
    /// Its RAM.
    fn blocks(&self) -> Vec<RamBlock>;
    /// Adds logs of what it writes from now on.
    fn log_into(&mut self, source: SourceBuilder, random: &mut Random) -> Result<SourceBuilder>;
    /// Lets it run.
    fn run(&mut self) -> Result<()>;
    /// Waits until it has written again.
    fn wait_for_writes(&self) -> Result<()>;
    /// Returns when nothing writes any more.
    fn pause(&mut self) -> Result<()>;
    /// What of a paused guest goes beside its RAM.
    fn state(&self) -> Result<Vec<u8>>;
    /// The guest that has arrived in `blocks`, paused.
    fn arrive(self, blocks: &[RamBlock], state: &[u8]) -> Result<Self>;
}

/// Memory like that of `blocks` at another host, which held something else.
pub(crate) fn elsewhere(blocks: &[RamBlock]) -> Result<Vec<RamBlock>> {
    let other = |block: &RamBlock| {
        let memory = HostMemory::anonymous(block.memory().len())?;
        if let Some(all) = memory.slice(0, memory.len() / 2) {
            all.copy_from(&vec![0xa5_u8; memory.len() / 2]);
        }
        Ok(RamBlock::new(block.name().clone(), memory))
    };
    blocks.iter().map(other).collect()
}
