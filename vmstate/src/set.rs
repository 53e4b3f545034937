//! The devices of a machine, saved and loaded together.

use multifd_wire::{DescribedSection, SectionHead, SectionId};

use crate::{Description, Device, Error, Saved, device};

/// The devices of a machine: saved in their order, loaded all or none.
///
/// ```
/// use multifd_vmstate::{Devices, Section, layout};
///
/// layout! {
///     /// A latch.
///     pub struct Latch = "latch", version 1 {
///         level: bool;
///     }
/// }
///
/// let mut at_source = Latch { level: true };
/// let saved = Devices::new().with("latch", 0, &mut at_source).save()?;
///
/// let mut here = Latch::default();
/// Devices::new().with("latch", 0, &mut here).load(saved.iter().map(Section::from))?;
/// assert!(here.level);
/// # Ok::<(), multifd_vmstate::Error>(())
/// ```
#[derive(Default)]
pub struct Devices<'d> {
    entries: Vec<Entry<'d>>,
}

struct Entry<'d> {
    name: String,
    instance: u32,
    device: Box<dyn AnyDevice + 'd>,
}

/// A section of a stream, with the bytes between its head and its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// Name in the head.
    pub name: &'a str,
    /// Instance in the head.
    pub instance: u32,
    /// Version in the head.
    pub version: u32,
    /// The bytes.
    pub payload: &'a [u8],
}

impl<'a> Section<'a> {
    /// A section with this head and payload.
    pub fn of(head: &'a SectionHead, payload: &'a [u8]) -> Self {
        let SectionHead { idstr, instance_id, version_id, .. } = head;
        Self { name: idstr, instance: *instance_id, version: *version_id, payload }
    }
}

impl<'a> From<&'a DescribedSection> for Section<'a> {
    fn from(section: &'a DescribedSection) -> Self {
        Self::of(&section.head, &section.payload)
    }
}

impl<'d> Devices<'d> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device under the name that its section has, and a number that tells devices of one
    /// name apart. Names of QEMU's devices are a path and the description's name:
    /// `0000:00:03.0/virtio-net`.
    #[must_use]
    pub fn with<D: Device>(mut self, name: impl Into<String>, instance: u32, device: &'d mut D) -> Self {
        self.add(name, instance, device);
        self
    }

    /// Adds a device.
    pub fn add<D: Device>(&mut self, name: impl Into<String>, instance: u32, device: &'d mut D) {
        let device = Box::new(Slot { device, loaded: None });
        self.entries.push(Entry { name: name.into(), instance, device });
    }

    /// Devices that the guest has not let go of yet, though it was asked to: to be waited for
    /// before they are saved.
    pub fn unplug_pending(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| entry.device.unplug_pending()).map(|entry| entry.name.as_str())
    }

    /// Saves all that have state to be saved, those of higher priority first.
    ///
    /// # Errors
    /// One cannot be saved, or two have the same name and number.
    pub fn save(mut self) -> Result<Vec<DescribedSection>, Error> {
        self.check()?;
        self.entries.sort_by_key(|entry| std::cmp::Reverse(entry.device.about().priority));
        let mut sections = Vec::new();
        for (id, entry) in (1..).zip(&mut self.entries) {
            if !entry.device.needed() {
                continue;
            }
            let saved = entry.device.save()?;
            let description = saved.describe(&entry.name, entry.instance);
            let head = SectionHead {
                id: SectionId(id),
                idstr: entry.name.clone(),
                instance_id: entry.instance,
                version_id: entry.device.about().version,
            };
            sections.push(DescribedSection { head, payload: saved.bytes, description });
        }
        Ok(sections)
    }

    /// Loads all of them, each once, in the order in which the sections come. If one fails, none
    /// has changed.
    ///
    /// # Errors
    /// A section is refused, is of no device here, or is missing.
    pub fn load<'a>(mut self, sections: impl IntoIterator<Item = Section<'a>>) -> Result<(), Error> {
        self.check()?;
        for section in sections {
            let Section { name, instance, version, payload } = section;
            let is_it = |entry: &&mut Entry<'_>| entry.name == name && entry.instance == instance;
            let Some(entry) = self.entries.iter_mut().find(is_it) else {
                let seen = format_args!("a section of instance {instance}");
                return Err(Error::new(name, "", seen, "one of a device that is here"));
            };
            if entry.device.is_loaded() {
                return Err(Error::new(name, "", "a second section", "one"));
            }
            entry.device.load(version, payload)?;
        }
        let missing = |entry: &&Entry<'_>| !entry.device.is_loaded() && entry.device.needed();
        if let Some(entry) = self.entries.iter().find(missing) {
            let expected = format_args!("one of instance {}", entry.instance);
            return Err(Error::new(&entry.name, "", "no section", expected));
        }
        self.entries.into_iter().for_each(|entry| entry.device.commit());
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        let mut names: Vec<_> = self.entries.iter().map(|entry| (&entry.name, entry.instance)).collect();
        names.sort_unstable();
        let twice = names.windows(2).find_map(|pair| match pair {
            [a, b] if a == b => Some(*a),
            _ => None,
        });
        let bad = names.iter().find(|(name, _)| !(1..=255).contains(&name.len()));
        match (twice, bad) {
            (Some((name, instance)), _) => {
                let seen = format_args!("two devices of instance {instance}");
                Err(Error::new(name, "", seen, "numbers that tell them apart"))
            }
            (_, Some((name, _))) => {
                let seen = format_args!("a name of {} bytes", name.len());
                Err(Error::new("devices", "", seen, "1..=255"))
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Devices<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|entry| (&entry.name, entry.instance))).finish()
    }
}

/// A device without its type.
trait AnyDevice {
    fn about(&self) -> &'static Description;
    fn needed(&self) -> bool;
    fn unplug_pending(&self) -> bool;
    fn save(&mut self) -> Result<Saved, Error>;
    fn load(&mut self, version: u32, payload: &[u8]) -> Result<(), Error>;
    fn is_loaded(&self) -> bool;
    fn commit(self: Box<Self>);
}

/// A device, and what will take its place.
struct Slot<'d, D> {
    device: &'d mut D,
    loaded: Option<D>,
}

impl<D: Device> AnyDevice for Slot<'_, D> {
    fn about(&self) -> &'static Description {
        const { &D::DESCRIPTION }
    }

    fn needed(&self) -> bool {
        self.device.needed()
    }

    fn unplug_pending(&self) -> bool {
        self.device.unplug_pending()
    }

    fn save(&mut self) -> Result<Saved, Error> {
        device::save(self.device)
    }

    fn load(&mut self, version: u32, payload: &[u8]) -> Result<(), Error> {
        self.loaded = Some(device::loaded(self.device, version, payload)?);
        Ok(())
    }

    fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    fn commit(self: Box<Self>) {
        if let Some(loaded) = self.loaded {
            *self.device = loaded;
        }
    }
}
