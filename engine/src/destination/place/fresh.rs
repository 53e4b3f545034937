//! Memory that is made for the blocks that a source announces.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use multifd_wire::{BlockEntry, Configuration};

use super::IncomingRam;
use crate::guest::{HostMemory, RamBlock};
use crate::run::stop::lock;

/// Fresh memory for each RAM block that the source announces.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use multifd_engine::{Destination, FreshRam};
///
/// let ram = FreshRam::anonymous();
/// let destination = Destination::builder(ram.clone()).listen(&"tcp:127.0.0.1:0".parse()?)?;
/// // destination.receive()?, then:
/// for block in ram.blocks() {
///     println!("{}: {} bytes", block.name(), block.used_len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct FreshRam {
    make: Arc<dyn Fn(&BlockEntry) -> io::Result<HostMemory> + Send + Sync>,
    blocks: Arc<Mutex<Vec<RamBlock>>>,
}

impl FreshRam {
    /// Private memory.
    pub fn anonymous() -> Self {
        Self::of(|entry| HostMemory::anonymous(usize::try_from(entry.used_len).map_err(io::Error::other)?))
    }

    /// Memory that `make` gives for each block, of `used_len` bytes at least and all zero: of a
    /// memfd, or of huge pages.
    pub fn of(make: impl Fn(&BlockEntry) -> io::Result<HostMemory> + Send + Sync + 'static) -> Self {
        Self { make: Arc::new(make), blocks: Arc::default() }
    }

    /// The blocks that were made, in the source's order; none before it has announced them.
    pub fn blocks(&self) -> Vec<RamBlock> {
        lock(&self.blocks).clone()
    }
}

impl IncomingRam for FreshRam {
    fn open(
        &mut self,
        _configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        let open = |entry: &BlockEntry| Ok(RamBlock::new(entry.name.clone(), (self.make)(entry)?).fresh());
        let blocks = announced.iter().map(open).collect::<io::Result<Vec<_>>>()?;
        lock(&self.blocks).clone_from(&blocks);
        Ok(blocks)
    }
}

impl fmt::Debug for FreshRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FreshRam").field("blocks", &self.blocks()).finish_non_exhaustive()
    }
}
