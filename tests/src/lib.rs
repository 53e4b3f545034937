//! What the cross-crate tests drive the real QEMU with.
//!
//! ```text
//!   guest, linux      fill                migration
//!   boot sector,      content of          settings, rounds, reports
//!   kernel            guest RAM              |
//!        |              |                    |
//!        +---> qemu <---+--------------------+
//!              one process: RAM file, serial port, qmp
//!                |
//!              process, transcript, scratch         ram: are two memories equal?
//!                |
//!              multifd, checkpoint: our own command, run the same way, and what it leaves on disk
//! ```
//!
//! The page that `multifd tune` writes is looked at in a [`browser`].
//! For what QEMU never does, legal or not, there are the scripted ends in [`peer`].
//!
//! Everything has a deadline, nothing sleeps, and no process outlives its test: each is killed and
//! reaped on drop, and by the kernel if the test itself is killed. A test returns [`Outcome`], and
//! says `skipped: why` (see [`skip!`]) on a machine that lacks what it needs; with
//! `MULTIFD_NO_SKIP` set it fails instead.
//!
//! ```no_run
//! use std::time::Duration; use multifd_tests::{BootSector, Fill, Outcome, Qemu, Scratch, Settings,
//! migration, ram, skip_without_qemu};
//!
//! fn a_guest_moves() -> Outcome {
//!     skip_without_qemu!();
//!     let soon = Duration::from_secs(30);
//!     let scratch = Scratch::new()?;
//!     let floppy = scratch.path("floppy");
//!     BootSector::new().write_floppy(&floppy)?;
//!     let vm = Qemu::builder().machine("q35").floppy(&floppy);
//!     let mut source = vm.clone().fill(Fill::new(1)).spawn("source")?;
//!     let mut destination = vm.incoming("defer").paused().spawn("destination")?;
//!     source.serial().wait_lines(1, 0, soon)?;
//!     let settings = Settings { channels: Some(4), min_rounds: 3, ..Settings::default() };
//!     migration::run(&mut source, &mut destination, &scratch.unix_uri("move"), &settings, soon)?;
//!     ram::check_equal(source.ram(), destination.ram())
//! }
//! # a_guest_moves().unwrap();
//! ```

pub mod authority;
pub mod browser;
pub mod checkpoint;
pub mod compression;
pub mod fill;
pub mod guest;
pub mod inherited;
pub mod linux;
pub mod migration;
pub mod multifd;
pub mod network;
pub mod page;
pub mod peer;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod ram;
pub mod release;
pub mod scratch;
pub mod settings;
pub mod skip;
pub mod transcript;
pub mod usage;
pub mod virtio;

mod cpio;
mod failure;

pub use authority::{Authority, Member};
pub use browser::{Browser, Screen};
pub use checkpoint::CheckpointFiles;
pub use compression::Compression;
pub use failure::{During, Failure, Outcome};
pub use fill::Fill;
pub use guest::BootSector;
pub use inherited::Inherited;
pub use linux::{Linux, LinuxImage};
pub use migration::Report;
pub use multifd::{CommandReport, Multifd, Receive};
pub use network::{Host, Network};
pub use process::Process;
pub use qemu::{Qemu, QemuBuilder};
pub use qmp::Qmp;
pub use release::Release;
pub use scratch::Scratch;
pub use settings::{Settings, Side, ZeroPages};
pub use transcript::Transcript;
pub use usage::Usage;
