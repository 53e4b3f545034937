//! Devices whose back-ends write guest memory behind the VMM's back, in a vhost-user process or in
//! the kernel: their log, and their life around a migration. Needs the feature `vhost`.
//! docs/vhost.md tells the rules and the order.
//!
//! ```text
//!  VhostDevices ── the devices of a guest, the memory they see        the embedder's handle
//!    ├─ VhostDevice ── rings, features; start, stop, state            one a back-end
//!    │    └─ VhostFrontEnd ── VhostUser (messages) · VhostKernel (system calls)
//!    └─ VhostLog ── a DirtyLog over the SharedLog                     the migration's handle
//!  VhostPostcopy ── back-ends that fault on memory which comes by post-copy   a destination's
//! ```

mod announce;
mod back_end_state;
mod device;
mod devices;
mod dirty_log;
mod error;
mod front_end;
mod kernel;
mod life;
mod message;
mod postcopy;
mod region;
mod shared_log;
mod state;
mod sys;
mod user;

pub use announce::Announcement;
pub use device::{RingEvents, VhostDevice};
pub use devices::VhostDevices;
pub use dirty_log::VhostLog;
pub use error::VhostError;
pub use front_end::VhostFrontEnd;
pub use kernel::VhostKernel;
pub use postcopy::VhostPostcopy;
pub use region::VhostRegion;
pub use shared_log::SharedLog;
pub use state::{Inflight, InflightState, Ring, VhostState};
pub use user::VhostUser;

pub use ::vhost;
pub use vmm_sys_util::eventfd::EventFd;
