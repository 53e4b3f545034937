use crate::names::checked;
use crate::reader::{Reader, Stop, prefix};
use crate::vmdesc::SUBSECTION;
use crate::writer::put_cstr8;
use crate::{Invalid, ItemType, PageSize, Parsed};

/// The configuration section, straight after the stream header. Spec: docs/wire.md §2.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Configuration {
    /// Full name of the machine type, such as `pc-q35-10.0`: 1..=255 bytes.
    pub machine: String,
    /// Base-two logarithm of the target page size, where the CPU family has more than one (ARM).
    /// 12..=16.
    pub page_bits: Option<u32>,
    /// Capabilities that both sides must have alike, such as `mapped-ram`.
    pub capabilities: Vec<String>,
    /// The VM's uuid, if the source wants it compared.
    pub uuid: Option<[u8; 16]>,
}

/// Type byte of the section.
const CONFIGURATION: u8 = ItemType::Configuration.byte();
/// What the name of each of our subsections begins with.
const PARENT: &[u8] = b"configuration/";
const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";
/// Version of all three subsections.
const SUBSECTION_VERSION: u32 = 1;
/// Most capabilities in the list. QEMU knows two that it would list, and some twenty in all.
const MAX_CAPABILITIES: u32 = 64;
/// Machine families whose names end in the version of QEMU that they were made for.
const VERSIONED_FAMILIES: [&str; 5] = ["pc-q35", "pc-i440fx", "virt", "pseries", "s390-ccw-virtio"];

impl Configuration {
    /// The configuration of a machine that says nothing but its name.
    ///
    /// Names of QEMU's machine types end in a version, which decides how zero pages go and where
    /// sync points are: `pc-q35-10.0`. A VMM's own name says nothing of the kind.
    pub fn new(machine: impl Into<String>) -> Self {
        Self { machine: machine.into(), page_bits: None, capabilities: Vec::new(), uuid: None }
    }

    /// Lists the capabilities that both sides must have alike.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Vec<String>) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// Parses the section from its type byte 0x07 on.
    ///
    /// Nothing counts the subsections: they end where the next thing is not one. So this needs the
    /// byte *after* the section, too (not counted as used), and a few more where that byte is 0x05.
    ///
    /// # Errors
    /// A name or a count beyond its limit, an unknown subsection, or one that comes twice.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, |r| {
            match r.u8()? {
                CONFIGURATION => {}
                seen => return Err(wrong_type(seen).into()),
            }
            let machine = machine_name(r)?.to_owned();
            let mut this = Self::new(machine);
            while own_subsection_follows(r.rest())? {
                this.parse_subsection(r)?;
            }
            Ok(this)
        })
    }

    fn parse_subsection(&mut self, r: &mut Reader<'_>) -> Result<(), Stop> {
        r.u8()?;
        let name = checked("configuration subsection", r.cstr8()?)?;
        let first_time = match name {
            PAGE_BITS => self.page_bits.is_none(),
            CAPABILITIES => self.capabilities.is_empty(),
            UUID => self.uuid.is_none(),
            _ => return Err(Invalid::new("configuration subsection", name, "a known one").into()),
        };
        if !first_time {
            return Err(Invalid::new("configuration subsection", name, "it once").into());
        }
        match r.be32()? {
            SUBSECTION_VERSION => {}
            seen => {
                return Err(Invalid::new("configuration subsection version", seen, SUBSECTION_VERSION).into());
            }
        }
        match name {
            PAGE_BITS => self.page_bits = Some(PageSize::from_bits(r.be32()?)?.bits()),
            CAPABILITIES => self.capabilities = capabilities(r)?,
            _ => self.uuid = Some(r.array()?),
        }
        Ok(())
    }

    /// Appends the section, type byte included.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(CONFIGURATION);
        out.extend(be32_len(self.machine.len()));
        out.extend(self.machine.bytes());
        if let Some(bits) = self.page_bits {
            put_subsection(out, PAGE_BITS);
            out.extend(bits.to_be_bytes());
        }
        if !self.capabilities.is_empty() {
            put_subsection(out, CAPABILITIES);
            out.extend(be32_len(self.capabilities.len()));
            self.capabilities.iter().for_each(|name| put_cstr8(out, name));
        }
        if let Some(uuid) = self.uuid {
            put_subsection(out, UUID);
            out.extend(uuid);
        }
    }

    /// Version of QEMU in the machine type's name: `pc-q35-8.0` gives (8, 0). `None` for names that
    /// carry none, such as those of some distributions (`pc-q35-noble`), and for other VMMs'
    /// machines (`firecracker-1.14`), whose numbers are their own.
    ///
    /// What a source may send depends on it: see docs/wire.md §24.
    pub fn machine_version(&self) -> Option<(u16, u16)> {
        let (family, version) = self.machine.rsplit_once('-')?;
        if !VERSIONED_FAMILIES.contains(&family) {
            return None;
        }
        let mut numbers = version.split('.').map(|number| number.parse().ok());
        match (numbers.next()??, numbers.next()??) {
            version if numbers.all(|number| number.is_some()) => Some(version),
            _ => None,
        }
    }
}

fn wrong_type(seen: u8) -> Invalid {
    Invalid::new("configuration type", format_args!("{seen:#04x}"), "0x07")
}

fn machine_name<'a>(r: &mut Reader<'a>) -> Result<&'a str, Stop> {
    const WHAT: &str = "machine type name";
    let len = r.be32()?;
    match u8::try_from(len) {
        Ok(len) => Ok(checked(WHAT, r.take(usize::from(len))?)?),
        Err(_) => Err(Invalid::new(WHAT, format_args!("{len} bytes"), "1..=255 bytes").into()),
    }
}

/// Does `rest` begin with a subsection of ours? A 0x05 alone does not say so: the name decides.
fn own_subsection_follows(rest: &[u8]) -> Result<bool, Stop> {
    match rest {
        [] | [SUBSECTION] => Err(Stop::NeedMore),
        [SUBSECTION, len, ..] if usize::from(*len) < PARENT.len() => Ok(false),
        [SUBSECTION, _, name @ ..] => match name.get(..PARENT.len()) {
            Some(start) => Ok(start == PARENT),
            None if PARENT.starts_with(name) => Err(Stop::NeedMore),
            None => Ok(false),
        },
        _ => Ok(false),
    }
}

fn capabilities(r: &mut Reader<'_>) -> Result<Vec<String>, Stop> {
    let count = r.be32()?;
    if !(1..=MAX_CAPABILITIES).contains(&count) {
        return Err(Invalid::new("capability count", count, format_args!("1..={MAX_CAPABILITIES}")).into());
    }
    (0..count).map(|_| Ok(checked("capability name", r.cstr8()?)?.to_owned())).collect()
}

fn put_subsection(out: &mut Vec<u8>, name: &str) {
    out.push(SUBSECTION);
    put_cstr8(out, name);
    out.extend(SUBSECTION_VERSION.to_be_bytes());
}

fn be32_len(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
}
