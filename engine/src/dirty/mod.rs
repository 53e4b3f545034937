//! Where writes to guest memory are noted while it moves.

pub mod conformance;

#[cfg(feature = "kvm")]
mod kvm;
mod log;
mod region;
mod request;
mod set;
mod software;
mod userfault;

#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmSlot};
pub use log::{DirtyLog, DirtyLogError};
pub use region::RegionLog;
pub use software::{DirtyMarker, SoftwareLog};
pub use userfault::UserfaultLog;

pub(crate) use set::LogSet;
#[cfg(feature = "vhost")]
pub(crate) use software::place_of;
