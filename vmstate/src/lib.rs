//! Device state in versions: described once, saved and loaded in the bytes of QEMU's migration
//! stream, with the JSON that describes them. No I/O.
//!
//! ```text
//!  Device::fields ──┬─ save ──> payload of a section, and its layout (vmdescription)
//!  (written once)   └─ load <── payload, checked: versions, lengths, rules, subsections
//!
//!  Devices ── all devices of a machine, in their order, loaded all or none
//!  devices ── layouts of QEMU's devices          virtio ── core, transports, devices, and checks
//! ```
//!
//! An HPET, with all that a description can say:
//!
//! ```
//! use multifd_vmstate::{Description, Device, Error, Fields, Hook, Subsections, Timer, layout, load, save};
//!
//! layout! {
//!     /// One comparator.
//!     pub struct HpetTimer = "hpet_timer", version 1 {
//!         tn: u8;
//!         config: u64;
//!         cmp: u64;
//!         fsb: u64;
//!         period: u64;
//!         wrap_flag: u8;
//!         qemu_timer: Timer;
//!     }
//! }
//!
//! #[derive(Clone, Default)]
//! struct Hpet {
//!     config: u64,
//!     isr: u64,
//!     counter: u64,
//!     num_timers: u8,
//!     timers: Vec<HpetTimer>,
//!     rtc_irq_level: u8,
//! }
//!
//! impl Device for Hpet {
//!     const DESCRIPTION: Description = Description::new("hpet", 2).minimum(1);
//!
//!     fn pre_load(&mut self) -> Hook {
//!         self.num_timers = 3; // Version 1 does not say.
//!         Ok(())
//!     }
//!
//!     fn fields(&mut self, f: &mut Fields<'_>) -> Result<(), Error> {
//!         f.field("config", &mut self.config)?;
//!         f.field("isr", &mut self.isr)?;
//!         f.field("hpet_counter", &mut self.counter)?;
//!         f.since(2, "num_timers_save", &mut self.num_timers)?;
//!         f.validate("num_timers in range", self.num_timers, (3..=32).contains(&self.num_timers))?;
//!         f.counted("timer", &mut self.timers, self.num_timers)
//!     }
//!
//!     fn subsections(&mut self, s: &mut Subsections<'_, '_>) -> Result<(), Error> {
//!         let needed = self.rtc_irq_level != 0;
//!         s.subsection("hpet/rtc_irq_level", 1, needed, |f| f.field("rtc_irq_level", &mut self.rtc_irq_level))
//!     }
//!
//!     fn post_load(&mut self, _version: u32) -> Hook {
//!         match self.timers.iter().zip(0..).find(|(timer, number)| timer.tn != *number) {
//!             Some((timer, number)) => Err(format!("timer {number} says that it is {}", timer.tn)),
//!             None => Ok(()),
//!         }
//!     }
//! }
//!
//! let timers = (0..3).map(|tn| HpetTimer { tn, ..HpetTimer::default() }).collect();
//! let saved = save(&mut Hpet { config: 1, num_timers: 3, timers, ..Hpet::default() })?;
//! let mut hpet = Hpet::default();
//! load(&mut hpet, 2, &saved.bytes)?;
//! assert_eq!((hpet.config, hpet.timers.len()), (1, 3));
//!
//! let mut bad = saved.bytes.clone();
//! bad[24] = 99;
//! let error = load(&mut hpet, 2, &bad).unwrap_err();
//! assert_eq!(error.to_string(), "hpet: num_timers_save: 99, expected num_timers in range");
//! assert_eq!(load(&mut hpet, 3, &saved.bytes).unwrap_err().to_string(), "hpet: version 3, expected 1..=2");
//! # Ok::<(), multifd_vmstate::Error>(())
//! ```
#![forbid(unsafe_code)]

mod description;
mod device;
pub mod devices;
mod error;
pub mod examine;
mod fields;
mod kinds;
mod layout;
mod set;
mod value;
pub mod virtio;

pub use multifd_wire::DescribedSection;

pub use description::{Description, Priority};
pub use device::{Device, Hook, Saved, load, save};
pub use error::Error;
pub use fields::{Fields, Subsections};
pub use kinds::{AtMost, Buffer, Same, Table, Timer, Unused};
pub use set::{Devices, Section};
pub use value::{Number, Value};

/// The first lines that the package shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
