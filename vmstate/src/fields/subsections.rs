use std::mem;

use multifd_wire::{ItemType, StructDescription};

use super::{Direction, Fields, Step};
use crate::{Description, Device, Error};

const SUBSECTION: u8 = ItemType::Subsection.byte();

/// The subsections of a structure: what [`Device::subsections`] is given.
#[derive(Debug)]
pub struct Subsections<'f, 'a> {
    fields: &'f mut Fields<'a>,
    /// The one that the stream has next; `None` when this saves.
    wanted: Option<Wanted<'a>>,
    found: bool,
}

#[derive(Clone, Copy, Debug)]
struct Wanted<'a> {
    name: &'a [u8],
    version: u32,
    /// It is not the first of this name.
    again: bool,
}

impl<'f, 'a> Subsections<'f, 'a> {
    pub(super) fn saving(fields: &'f mut Fields<'a>) -> Self {
        Self { fields, wanted: None, found: false }
    }

    /// A subsection of a description of its own: saved if it is there and needed, there after a
    /// load if the stream has it.
    ///
    /// # Errors
    /// What its fields say, or a version that is too old or too new.
    pub fn optional<D: Device + Default>(&mut self, part: &mut Option<D>) -> Result<(), Error> {
        if self.wanted.is_none() {
            return match part {
                Some(part) => self.whole(part, true),
                None => Ok(()),
            };
        }
        if self.is_wanted(D::DESCRIPTION.name) {
            self.whole(part.get_or_insert_default(), true)?;
        }
        Ok(())
    }

    /// A subsection of a description of its own, which is part of the device whether the stream has
    /// it or not.
    ///
    /// # Errors
    /// As for [`Subsections::optional`].
    pub fn part<D: Device>(&mut self, part: &mut D) -> Result<(), Error> {
        let needed = part.needed();
        self.whole(part, needed)
    }

    /// A subsection of a few fields of the device itself.
    ///
    /// # Errors
    /// As for [`Subsections::optional`].
    pub fn subsection(
        &mut self,
        name: &'static str,
        version: u32,
        needed: bool,
        pass: impl FnOnce(&mut Fields<'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.pass(&Description::new(name, version), needed, pass)
    }

    fn whole<D: Device>(&mut self, part: &mut D, needed: bool) -> Result<(), Error> {
        self.pass(&D::DESCRIPTION, needed && part.needed(), |fields| fields.contents(part))
    }

    fn is_wanted(&self, name: &str) -> bool {
        self.wanted.is_some_and(|wanted| wanted.name == name.as_bytes())
    }

    fn pass(
        &mut self,
        about: &Description,
        needed: bool,
        pass: impl FnOnce(&mut Fields<'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(wanted) = self.wanted else {
            return if needed { self.fields.save_subsection(about, pass) } else { Ok(()) };
        };
        if !self.is_wanted(about.name) || self.found {
            return Ok(());
        }
        self.found = true;
        let version = wanted.version;
        self.fields.within(Step::Name(about.name), |fields| {
            if wanted.again {
                return Err(fields.wrong("a second one", "it once"));
            }
            if !about.reads(version) {
                let expected = format_args!("{}..={}", about.minimum, about.version);
                return Err(fields.wrong(format_args!("version {version}"), expected));
            }
            let outer = mem::replace(&mut fields.version, version);
            let result = pass(fields);
            fields.version = outer;
            result
        })
    }
}

impl<'a> Fields<'a> {
    fn save_subsection(
        &mut self,
        about: &Description,
        pass: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Direction::Save(output) = &mut self.direction else { return Ok(()) };
        let len = u8::try_from(about.name.len()).unwrap_or(u8::MAX);
        output.bytes.extend([SUBSECTION, len]);
        output.bytes.extend(about.name.bytes().take(len.into()));
        output.bytes.extend(about.version.to_be_bytes());
        let outer = (mem::take(&mut output.fields), mem::take(&mut output.subsections));
        let version = mem::replace(&mut self.version, about.version);
        let result = self.within(Step::Name(about.name), pass);
        self.version = version;
        let Direction::Save(output) = &mut self.direction else { return result };
        let fields = mem::replace(&mut output.fields, outer.0);
        let subsections = mem::replace(&mut output.subsections, outer.1);
        output.subsections.push(StructDescription {
            vmsd_name: about.name.to_owned(),
            version: about.version,
            fields,
            subsections,
        });
        result
    }

    /// Loads the subsections that the stream has for `device`, in the order of the stream.
    pub(super) fn load_subsections<D: Device>(&mut self, device: &mut D) -> Result<(), Error> {
        let mut loaded: Vec<&[u8]> = Vec::new();
        while let Some(outer) = self.left()
            && let Some((name, version, rest)) = head_at(outer)
        {
            self.continue_at(rest);
            let wanted = Some(Wanted { name, version, again: loaded.contains(&name) });
            let mut subsections = Subsections { fields: self, wanted, found: false };
            device.subsections(&mut subsections)?;
            if subsections.found {
                loaded.push(name);
                continue;
            }
            // Not one of this structure: of one around it, unless its name says otherwise.
            if name.starts_with(D::DESCRIPTION.name.as_bytes()) {
                return Err(unknown(self, name));
            }
            self.continue_at(outer);
            break;
        }
        Ok(())
    }

    fn continue_at(&mut self, rest: &'a [u8]) {
        if let Direction::Load(input) = &mut self.direction {
            input.rest = rest;
        }
    }
}

/// Name and version of the subsection that these bytes begin with, and what follows. Only the name
/// says that it is one: a field of the structure around this one may look alike.
pub(super) fn head_at(bytes: &[u8]) -> Option<(&[u8], u32, &[u8])> {
    let [SUBSECTION, len, rest @ ..] = bytes else { return None };
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let (version, rest) = rest.split_first_chunk()?;
    Some((name, u32::from_be_bytes(*version), rest))
}

#[cold]
pub(super) fn unknown(fields: &Fields<'_>, name: &[u8]) -> Error {
    let name = name.escape_ascii().to_string();
    Error::new(fields.device.name, &name, "a subsection that is unknown here", "one of a description")
}
