//! manifest.json

use std::collections::HashSet;

use multifd_wire::BlockName;
use serde::{Deserialize, Serialize};

use crate::guest::PAGE;

/// The format of a checkpoint without early device state.
const FORMAT: u32 = 1;
/// The format of a checkpoint with early device state: what reads format 1 only would leave it out.
const FORMAT_WITH_EARLY_STATE: u32 = 2;

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the checkpoint's layout: 1, or 2 with early device state.
    pub format: u32,
    /// The machine type's full name: `pc-q35-10.0`.
    pub machine: String,
    /// The guest's uuid, 32 hexadecimal digits, if the source sent one.
    pub uuid: Option<String>,
    /// The source announced the switch-over; a destination of this machine type wants that, too.
    pub switchover_start: bool,
    /// RAM blocks, in the source's order.
    pub blocks: Vec<CheckpointBlock>,
    /// Where the guest came from, as the destination saw it: `tcp:10.0.0.7:51234`.
    pub source: String,
    /// The codec it came with.
    pub codec: String,
    /// The parallel channels it came over; 0: none.
    pub channels: u64,
    /// When it was complete, in seconds since 1970.
    pub created_unix_s: u64,
    /// How long it took to arrive, in ms.
    pub total_ms: u64,
    /// What `early-state.bin` holds; `None`: there is no such file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_state: Option<EarlyState>,
}

/// The parts of `early-state.bin`: device sections that came before the end of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlyState {
    /// Bytes that came before the RAM section.
    pub before_ram: u64,
    /// Bytes that came between its pieces, after those.
    pub within_ram: u64,
}

/// One RAM block of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointBlock {
    /// The block's name on the wire.
    pub idstr: String,
    /// Bytes, a whole number of pages.
    pub length: u64,
    /// Bytes in a page: 4096.
    pub page_size: u64,
    /// The file with its content, relative to the checkpoint.
    pub file: String,
}

impl Manifest {
    /// The oldest format that holds all of it.
    pub(super) fn format_for(early_state: Option<&EarlyState>) -> u32 {
        if early_state.is_some() { FORMAT_WITH_EARLY_STATE } else { FORMAT }
    }

    /// Whether what it says can be true, or the first thing that cannot.
    pub(super) fn check(&self) -> Result<(), String> {
        if !(FORMAT..=FORMAT_WITH_EARLY_STATE).contains(&self.format) {
            return Err(format!("format {}, expected {FORMAT} or {FORMAT_WITH_EARLY_STATE}", self.format));
        }
        if self.format != Self::format_for(self.early_state.as_ref()) {
            return Err(format!(
                "format {} does not go with early_state: {:?}",
                self.format, self.early_state
            ));
        }
        if self.blocks.is_empty() {
            return Err("no RAM blocks".to_owned());
        }
        self.blocks.iter().try_for_each(CheckpointBlock::check)?;
        let mut names = HashSet::new();
        if let Some(block) = self.blocks.iter().find(|block| !names.insert(&block.idstr)) {
            return Err(format!("block {} is there twice", block.idstr));
        }
        self.uuid_bytes().map(|_| ())
    }

    pub(super) fn uuid_bytes(&self) -> Result<Option<[u8; 16]>, String> {
        let Some(text) = &self.uuid else { return Ok(None) };
        match u128::from_str_radix(text, 16) {
            Ok(uuid) if text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Ok(Some(uuid.to_be_bytes()))
            }
            _ => Err(format!("uuid {text:?}, expected 32 hexadecimal digits")),
        }
    }
}

impl CheckpointBlock {
    fn check(&self) -> Result<(), String> {
        let name = BlockName::try_from(self.idstr.as_str()).map_err(|invalid| invalid.to_string())?;
        if self.page_size != PAGE as u64 {
            return Err(format!("block {name}: page size {}, expected {PAGE}", self.page_size));
        }
        if self.length == 0 || !self.length.is_multiple_of(self.page_size) {
            return Err(format!("block {name}: length {}, expected whole pages", self.length));
        }
        let plain = self
            .file
            .strip_prefix("ram/")
            .is_some_and(|file| !file.is_empty() && !file.contains('/') && file != "..");
        if plain { Ok(()) } else { Err(format!("block {name}: file {:?}, expected ram/NAME", self.file)) }
    }
}
