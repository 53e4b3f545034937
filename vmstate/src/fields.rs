//! One pass over the fields of a device, in either direction.

mod arrays;
mod shape;
mod subsections;

use std::fmt::{Display, Write};

use multifd_wire::{FieldDescription, StructDescription};

pub use subsections::Subsections;

use crate::{Description, Device, Error, Saved, Value};

/// One pass over the fields of a device: what [`Device::fields`] is given.
#[derive(Debug)]
pub struct Fields<'a> {
    direction: Direction<'a>,
    /// Of the structure that is being passed.
    version: u32,
    /// Names from the device down to the field that is being passed.
    path: Vec<Step>,
    /// The field that was passed last in the structure that is being passed.
    last: Option<&'static str>,
    device: &'static Description,
}

#[derive(Debug)]
enum Direction<'a> {
    Load(Input<'a>),
    Save(Output),
}

/// What is left to load.
#[derive(Debug)]
struct Input<'a> {
    rest: &'a [u8],
}

/// What was saved of the structure that is being passed; the bytes are of all of the device.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    fields: Vec<FieldDescription>,
    subsections: Vec<StructDescription>,
}

#[derive(Debug)]
enum Step {
    Name(&'static str),
    Index(usize),
}

impl<'a> Fields<'a> {
    pub(crate) fn saving(device: &'static Description) -> Self {
        let direction = Direction::Save(Output::default());
        Self { direction, version: device.version, path: Vec::new(), last: None, device }
    }

    pub(crate) fn loading(device: &'static Description, version: u32, bytes: &'a [u8]) -> Self {
        let direction = Direction::Load(Input { rest: bytes });
        Self { direction, version, path: Vec::new(), last: None, device }
    }

    /// The version of the state: that of the description when it is saved, what the stream says
    /// when it is loaded.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Whether this pass sets the fields.
    pub fn is_load(&self) -> bool {
        matches!(self.direction, Direction::Load(_))
    }

    /// A field: a number, a bool, a structure, an array, or another [`Value`].
    ///
    /// # Errors
    /// The bytes end, or are no such value.
    pub fn field(&mut self, name: &'static str, value: &mut impl Value) -> Result<(), Error> {
        value.pass_named(name, self)
    }

    /// A field that is there from this version on. Older state leaves it as it is.
    ///
    /// # Errors
    /// As for [`Fields::field`].
    pub fn since(&mut self, version: u32, name: &'static str, value: &mut impl Value) -> Result<(), Error> {
        if self.version < version { Ok(()) } else { self.field(name, value) }
    }

    /// A field that is there up to this version. Newer state leaves it as it is.
    ///
    /// # Errors
    /// As for [`Fields::field`].
    pub fn until(&mut self, version: u32, name: &'static str, value: &mut impl Value) -> Result<(), Error> {
        if self.version > version { Ok(()) } else { self.field(name, value) }
    }

    /// A rule for the field that was passed last, and those before it, in words that name it
    /// (`num_timers in range`), with the value that it is about.
    ///
    /// # Errors
    /// It does not hold, be it of what is loaded or of what is to be saved.
    pub fn validate(&mut self, rule: &'static str, seen: impl Display, holds: bool) -> Result<(), Error> {
        match self.last {
            _ if holds => Ok(()),
            Some(name) => self.within(Step::Name(name), |this| Err(this.wrong(seen, rule))),
            None => Err(self.wrong(seen, rule)),
        }
    }

    /// Bytes with a meaning that no type here has: saved from `bytes`, or loaded into them.
    ///
    /// # Errors
    /// There are fewer.
    pub fn bytes(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        match &mut self.direction {
            Direction::Save(output) => output.bytes.extend_from_slice(bytes),
            Direction::Load(input) => match input.rest.split_at_checked(bytes.len()) {
                Some((head, rest)) => {
                    bytes.copy_from_slice(head);
                    input.rest = rest;
                }
                None => {
                    let seen = format!("{} bytes are left", input.rest.len());
                    return Err(self.wrong(seen, bytes.len()));
                }
            },
        }
        Ok(())
    }

    /// An error at the field that is being passed.
    pub fn wrong(&self, seen: impl Display, expected: impl Display) -> Error {
        Error::new(self.device.name, &self.place(), seen, expected)
    }

    /// The field that is being passed: `timer[3].config`.
    fn place(&self) -> String {
        let mut text = String::new();
        for step in &self.path {
            // Writing to a string does not fail.
            let _ = match step {
                Step::Index(index) => write!(text, "[{index}]"),
                Step::Name(name) if text.is_empty() => write!(text, "{name}"),
                Step::Name(name) => write!(text, ".{name}"),
            };
        }
        text
    }

    /// Bytes that are left to load; `None` when this saves.
    fn left(&self) -> Option<&'a [u8]> {
        match &self.direction {
            Direction::Load(input) => Some(input.rest),
            Direction::Save(_) => None,
        }
    }

    fn within<T>(
        &mut self,
        step: Step,
        pass: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.path.push(step);
        self.last = None;
        let result = pass(self);
        if let Some(Step::Name(name)) = self.path.pop() {
            self.last = Some(name);
        }
        result
    }

    /// Hooks, fields and subsections of a device or of a part of one, at `self.version`.
    pub(crate) fn contents<D: Device>(&mut self, device: &mut D) -> Result<(), Error> {
        let said = |this: &Self, hook: &str, text| {
            let place = this.place();
            let hook = if place.is_empty() { hook.to_owned() } else { format!("{place}.{hook}") };
            Error::said(this.device.name, &hook, text)
        };
        if self.is_load() {
            device.pre_load().map_err(|text| said(self, "pre_load", text))?;
            device.fields(self)?;
            self.load_subsections(device)?;
            let version = self.version;
            return device.post_load(version).map_err(|text| said(self, "post_load", text));
        }
        device.pre_save().map_err(|text| said(self, "pre_save", text))?;
        let passed = device.fields(self).and_then(|()| device.subsections(&mut Subsections::saving(self)));
        device.post_save();
        passed
    }

    /// A structure within another has the version that its own description says.
    pub(crate) fn part<D: Device>(&mut self, part: &mut D) -> Result<(), Error> {
        let outer = std::mem::replace(&mut self.version, D::DESCRIPTION.version);
        let result = self.contents(part);
        self.version = outer;
        result
    }

    /// Nothing may be left.
    pub(crate) fn end(&self) -> Result<(), Error> {
        let rest = self.left().unwrap_or_default();
        match subsections::head_at(rest) {
            _ if rest.is_empty() => Ok(()),
            Some((name, ..)) if name.iter().all(u8::is_ascii_graphic) && !name.is_empty() => {
                Err(subsections::unknown(self, name))
            }
            _ => {
                let seen = format!("{} bytes are left behind the fields", rest.len());
                Err(Error::new(self.device.name, "", seen, "none"))
            }
        }
    }

    pub(crate) fn into_saved(self) -> Saved {
        let Description { name, version, .. } = self.device;
        let output = match self.direction {
            Direction::Save(output) => output,
            Direction::Load(_) => Output::default(),
        };
        let Output { bytes, fields, subsections } = output;
        let layout =
            StructDescription { vmsd_name: (*name).to_owned(), version: *version, fields, subsections };
        Saved { bytes, layout }
    }
}
