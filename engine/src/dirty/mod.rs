//! Where writes to guest memory are noted while it moves.

pub mod conformance;

mod coverage;
#[cfg(feature = "kvm")]
mod kvm;
mod log;
mod region;
mod set;
mod software;
mod userfault;

pub use coverage::Coverage;
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmSlot, KvmSlots};
pub use log::{DirtyLog, DirtyLogError};
pub use region::RegionLog;
pub use software::{DirtyMarker, SoftwareLog};
pub use userfault::UserfaultLog;

pub(crate) use coverage::Unwritten;
pub(crate) use set::LogSet;
#[cfg(feature = "vhost")]
pub(crate) use software::{bitmap_of, place_of};
