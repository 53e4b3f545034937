//! A checkpoint and a recording are read alike: pages, then devices.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use multifd_engine::{
    Checkpoint, Devices, LibvirtImage, Manifest, PAGE, RecordedSection, Recording, SectionContent,
};

use super::devices::{ram_of, ram_of_recording};
use super::findings::{Block, Device, Findings, Held, Kind, Libvirt, Origin, Pages};
use super::ram::Ram;
use super::survey::{Counts, Survey};
use super::values::Budget;
use super::{Result, examined, values};

/// Between two looks at the progress bar, in records.
const PROGRESS_STEP: u64 = 1 << 12;

/// Unit of `st_blocks`, in bytes.
const STAT_BLOCK: u64 = 512;

pub(super) fn checkpoint(directory: &Path, progress: impl Fn(u64, u64)) -> Result<Findings> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.chain())?;
    let manifest = checkpoint.manifest();
    let lengths: Vec<_> = manifest.blocks.iter().map(|block| block.length).collect();
    let total: u64 = lengths.iter().sum();
    let mut survey = Survey::new(&lengths, PAGE);
    let mut pages = checkpoint.pages().map_err(|error| error.chain())?;
    for records in 0.. {
        let Some(record) = pages.next_page().map_err(|error| error.chain())? else { break };
        if records % PROGRESS_STEP == 0 {
            let before: u64 = lengths.iter().take(record.block).sum();
            progress(before + record.page * PAGE as u64, total);
        }
        survey.stored(&record);
    }
    let names = manifest.blocks.iter().map(|block| block.idstr.clone());
    let (blocks, pages) =
        survey.finish(names, |counts| Held::Stored { data: counts.normal, holes: counts.zero })?;
    let devices = checkpoint.devices().map_err(|error| error.chain())?;
    let configuration = checkpoint.configuration();
    let (bytes, bytes_on_disk) = sizes(&files(directory, manifest));
    Ok(Findings {
        kind: Kind::Checkpoint,
        path: directory.to_owned(),
        bytes,
        bytes_on_disk,
        machine: manifest.machine.clone(),
        uuid: manifest.uuid.as_deref().and_then(|uuid| u128::from_str_radix(uuid, 16).ok()).map(dashed),
        page_size: PAGE,
        capabilities: configuration.capabilities.clone(),
        origin: Some(Origin {
            source: manifest.source.clone(),
            codec: manifest.codec.clone(),
            channels: manifest.channels,
            created_unix_s: manifest.created_unix_s,
            total_ms: manifest.total_ms,
        }),
        libvirt: None,
        blocks,
        pages,
        notes: notes(&devices, &[]),
        devices: all_devices(&devices, &ram_of(&checkpoint)?),
    })
}

pub(super) fn recording(path: &Path, offset: u64, progress: impl Fn(u64, u64)) -> Result<Findings> {
    let recording = Recording::open_at(path, offset).map_err(|error| error.chain())?;
    let lengths: Vec<_> = recording.blocks().iter().map(|block| block.used_len).collect();
    let mut survey = Survey::new(&lengths, recording.page_size().bytes());
    let mut pages = recording.pages();
    for records in 0.. {
        if records % PROGRESS_STEP == 0 {
            progress(pages.position(), recording.file_len());
        }
        let Some(record) = pages.next_page().map_err(|error| error.chain())? else { break };
        if recording.is_mapped() { survey.stored(&record) } else { survey.sent(&record)? }
    }
    let held = |counts: &Counts| match recording.is_mapped() {
        true => Held::Stored { data: counts.normal, holes: counts.zero },
        false => Held::Sent {
            normal: counts.normal,
            zero: counts.zero,
            xbzrle: counts.xbzrle,
            repeated: counts.repeated,
        },
    };
    let names = recording.blocks().iter().map(|block| block.name.as_str().to_owned());
    let (blocks, summary) = survey.finish(names, held)?;
    let devices = pages.devices().map_err(|error| error.chain())?;
    let configuration = recording.configuration();
    let (_, bytes_on_disk) = sizes(&[path.to_owned()]);
    Ok(Findings {
        kind: if recording.is_mapped() { Kind::MappedRam } else { Kind::Stream },
        path: path.to_owned(),
        bytes: recording.file_len(),
        bytes_on_disk,
        machine: configuration.machine.clone(),
        uuid: configuration.uuid.map(|uuid| dashed(u128::from_be_bytes(uuid))),
        page_size: recording.page_size().bytes(),
        capabilities: configuration.capabilities.clone(),
        origin: None,
        libvirt: libvirt(path)?,
        notes: notes(&devices, &absence(&summary, &blocks, &configuration.capabilities)),
        blocks,
        pages: summary,
        devices: all_devices(&devices, &ram_of_recording(&recording)),
    })
}

fn libvirt(path: &Path) -> Result<Option<Libvirt>> {
    let image = LibvirtImage::read(path).map_err(|error| error.chain())?;
    Ok(image.map(|image| Libvirt {
        domain: image.domain(),
        format: image.format().name(),
        was_running: image.was_running(),
        xml: image.xml(),
    }))
}

fn all_devices(devices: &Devices, ram: &Ram) -> Vec<Device> {
    let mut budget = Budget::default();
    devices.sections.iter().map(|section| device(devices, section, ram, &mut budget)).collect()
}

fn device(devices: &Devices, section: &RecordedSection, ram: &Ram, budget: &mut Budget) -> Device {
    // A description here that does not fit is of another version of the device, or of another
    // machine: the source's own is shown.
    let examined = examined::of(section, ram).and_then(std::result::Result::ok);
    let (layout, note) = match examined::layout(devices, section, examined.as_ref()) {
        Some(structure) => values::view(structure, budget),
        None => Default::default(),
    };
    let (meaning, inconsistent) =
        examined.map(|examined| (examined.notes, examined.findings)).unwrap_or_default();
    let head = &section.head;
    Device {
        section: head.id.0,
        name: head.idstr.clone(),
        instance: head.instance_id,
        version: head.version_id,
        bytes: section.payload_len(),
        live: matches!(section.content, SectionContent::Live(_)),
        layout,
        meaning: meaning.into_iter().map(Into::into).collect(),
        inconsistent: inconsistent.into_iter().map(Into::into).collect(),
        note,
    }
}

fn notes(devices: &Devices, others: &[String]) -> Vec<String> {
    let mut notes = others.to_vec();
    if devices.description.is_none() {
        notes.push("the source sent no description of its devices, so there are no fields".to_owned());
    }
    if devices.trailing_bytes > 0 {
        notes.push(format!("{} bytes follow the end of the stream", devices.trailing_bytes));
    }
    notes
}

/// Why pages may be missing.
fn absence(pages: &Pages, blocks: &[Block], capabilities: &[String]) -> Vec<String> {
    if pages.absent == 0 {
        return Vec::new();
    }
    let names: Vec<_> = blocks
        .iter()
        .filter(|block| block.absent_pages == block.pages)
        .map(|block| block.name.as_str())
        .collect();
    let why = if capabilities.iter().any(|name| name == "x-ignore-shared") {
        ": with x-ignore-shared, shared memory is not sent"
    } else if names.len() == blocks.len() {
        ": so looks the main channel of a migration with multifd"
    } else {
        ""
    };
    let which =
        if names.is_empty() { String::new() } else { format!(", among them all of {}", names.join(", ")) };
    vec![format!("{} pages are not in the stream{which}{why}", pages.absent)]
}

fn files(directory: &Path, manifest: &Manifest) -> Vec<PathBuf> {
    let ram = manifest.blocks.iter().map(|block| block.file.as_str());
    ram.chain(["manifest.json", "device-state.bin", "vmdesc.json"]).map(|file| directory.join(file)).collect()
}

/// Bytes of files, and what they take on disk.
fn sizes(files: &[PathBuf]) -> (u64, u64) {
    let found = files.iter().filter_map(|file| fs::metadata(file).ok());
    found.fold((0, 0), |(bytes, on_disk), file| (bytes + file.len(), on_disk + file.blocks() * STAT_BLOCK))
}

/// A uuid as people write it.
fn dashed(uuid: u128) -> String {
    let digits = format!("{uuid:032x}");
    let mut parts = Vec::new();
    let mut rest = digits.as_str();
    for len in [8, 4, 4, 4, 12] {
        let (part, after) = rest.split_at_checked(len).unwrap_or((rest, ""));
        parts.push(part);
        rest = after;
    }
    parts.join("-")
}
