//! All that is found, as `--json` shows it.

use std::path::PathBuf;

use serde::Serialize;

use super::examined::RemarkView;
use super::values::StructureView;

#[derive(Serialize)]
pub(super) struct Findings {
    pub(super) kind: Kind,
    pub(super) path: PathBuf,
    /// Bytes, holes of files included.
    pub(super) bytes: u64,
    /// Bytes that files take on disk.
    pub(super) bytes_on_disk: u64,
    pub(super) machine: String,
    pub(super) uuid: Option<String>,
    pub(super) page_size: usize,
    pub(super) capabilities: Vec<String>,
    #[serde(flatten)]
    pub(super) origin: Option<Origin>,
    /// Of an image of `virsh save`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) libvirt: Option<Libvirt>,
    pub(super) blocks: Vec<Block>,
    pub(super) pages: Pages,
    pub(super) devices: Vec<Device>,
    /// What a reader should know beside that.
    pub(super) notes: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Checkpoint,
    MappedRam,
    Stream,
}

/// What libvirt's header says.
#[derive(Serialize)]
pub(super) struct Libvirt {
    pub(super) domain: Option<String>,
    pub(super) format: &'static str,
    pub(super) was_running: bool,
    pub(super) xml: String,
}

/// What a checkpoint knows of the migration that it comes from.
#[derive(Serialize)]
pub(super) struct Origin {
    pub(super) source: String,
    pub(super) codec: String,
    pub(super) channels: u64,
    pub(super) created_unix_s: u64,
    pub(super) total_ms: u64,
}

#[derive(Serialize)]
pub(super) struct Block {
    pub(super) name: String,
    /// Bytes.
    pub(super) length: u64,
    pub(super) pages: u64,
    /// Pages that are zero at the end of the stream, whatever records gave them.
    pub(super) zero_pages: u64,
    /// Pages without a record.
    pub(super) absent_pages: u64,
    #[serde(flatten)]
    pub(super) held: Held,
}

/// How the pages of a block are there.
#[derive(Clone, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Held {
    /// At their places.
    Stored { data: u64, holes: u64 },
    /// As records, counted by kind. `repeated` pages have more than one.
    Sent { normal: u64, zero: u64, xbzrle: u64, repeated: u64 },
}

/// All blocks together.
#[derive(Serialize)]
pub(super) struct Pages {
    pub(super) total: u64,
    pub(super) zero: u64,
    pub(super) data: u64,
    pub(super) absent: u64,
    /// Zero pages among those that are not absent, 0.0 to 1.0.
    pub(super) zero_share: Option<f64>,
    /// Pages that were compressed to see how that goes.
    pub(super) sampled: u64,
    pub(super) compression: Vec<Compression>,
}

#[derive(Serialize)]
pub(super) struct Compression {
    pub(super) codec: String,
    /// Bytes of pages to a byte of payload.
    pub(super) ratio: f64,
}

#[derive(Serialize)]
pub(super) struct Device {
    pub(super) section: u32,
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) version: u32,
    /// Bytes of the payload.
    pub(super) bytes: u64,
    /// Sent in pieces, as RAM is.
    pub(super) live: bool,
    #[serde(flatten)]
    pub(super) layout: StructureView,
    /// What fields mean, of a device that is described here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) meaning: Vec<RemarkView>,
    /// What is inconsistent in it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) inconsistent: Vec<RemarkView>,
    /// The reason for missing fields.
    pub(super) note: Option<String>,
}
