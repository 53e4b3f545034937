//! What a saving pass notes of names and types.

use std::mem;

use multifd_wire::{FieldDescription, StructDescription};

use super::{Direction, Fields, Output, Step};
use crate::{Description, Error, Value};

impl Fields<'_> {
    /// A value as one field.
    pub(crate) fn single<V: Value + ?Sized>(
        &mut self,
        name: &'static str,
        value: &mut V,
    ) -> Result<(), Error> {
        let (kind, part) = (V::KIND, V::PART);
        self.noted(Step::Name(name), name, None, kind, part, |this| value.pass(this))
    }

    /// An element of an array; [`Fields::folded`] puts equal neighbours together.
    pub(super) fn element<V: Value>(
        &mut self,
        name: &'static str,
        index: usize,
        value: &mut V,
    ) -> Result<(), Error> {
        let (kind, part) = (V::KIND, V::PART);
        self.noted(Step::Index(index), name, Some(index as u64), kind, part, |this| value.pass(this))
    }

    /// Runs `pass` and notes what it saves as a field.
    pub(super) fn noted(
        &mut self,
        step: Step,
        name: &'static str,
        index: Option<u64>,
        kind: &str,
        part: Option<&'static Description>,
        pass: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Direction::Save(output) = &mut self.direction else { return self.within(step, pass) };
        let start = output.bytes.len();
        let outer = (mem::take(&mut output.fields), mem::take(&mut output.subsections));
        let result = self.within(step, pass);
        let Direction::Save(output) = &mut self.direction else { return result };
        let fields = mem::replace(&mut output.fields, outer.0);
        let subsections = mem::replace(&mut output.subsections, outer.1);
        let struct_ = part.map(|part| {
            Box::new(StructDescription {
                vmsd_name: part.name.to_owned(),
                version: part.version,
                fields,
                subsections,
            })
        });
        let size = (output.bytes.len() - start) as u64;
        let (name, kind) = (name.to_owned(), kind.to_owned());
        output.fields.push(FieldDescription { name, kind, size, array_len: None, index, struct_ });
        result
    }

    /// Puts the elements of an array, which `pass` passes one by one, into one field if they are
    /// alike.
    pub(super) fn folded(
        &mut self,
        name: &'static str,
        pass: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let noted = |this: &mut Self| match &mut this.direction {
            Direction::Save(Output { fields, .. }) => fields.len(),
            Direction::Load(_) => 0,
        };
        let first = noted(self);
        self.within(Step::Name(name), pass)?;
        let Direction::Save(output) = &mut self.direction else { return Ok(()) };
        let elements = output.fields.get(first..).unwrap_or_default();
        let alike = elements.windows(2).all(|pair| match pair {
            [a, b] => (&a.kind, a.size, &a.struct_) == (&b.kind, b.size, &b.struct_),
            _ => false,
        });
        let len = elements.len();
        if alike && len > 0 {
            output.fields.truncate(first + 1);
            if let Some(element) = output.fields.last_mut() {
                element.index = None;
                element.array_len = (len > 1).then_some(len as u64);
            }
        }
        Ok(())
    }
}
