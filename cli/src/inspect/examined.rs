//! What our own descriptions say of the devices.

use multifd_engine::{Devices, RecordedSection, SectionContent};
use multifd_vmstate::examine::{Examined, Remark, examine};
use multifd_vmstate::{Error, Section};
use multifd_wire::{DeviceDescription, Structure};
use serde::Serialize;

use super::devices::DevicesAtRest;
use super::ram::Ram;

/// A device, and whether its state is consistent.
#[derive(Serialize)]
pub(super) struct Checked {
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) verdict: Verdict,
    pub(super) findings: Vec<RemarkView>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    Consistent,
    Inconsistent,
    /// No description here: not checked.
    Opaque,
}

/// Something that is said of a field.
#[derive(Serialize)]
pub(super) struct RemarkView {
    pub(super) field: String,
    pub(super) text: String,
}

impl From<Remark> for RemarkView {
    fn from(Remark { field, text, .. }: Remark) -> Self {
        Self { field, text }
    }
}

/// A section by the description that this program has of it.
pub(super) fn of(section: &RecordedSection, ram: &Ram) -> Option<Result<Examined, Error>> {
    match &section.content {
        SectionContent::Device(payload) => examine(Section::of(&section.head, payload), ram),
        _ => None,
    }
}

/// The layout to show of a section: what the source says of it, but ours where the source only
/// says how long it is.
pub(super) fn layout<'d>(
    devices: &'d Devices,
    section: &'d RecordedSection,
    examined: Option<&'d Examined>,
) -> Option<Structure<'d>> {
    let SectionContent::Device(payload) = &section.content else { return None };
    let theirs = devices.description_of(section);
    let ours = examined.map(|examined| &examined.description);
    let chosen = if theirs.is_none_or(is_opaque) { ours.or(theirs) } else { theirs };
    Some(Structure::of_device(chosen?, payload))
}

/// One field that is all of the section, of a type that says nothing.
fn is_opaque(description: &DeviceDescription) -> bool {
    match &description.fields[..] {
        [field] => field.struct_.is_none() && matches!(field.kind.as_str(), "buffer" | "virtio"),
        _ => false,
    }
}

/// Every device of a guest.
pub(super) fn all(guest: &DevicesAtRest) -> Vec<Checked> {
    guest.devices.sections.iter().map(|section| checked(section, &guest.ram)).collect()
}

fn checked(section: &RecordedSection, ram: &Ram) -> Checked {
    let (verdict, findings) = match of(section, ram) {
        None => (Verdict::Opaque, Vec::new()),
        Some(Ok(examined)) if examined.findings.is_empty() => (Verdict::Consistent, Vec::new()),
        Some(Ok(examined)) => {
            (Verdict::Inconsistent, examined.findings.into_iter().map(Into::into).collect())
        }
        Some(Err(error)) => {
            let Error { field, seen, expected, .. } = error;
            let expected = expected.map(|expected| format!(", expected {expected}")).unwrap_or_default();
            (Verdict::Inconsistent, vec![RemarkView { field, text: seen + &expected }])
        }
    };
    let head = &section.head;
    Checked { name: head.idstr.clone(), instance: head.instance_id, verdict, findings }
}
