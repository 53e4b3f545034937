//! The sending end: a guest's RAM and device state move into any QEMU or multifd destination.
//!
//! ```text
//!  Source::builder ─ connect ─> Precopy ─ round ... ─ stop_copy ─> StopCopy ─ commit ─> Report
//!                                  └─ switch_to_postcopy ─> Postcopy ─ serve, recover, serve ... ─> Report
//!    connect ────── main, the carrier and its workers
//!    migration ──── the connected parts; sections, each with a sync point   on the caller's thread
//!    main_writer ── header, block list, records, device state
//!    carrier ────── how pages leave, one of three:
//!      main ─────── records on the main channel                             on the caller's thread
//!      channels ─── claim pages, encode, one write a packet                 one thread each, `mig-send-N`
//!      file ─────── a plain stream, or pages at fixed places                one thread each, `mig-send-N`
//!    rounds ─────── hands a round to the workers, collects SYNCs
//!    audit ──────── all RAM against what was sent                        threads, `mig-audit-N`
//!    page_cache ─── what the destination holds of hot pages (xbzrle)
//!    zero_copy ──── pages without a copy by the kernel, while it pays
//!    alive ──────── says that this end is alive while the embedder has it     one thread, `mig-alive`
//!    return_path ── what the destination says, as events                    one thread, `mig-return`
//!    resume ─────── another link for a pre-copy whose link broke            on the caller's thread
//!    postcopy ───── the switch, the background stream, recovery              on the caller's thread
//!                   pages that are asked for, with a channel of their own    one thread, `mig-urgent`
//! ```

mod alive;
mod audit;
mod builder;
mod carrier;
mod codec_auto;
mod connect;
mod control;
mod device_state;
mod dialer;
mod main_writer;
mod migration;
mod outgoing;
mod packet;
mod page_cache;
mod pagers;
mod postcopy;
mod precopy;
mod resume;
mod return_path;
mod rounds;
mod shared;
mod zero_copy;

pub use audit::{AuditReport, MissedPages};
pub use builder::{Source, SourceBuilder};
pub use control::Control;
pub use device_state::DeviceState;
pub use outgoing::ZeroPages;
pub use page_cache::XbzrleStats;
pub use postcopy::{Postcopy, Served};
pub use precopy::{Precopy, StopCopy};
pub use zero_copy::{ZeroCopySend, ZeroCopyStats};
