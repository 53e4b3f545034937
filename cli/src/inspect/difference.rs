//! Two guests, device by device and field by field.

use multifd_engine::{RecordedSection, SectionContent};
use multifd_vmstate::examine::Examined;
use multifd_wire::{Field, Structure, Subsection};
use serde::Serialize;

use super::devices::DevicesAtRest;
use super::{examined, values};

/// Differences of one device that are listed.
const MAX_LISTED: usize = 64;

/// A device that is not the same in both.
#[derive(Serialize)]
pub(super) struct Different {
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) fields: Vec<FieldPair>,
    /// Differences that are not listed.
    pub(super) omitted: usize,
}

/// A field that differs; what is not there has no value.
#[derive(Serialize)]
pub(super) struct FieldPair {
    pub(super) field: String,
    pub(super) left: Option<String>,
    pub(super) right: Option<String>,
}

/// A guest's section with its layout.
struct Side<'g> {
    guest: &'g DevicesAtRest,
    section: &'g RecordedSection,
    examined: Option<Examined>,
}

impl<'g> Side<'g> {
    fn of(guest: &'g DevicesAtRest, section: &'g RecordedSection) -> Self {
        let examined = examined::of(section, &guest.ram).and_then(Result::ok);
        Self { guest, section, examined }
    }

    fn layout(&self) -> Option<Structure<'_>> {
        examined::layout(&self.guest.devices, self.section, self.examined.as_ref())
    }

    fn bytes(&self) -> &'g [u8] {
        match &self.section.content {
            SectionContent::Device(payload) => payload,
            _ => &[],
        }
    }
}

/// Devices that differ, in the order of the first guest; then those that only the second has.
pub(super) fn between(left: &DevicesAtRest, right: &DevicesAtRest) -> Vec<Different> {
    let same = |a: &RecordedSection, b: &RecordedSection| {
        (&a.head.idstr, a.head.instance_id) == (&b.head.idstr, b.head.instance_id)
    };
    let mut all = Vec::new();
    for section in &left.devices.sections {
        let other = right.devices.sections.iter().find(|other| same(section, other));
        let found = match other {
            Some(other) => device(&Side::of(left, section), &Side::of(right, other)),
            None => Listed::one(pair("", Some(whole(section)), None)),
        };
        all.extend(found.of(section));
    }
    let is_new = |section: &&RecordedSection| !left.devices.sections.iter().any(|other| same(section, other));
    for section in right.devices.sections.iter().filter(is_new) {
        all.extend(Listed::one(pair("", None, Some(whole(section)))).of(section));
    }
    all
}

fn whole(section: &RecordedSection) -> String {
    format!("version {}, {} bytes", section.head.version_id, section.payload_len())
}

fn device(left: &Side<'_>, right: &Side<'_>) -> Listed {
    let mut found = Listed::default();
    let versions = [left, right].map(|side| side.section.head.version_id);
    if let [a, b] = versions
        && a != b
    {
        found.push(pair("version", Some(a.to_string()), Some(b.to_string())));
    }
    match (left.layout(), right.layout()) {
        _ if left.bytes() == right.bytes() => {}
        (Some(a), Some(b)) => structures(&mut found, "", a, b),
        _ => bytes(&mut found, "", left.bytes(), right.bytes()),
    }
    found
}

#[derive(Default)]
struct Listed {
    fields: Vec<FieldPair>,
    omitted: usize,
}

impl Listed {
    fn one(pair: FieldPair) -> Self {
        Self { fields: vec![pair], omitted: 0 }
    }

    fn push(&mut self, pair: FieldPair) {
        if self.fields.len() < MAX_LISTED { self.fields.push(pair) } else { self.omitted += 1 }
    }

    fn of(self, section: &RecordedSection) -> Option<Different> {
        let Self { fields, omitted } = self;
        let (name, instance) = (section.head.idstr.clone(), section.head.instance_id);
        (!fields.is_empty()).then_some(Different { name, instance, fields, omitted })
    }
}

fn pair(field: &str, left: Option<String>, right: Option<String>) -> FieldPair {
    FieldPair { field: field.to_owned(), left, right }
}

fn structures(found: &mut Listed, place: &str, left: Structure<'_>, right: Structure<'_>) {
    let (Ok(a), Ok(b)) = (left.contents(), right.contents()) else {
        return bytes(found, place, left.bytes(), right.bytes());
    };
    let key = |field: &Field<'_>| (field.name().to_owned(), field.index());
    for field in &a.fields {
        match b.fields.iter().find(|other| key(other) == key(field)) {
            Some(other) => fields(found, place, field, other),
            None => found.push(pair(&under(place, field), Some(text_of(field, field.bytes())), None)),
        }
    }
    for field in b.fields.iter().filter(|field| !a.fields.iter().any(|other| key(other) == key(field))) {
        found.push(pair(&under(place, field), None, Some(text_of(field, field.bytes()))));
    }
    subsections(found, place, &a.subsections, &b.subsections);
}

fn subsections(found: &mut Listed, place: &str, left: &[Subsection<'_>], right: &[Subsection<'_>]) {
    let there =
        |subsection: &Subsection<'_>| format!("subsection of {} bytes", subsection.structure.bytes().len());
    let at = |name: &str| if place.is_empty() { name.to_owned() } else { format!("{place}: {name}") };
    for a in left {
        match right.iter().find(|b| b.name == a.name) {
            Some(b) if a.structure.bytes() == b.structure.bytes() => {}
            Some(b) => structures(found, &at(a.name), a.structure, b.structure),
            None => found.push(pair(&at(a.name), Some(there(a)), None)),
        }
    }
    for b in right.iter().filter(|b| !left.iter().any(|a| a.name == b.name)) {
        found.push(pair(&at(b.name), None, Some(there(b))));
    }
}

fn fields(found: &mut Listed, place: &str, left: &Field<'_>, right: &Field<'_>) {
    if left.bytes() == right.bytes() {
        return;
    }
    let place = under(place, left);
    let lens = [left, right].map(|field| field.array_len().unwrap_or(1));
    let [Some(a), Some(b)] = [left, right].map(elements) else {
        return bytes(found, &place, left.bytes(), right.bytes());
    };
    if lens.iter().any(|len| *len > 1) {
        for (index, (a, b)) in a.iter().zip(&b).enumerate() {
            element(found, &format!("{place}[{index}]"), (left, a), (right, b));
        }
        if a.len() != b.len() {
            let len = |len: usize| Some(format!("{len} elements"));
            found.push(pair(&place, len(a.len()), len(b.len())));
        }
        return;
    }
    match (&a[..], &b[..]) {
        ([a], [b]) => element(found, &place, (left, a), (right, b)),
        _ => bytes(found, &place, left.bytes(), right.bytes()),
    }
}

/// The bytes of each element.
fn elements<'a>(field: &Field<'a>) -> Option<Vec<&'a [u8]>> {
    let count = usize::try_from(field.array_len().unwrap_or(1)).ok()?;
    let len = field.bytes().len().checked_div(count).filter(|len| *len > 0)?;
    Some(field.bytes().chunks(len).collect())
}

fn element<'a>(
    found: &mut Listed,
    place: &str,
    (left, a): (&Field<'a>, &'a [u8]),
    (right, b): (&Field<'a>, &'a [u8]),
) {
    match (left.structure(a), right.structure(b)) {
        _ if a == b => {}
        (Some(a), Some(b)) => structures(found, place, a, b),
        _ if a.len() > values::MAX_BYTES => bytes(found, place, a, b),
        _ => found.push(pair(place, Some(text_of(left, a)), Some(text_of(right, b)))),
    }
}

/// Bytes without a meaning: where they begin to differ, and what is there.
fn bytes(found: &mut Listed, place: &str, left: &[u8], right: &[u8]) {
    let at = left.iter().zip(right).take_while(|(a, b)| a == b).count();
    let differ = left.iter().zip(right).filter(|(a, b)| a != b).count() + left.len().abs_diff(right.len());
    let show = |bytes: &[u8]| {
        Some(format!("{} of {} bytes", values::hex_of(bytes.get(at..).unwrap_or_default()), bytes.len()))
    };
    let name = if place.is_empty() { "payload" } else { place };
    found.push(pair(&format!("{name}, byte {at}, {differ} differ"), show(left), show(right)));
}

fn text_of(field: &Field<'_>, bytes: &[u8]) -> String {
    super::table::text_of(field.kind(), &values::scalar(field, bytes))
}

fn under(place: &str, field: &Field<'_>) -> String {
    let index = field.index().map(|index| format!("[{index}]")).unwrap_or_default();
    let name = field.name();
    if place.is_empty() { format!("{name}{index}") } else { format!("{place}.{name}{index}") }
}
