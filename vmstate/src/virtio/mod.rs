//! virtio devices: core, transport and device, saved and loaded in their order.
//!
//! ```text
//!  transport config | status .. config space | queues, each with the transport's part | device | subsections
//!   (Transport)        (Core)                   (Core, Transport)                       (Kind)    (Core)
//! ```
//!
//! The device's part comes before the subsections, so nothing in it may depend on features above
//! the low 32, on ring addresses of a modern driver, or on whether the device is broken: what does
//! is looked at after the whole load, in [`Device::post_load`].

mod blk;
mod check;
mod console;
mod core;
mod kinds;
mod mmio;
mod names;
mod net;
mod pci;
mod subsections;

pub use blk::{Blk, BlkRequest};
pub use console::{Console, ConsolePort, ConsoleState};
pub use core::{Core, Queue};
pub use kinds::{Balloon, BalloonHints, BalloonPoison, BalloonState, Rng, Scsi, Vsock};
pub use mmio::{MmioExtra, MmioQueue, MmioState, VirtioMmio};
pub use names::{DeviceId, Features, Status};
pub use net::{Net, NetMultiqueue, NetRss};
pub use pci::{NO_VECTOR, PciExtra, PciModernState, PciQueue, VirtioPci};
pub use subsections::{
    Broken, DeviceEndian, Disabled, Features64, MAX_QUEUES, PackedRing, PackedRings, RingAddresses, RingSize,
    RingSizes, Rings, Started,
};

use std::fmt::Debug;

use crate::{Description, Device, Error, Fields, Hook, Subsections};

/// How a driver finds the device: what a transport saves.
pub trait Transport: Clone + Debug + Default + PartialEq {
    /// A ring has an alignment of its own, which its driver chose.
    const ALIGNS_RINGS: bool;

    /// Its configuration, before anything else.
    ///
    /// # Errors
    /// What `fields` says.
    fn config(&mut self, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// Its part of a queue, behind the queue's own.
    ///
    /// # Errors
    /// What `fields` says.
    fn queue(&mut self, index: usize, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// Before a load: a stream without `virtio/extra_state` leaves none.
    fn forget_extra_state(&mut self);

    /// Whether there is state in the subsection `virtio/extra_state`.
    fn has_extra_state(&self) -> bool;

    /// That state.
    ///
    /// # Errors
    /// What `fields` says.
    fn extra_state(&mut self, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// The vector that queue `index` signals, if it has one, and how many there are.
    fn vector(&self, index: usize) -> Option<(u16, usize)>;

    /// Entries of queue `index` and where its ring is, as a modern driver has set it up in the
    /// transport's registers; `None` if it has not.
    fn registers(&self, index: usize) -> Option<RingRegisters>;
}

/// A queue as a modern driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingRegisters {
    /// Entries.
    pub size: u16,
    /// Where the descriptors are.
    pub descriptors: u64,
    /// Where the part is that the driver writes.
    pub avail: u64,
    /// Where the part is that the device writes.
    pub used: u64,
}

/// A kind of device: what it saves beside core and transport.
pub trait Kind: Clone + Debug + Default + PartialEq {
    /// Name, as `virtio-net`, and version of the whole section.
    const DESCRIPTION: Description;
    /// What it is to a driver.
    const ID: DeviceId;

    /// Its own part, behind the queues. `core` is loaded but for its subsections.
    ///
    /// # Errors
    /// What `fields` says.
    fn device(&mut self, core: &Core, fields: &mut Fields<'_>) -> Result<(), Error>;

    /// After the whole load, when all features are known.
    ///
    /// # Errors
    /// What is wrong with the state.
    fn loaded(&mut self, core: &Core) -> Hook {
        let _ = core;
        Ok(())
    }
}

/// A virtio device of kind `K` on transport `T`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtioDevice<T, K> {
    /// What the transport has.
    pub transport: T,
    /// What every device has.
    pub core: Core,
    /// What this kind has.
    pub kind: K,
}

impl<T: Transport, K: Kind> Device for VirtioDevice<T, K> {
    const DESCRIPTION: Description = K::DESCRIPTION;

    fn pre_load(&mut self) -> Hook {
        self.core.forget_subsections();
        self.transport.forget_extra_state();
        Ok(())
    }

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        self.transport.config(fields)?;
        self.core.fields(&mut self.transport, fields)?;
        self.kind.device(&self.core, fields)
    }

    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        self.core.subsections(&mut self.transport, subsections)
    }

    fn post_load(&mut self, _version: u32) -> Hook {
        self.core.sanitise()?;
        self.kind.loaded(&self.core)
    }
}
