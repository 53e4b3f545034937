/// What is said of a device's state beside its fields.
///
/// ```
/// use multifd_vmstate::{Description, Priority};
///
/// const HPET: Description = Description::new("hpet", 2).minimum(1);
/// const BRIDGE: Description = Description::new("bridge", 1).priority(Priority::PCI_BUS);
/// const DISK: Description = Description::new("disk", 1).unmigratable("it is on the host's bus");
/// # assert!(HPET.reads(1) && !HPET.reads(3) && BRIDGE.reads(1) && !DISK.reads(2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// Name of the layout, 1..=255 bytes.
    pub name: &'static str,
    /// The version that is written, and the newest that is read.
    pub version: u32,
    /// The oldest version that is read.
    pub minimum: u32,
    /// Among the devices of a machine: those of higher priority are saved and loaded first.
    pub priority: Priority,
    /// Why a device of this kind cannot be saved.
    pub unmigratable: Option<&'static str>,
}

/// Order of devices, highest first. What others depend on when they are loaded has a higher one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(pub u8);

impl Priority {
    /// All that has no reason to come earlier.
    pub const DEFAULT: Self = Self(0);
    /// Address translation of devices.
    pub const IOMMU: Self = Self(1);
    /// Buses behind bridges: their numbers are needed to find a device.
    pub const PCI_BUS: Self = Self(2);
    /// Memory that comes and goes.
    pub const MEMORY: Self = Self(3);
    /// Interrupt controllers that others signal while they are loaded.
    pub const INTERRUPTS: Self = Self(4);
}

impl Description {
    /// A layout that reads its own version and no other.
    pub const fn new(name: &'static str, version: u32) -> Self {
        Self { name, version, minimum: version, priority: Priority::DEFAULT, unmigratable: None }
    }

    /// Reads versions from this one on.
    #[must_use]
    pub const fn minimum(mut self, version: u32) -> Self {
        self.minimum = version;
        self
    }

    /// Comes before devices of lower priority.
    #[must_use]
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Is never saved, for this reason.
    #[must_use]
    pub const fn unmigratable(mut self, reason: &'static str) -> Self {
        self.unmigratable = Some(reason);
        self
    }

    /// Whether state of this version can be loaded.
    pub const fn reads(&self, version: u32) -> bool {
        self.minimum <= version && version <= self.version
    }
}
