//! Sections that QEMU has written.

use multifd_vmstate::Section;
use multifd_vmstate::examine::{UnknownRam, examine, known};
use multifd_wire::{FieldDescription, StructDescription};

use crate::corpus::{self, Recorded};

impl Recorded {
    fn section(&self) -> Section<'_> {
        let Self { name, instance, version, payload, .. } = self;
        Section { name, instance: *instance, version: *version, payload }
    }
}

/// Sections that are carried without a description: docs/devices.md says why.
const OPAQUE: [&str; 1] = ["slirp"];

#[test]
fn sections_of_real_guests_are_the_same_bytes_when_they_are_saved_again() {
    let mut kinds = Vec::new();
    for recorded in corpus::all() {
        let Recorded { name, machine, .. } = &recorded;
        let Some(examined) = examine(recorded.section(), &UnknownRam) else {
            assert!(OPAQUE.contains(&recorded.kind()), "no description of {name} of {machine}");
            continue;
        };
        let examined = examined.unwrap_or_else(|error| panic!("{name} of {machine}: {error}"));
        assert_eq!(examined.findings, [], "{name} of {machine}");
        assert_eq!(examined.description.payload_len(), Some(recorded.payload.len() as u64), "{name}");
        kinds.push(recorded.kind().to_owned());
    }
    let missing: Vec<_> = known().into_iter().filter(|name| !kinds.iter().any(|kind| kind == name)).collect();
    assert_eq!(missing, [""; 0], "described, but not seen in a real guest");
}

#[test]
fn descriptions_name_the_fields_that_qemu_names() {
    let mut compared = 0;
    for recorded in corpus::all().iter().filter(|recorded| !recorded.name.contains("virtio-")) {
        let Some(theirs) = &recorded.layout else { continue };
        let Some(Ok(ours)) = examine(recorded.section(), &UnknownRam) else { continue };
        let name = &recorded.name;
        assert_eq!(ours.description.vmsd_name, theirs.vmsd_name, "{name}");
        assert_eq!(ours.description.version, theirs.version, "{name}");
        compare(name, &ours.description.fields, &theirs.fields);
        compare_parts(name, &ours.description.subsections, &theirs.subsections);
        compared += 1;
    }
    assert!(compared >= 36, "{compared} layouts");
}

fn compare(place: &str, ours: &[FieldDescription], theirs: &[FieldDescription]) {
    let names =
        |fields: &[FieldDescription]| fields.iter().map(|field| field.name.clone()).collect::<Vec<_>>();
    // Types written by code, which QEMU does not describe further.
    if ["tmp", "msix"].iter().any(|opaque| names(theirs) == [*opaque]) {
        return;
    }
    assert_eq!(ours.len(), theirs.len(), "{place}: {:?}, QEMU has {:?}", names(ours), names(theirs));
    for (ours, theirs) in ours.iter().zip(theirs) {
        let place = format!("{place}.{}", theirs.name);
        // QEMU numbers fields of one name, of which there are several versions.
        let name = theirs.name.split_once('[').map_or(theirs.name.as_str(), |(name, _)| name);
        assert!(ours.name == theirs.name || ours.name == name, "{place}: {}", ours.name);
        let shape = |field: &FieldDescription| {
            (field.kind.clone(), field.size, field.array_len.unwrap_or(1), field.struct_.is_some())
        };
        assert_eq!(shape(ours), shape(theirs), "{place}");
        if let (Some(ours), Some(theirs)) = (&ours.struct_, &theirs.struct_) {
            assert_eq!((&ours.vmsd_name, ours.version), (&theirs.vmsd_name, theirs.version), "{place}");
            compare(&place, &ours.fields, &theirs.fields);
            compare_parts(&place, &ours.subsections, &theirs.subsections);
        }
    }
}

fn compare_parts(place: &str, ours: &[StructDescription], theirs: &[StructDescription]) {
    assert_eq!(ours.len(), theirs.len(), "subsections of {place}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!((&ours.vmsd_name, ours.version), (&theirs.vmsd_name, theirs.version), "{place}");
        compare(&ours.vmsd_name, &ours.fields, &theirs.fields);
        compare_parts(&ours.vmsd_name, &ours.subsections, &theirs.subsections);
    }
}

/// No bytes make a description panic, or read as something else than they say.
#[test]
fn sections_that_are_cut_or_flipped_are_refused_or_read_as_they_are() {
    for recorded in corpus::all() {
        let Some(Ok(whole)) = examine(recorded.section(), &UnknownRam) else { continue };
        let payload = &recorded.payload;
        let step = (payload.len() / 64).max(1);
        for len in (0..payload.len()).step_by(step) {
            let section = Section { payload: &payload[..len], ..recorded.section() };
            // A prefix that ends before a subsection is a section without it.
            if let Some(Ok(short)) = examine(section, &UnknownRam) {
                let len_of = short.description.payload_len();
                assert_eq!(len_of, Some(len as u64), "{}", recorded.name);
                assert_ne!(short.description, whole.description, "{}", recorded.name);
            }
        }
        for at in (0..payload.len()).step_by(step) {
            let mut flipped = payload.clone();
            flipped[at] ^= 1 << (at % 8);
            let section = Section { payload: &flipped, ..recorded.section() };
            if let Some(Ok(read)) = examine(section, &UnknownRam) {
                assert_eq!(read.description.payload_len(), Some(payload.len() as u64), "{}", recorded.name);
            }
        }
    }
}
