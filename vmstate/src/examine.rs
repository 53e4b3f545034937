//! Sections that another program saved, taken apart and checked.

use std::fmt;

use multifd_wire::DeviceDescription;

use crate::devices::*;
use crate::virtio::{
    Balloon, Blk, Console, Kind, Net, NetMultiqueue, Rng, Scsi, Transport, VirtioDevice, VirtioMmio,
    VirtioPci, Vsock,
};
use crate::{Device, Error, Section, load, save};

/// The RAM of the guest, as far as it can be looked into.
pub trait GuestRam {
    /// Whether all of these bytes are RAM; `None`: that is not known.
    fn holds(&self, address: u64, len: u64) -> Option<bool>;

    /// A little-endian number in it; `None` if it cannot be read.
    fn read_u16(&self, address: u64) -> Option<u16>;
}

/// RAM of which nothing is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnknownRam;

impl GuestRam for UnknownRam {
    fn holds(&self, _address: u64, _len: u64) -> Option<bool> {
        None
    }

    fn read_u16(&self, _address: u64) -> Option<u16> {
        None
    }
}

/// A section that a description of this crate fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// What its bytes consist of.
    pub description: DeviceDescription,
    /// What fields mean.
    pub notes: Vec<Remark>,
    /// What is inconsistent.
    pub findings: Vec<Remark>,
}

/// Something that is said of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The field: `queue[1].size`.
    pub field: String,
    /// What is said.
    pub text: String,
}

impl Remark {
    pub(crate) fn new(field: impl Into<String>, text: impl Into<String>) -> Self {
        Self { field: field.into(), text: text.into() }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.text)
    }
}

/// A device that can say more of its state than its fields do.
pub trait Examine: Device + PartialEq {
    /// What fields mean.
    fn notes(&self) -> Vec<Remark> {
        Vec::new()
    }

    /// What is inconsistent, also with RAM.
    fn findings(&self, ram: &dyn GuestRam) -> Vec<Remark> {
        let _ = ram;
        Vec::new()
    }
}

/// Takes a section apart by the description that its name tells; `None` if there is none here.
///
/// # Errors
/// No description of that name fits the bytes, or they would not be the same if they were saved
/// again.
pub fn examine(section: Section<'_>, ram: &dyn GuestRam) -> Option<Result<Examined, Error>> {
    let kind = section.name.rsplit('/').next()?;
    simple(kind, section, ram).or_else(|| virtio(kind, section, ram))
}

macro_rules! known {
    ($($Device:ident)*) => {
        /// Names of all descriptions that [`examine`] knows, virtio apart.
        pub fn known() -> Vec<&'static str> {
            vec![$($Device::DESCRIPTION.name,)*]
        }

        fn simple(kind: &str, section: Section<'_>, ram: &dyn GuestRam) -> Option<Result<Examined, Error>> {
            $(
                if kind == $Device::DESCRIPTION.name {
                    return Some(fits($Device::default(), section, ram));
                }
            )*
            None
        }
    };
}

known! {
    AcpiGed AcpiTables Apic Cpu CpuCommon Dma FloppyController FwCfg GlobalState GuestClock Hpet I2cBus I440fx
    Ich9Ahci Ich9Lpc Ich9Smb Ide IoApic KeyboardController KvmClock KvmVapic Mch PciBus PciHost PcieRootPort Pic Piix3
    Piix4Pm Pit Port92 Ps2Keyboard Ps2Mouse Rtc ScsiDisk Serial Speaker VmMouse
}

macro_rules! without_remarks {
    ($($Device:ident)*) => { $(impl Examine for $Device {})* };
}

without_remarks! {
    AcpiGed AcpiTables CpuCommon Dma FloppyController FwCfg I2cBus I440fx Ich9Ahci Ich9Lpc Ich9Smb Ide
    KeyboardController KvmVapic Mch PciBus PciHost PcieRootPort Pic Piix3 Piix4Pm Port92 Ps2Keyboard Ps2Mouse ScsiDisk
    Speaker VmMouse
}

/// Loads the section into `device`, and saves it again to see that nothing of it is lost.
fn fits<D: Examine>(mut device: D, section: Section<'_>, ram: &dyn GuestRam) -> Result<Examined, Error> {
    load(&mut device, section.version, section.payload)?;
    let (notes, findings) = (device.notes(), device.findings(ram));
    let saved = save(&mut device)?;
    let same = D::DESCRIPTION.version != section.version || saved.bytes == section.payload;
    if !same {
        let at = saved.bytes.iter().zip(section.payload).take_while(|(a, b)| a == b).count();
        let seen = format!("byte {at} of {} is lost by the description", section.payload.len());
        return Err(Error::new(D::DESCRIPTION.name, "", seen, "none"));
    }
    Ok(Examined { description: saved.describe(section.name, section.instance), notes, findings })
}

fn virtio(kind: &str, section: Section<'_>, ram: &dyn GuestRam) -> Option<Result<Examined, Error>> {
    fn any<K: Kind>(kinds: Vec<K>, section: Section<'_>, ram: &dyn GuestRam) -> Result<Examined, Error> {
        let mut first = None;
        for kind in kinds {
            if section.name.starts_with("virtio-mmio@") {
                match fits(on(VirtioMmio::default(), &kind), section, ram) {
                    Ok(examined) => return Ok(examined),
                    Err(error) => first = first.or(Some(error)),
                }
                continue;
            }
            for len in [PciDevice::CONVENTIONAL, PciDevice::EXPRESS] {
                match fits(on(VirtioPci::of_len(len), &kind), section, ram) {
                    Ok(examined) => return Ok(examined),
                    Err(error) => first = first.or(Some(error)),
                }
            }
        }
        Err(first.unwrap_or_else(|| Error::new(section.name, "", "no form of it", "one")))
    }
    fn on<T: Transport, K: Kind>(transport: T, kind: &K) -> VirtioDevice<T, K> {
        VirtioDevice { transport, core: Default::default(), kind: kind.clone() }
    }
    Some(match kind {
        "virtio-balloon" => any(vec![Balloon::default()], section, ram),
        "virtio-blk" => any(vec![Blk::default(), Blk { packed: true, ..Blk::default() }], section, ram),
        "virtio-console" => any(vec![Console::default()], section, ram),
        "virtio-net" => {
            let several = Net { multiqueue: Some(NetMultiqueue::default()), ..Net::default() };
            any(vec![Net::default(), several], section, ram)
        }
        "virtio-rng" => any(vec![Rng], section, ram),
        "virtio-scsi" => any(vec![Scsi], section, ram),
        "virtio-vhost_vsock" => any(vec![Vsock], section, ram),
        _ => return None,
    })
}

impl Examine for Apic {
    fn notes(&self) -> Vec<Remark> {
        let enabled = if self.spurious_vec & 0x100 != 0 { "enabled" } else { "disabled" };
        let vector = self.spurious_vec & 0xff;
        let next = |time: i64| if time < 0 { "not armed".to_owned() } else { format!("{time} ns") };
        vec![
            Remark::new("spurious_vec", format!("{enabled}, spurious vector {vector:#x}")),
            Remark::new("timer_expiry", next(self.timer_expiry)),
        ]
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        // Exceptions have the vectors below 16, which no interrupt can be of.
        let of_exception = |name: &str, map: &[u32; 8]| {
            let low = map.first().map_or(0, |word| word & 0xffff);
            (low != 0).then(|| {
                Remark::new(format!("{name}[0]"), format!("{low:#x}: interrupts of vectors below 16"))
            })
        };
        [of_exception("irr", &self.irr), of_exception("isr", &self.isr)].into_iter().flatten().collect()
    }
}

impl Examine for Cpu {
    fn notes(&self) -> Vec<Remark> {
        let mode = match (self.efer & 1 << 10 != 0, self.cr0 & 1 != 0) {
            (true, _) => "long mode",
            (false, true) => "protected mode",
            (false, false) => "real mode",
        };
        let paging = if self.cr0 >> 31 & 1 != 0 { "paging" } else { "no paging" };
        vec![Remark::new("env.cr[0]", format!("{mode}, {paging}"))]
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        let mut findings = Vec::new();
        if self.efer & 1 << 10 != 0 && self.cr0 >> 31 & 1 == 0 {
            findings.push(Remark::new("env.efer", "long mode is active, but paging is off"));
        }
        if self.xcr0 & 1 == 0 {
            findings.push(Remark::new("env.xcr0", format!("{:#x}, without x87 state", self.xcr0)));
        }
        findings
    }
}

impl Examine for GlobalState {
    fn notes(&self) -> Vec<Remark> {
        let text = self.runstate.iter().take_while(|byte| **byte != 0).copied().collect();
        let text = String::from_utf8(text).unwrap_or_else(|_| "no text".to_owned());
        vec![Remark::new("runstate", text)]
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        let len = self.runstate.iter().take_while(|byte| **byte != 0).count() + 1;
        let fits = usize::try_from(self.size).is_ok_and(|size| size == len);
        let wrong = || Remark::new("size", format!("{}, but the run state has {len} bytes", self.size));
        if fits { Vec::new() } else { vec![wrong()] }
    }
}

impl Examine for GuestClock {
    fn notes(&self) -> Vec<Remark> {
        vec![Remark::new("cpu_clock_offset", format!("{} ms", self.cpu_clock_offset / 1_000_000))]
    }
}

impl Examine for KvmClock {
    fn notes(&self) -> Vec<Remark> {
        vec![Remark::new("clock", format!("{} ms", self.clock / 1_000_000))]
    }
}

impl Examine for Hpet {
    fn notes(&self) -> Vec<Remark> {
        let on = if self.config & 1 != 0 { "counts" } else { "does not count" };
        let legacy = if self.config & 2 != 0 { ", replaces PIT and RTC" } else { "" };
        vec![
            Remark::new("config", format!("{on}{legacy}")),
            Remark::new("hpet_counter", format!("{} ms of 10 ns ticks", self.counter / 100_000)),
        ]
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        let wrong = self.timers.iter().zip(0..).find(|(timer, number)| timer.tn != *number);
        let remark = |(timer, number): (&HpetTimer, u8)| {
            Remark::new(format!("timer[{number}].tn"), format!("{}, another timer's number", timer.tn))
        };
        wrong.map(remark).into_iter().collect()
    }
}

impl Examine for IoApic {
    fn notes(&self) -> Vec<Remark> {
        let used = self.ioredtbl.iter().filter(|entry| *entry >> 16 & 1 == 0).count();
        vec![Remark::new("ioredtbl", format!("{used} of {} lines are not masked", self.ioredtbl.len()))]
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        let bad = |(line, entry): (usize, &u64)| {
            let vector = entry & 0xff;
            // Fixed and lowest priority delivery need a vector that is none of an exception.
            let fixed = entry >> 8 & 7 <= 1 && entry >> 16 & 1 == 0;
            let text = format!("not masked, with vector {vector:#x}");
            (fixed && vector < 16).then(|| Remark::new(format!("ioredtbl[{line}]"), text))
        };
        self.ioredtbl.iter().enumerate().filter_map(bad).collect()
    }
}

impl Examine for Pit {
    fn notes(&self) -> Vec<Remark> {
        let rate = |(number, channel): (usize, &PitChannel)| {
            let hz = 1_193_182_i32.checked_div(channel.count).unwrap_or(0);
            let text = format!("{hz} Hz, mode {}", channel.mode);
            Remark::new(format!("channels[{number}].count"), text)
        };
        self.channels.iter().enumerate().map(rate).collect()
    }

    fn findings(&self, _ram: &dyn GuestRam) -> Vec<Remark> {
        let bad = |(number, channel): (usize, &PitChannel)| {
            let count = (0..=0x10000).contains(&channel.count);
            let text = format!("{}, a counter has 1 to 65536", channel.count);
            (!count).then(|| Remark::new(format!("channels[{number}].count"), text))
        };
        self.channels.iter().enumerate().filter_map(bad).collect()
    }
}

impl Examine for Rtc {
    fn notes(&self) -> Vec<Remark> {
        let century = |index: usize| self.cmos.get(index).copied().unwrap_or_default();
        let [second, minute, hour] = [0, 2, 4].map(century);
        let [day, month, year] = [7, 8, 9].map(century);
        let text = format!(
            "{year:02x}-{month:02x}-{day:02x} {hour:02x}:{minute:02x}:{second:02x}, as the guest has it"
        );
        vec![
            Remark::new("cmos_data", text),
            Remark::new("base_rtc", format!("{} s since 1970", self.base_rtc)),
        ]
    }
}

impl Examine for Serial {
    fn notes(&self) -> Vec<Remark> {
        let baud = 115_200_u32.checked_div(self.state.divider.into()).unwrap_or(0);
        vec![Remark::new("state.divider", format!("{baud} baud"))]
    }
}

impl<T: Transport, K: Kind> Examine for VirtioDevice<T, K> {
    fn notes(&self) -> Vec<Remark> {
        self.remarks()
    }

    fn findings(&self, ram: &dyn GuestRam) -> Vec<Remark> {
        self.check(ram)
    }
}
