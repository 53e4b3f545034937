//! Layouts of the devices of QEMU's x86 machines, as QEMU 10.0 writes them: docs/devices.md. Names
//! of fields are QEMU's, so that its own description of a stream can be compared with these.

mod acpi;
mod ahci;
mod clocks;
mod cpu;
mod dma;
mod fdc;
mod fw_cfg;
mod hpet;
mod ich9;
mod ide;
mod interrupts;
mod keyboard;
mod machine;
mod msix;
mod pci;
mod pcie;
mod piix;
mod pit;
mod rtc;
mod scsi;
mod serial;
mod vapic;

pub use acpi::*;
pub use ahci::*;
pub use clocks::*;
pub use cpu::*;
pub use dma::*;
pub use fdc::*;
pub use fw_cfg::*;
pub use hpet::*;
pub use ich9::*;
pub use ide::*;
pub use interrupts::*;
pub use keyboard::*;
pub use machine::*;
pub use msix::*;
pub use pci::*;
pub use pcie::*;
pub use piix::*;
pub use pit::*;
pub use rtc::*;
pub use scsi::*;
pub use serial::*;
pub use vapic::*;
