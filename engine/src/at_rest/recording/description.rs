//! The description of the device sections. It is the last thing in a stream, but tells how to read
//! what comes before it: so it is looked for from the end of the file. Spec: docs/wire.md §16.2.

use std::sync::Arc;

use multifd_wire::{ItemType, MAX_VMDESC, VmDescription};

use super::file::StreamFile;
use crate::error::{Phase, Result};

/// A description, and where in the file it lies, its type byte included.
#[derive(Clone, Debug)]
pub(super) struct Described {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) description: Arc<VmDescription>,
}

/// Type byte and length.
const LEAD: usize = 5;
const VM_DESCRIPTION: u8 = ItemType::VmDescription.byte();

/// Bytes read at a time when looking for the last zero byte.
const STEP: usize = 64 << 10;

/// The description that ends with the file; `None` if there is none. Then the stream may have one,
/// with bytes behind it.
///
/// JSON has no zero byte, but the EOF byte before the description is one, and most lengths have
/// one: the last zero byte of the file is one of these.
pub(super) fn at_end(file: &StreamFile) -> Result<Option<Described>> {
    let Some(zero) = last_zero(file)? else { return Ok(None) };
    let after_eof = zero + 1;
    let within_length = (1..LEAD as u64).filter_map(|back| zero.checked_sub(back));
    for start in within_length.chain([after_eof]) {
        let Some(end) = text_end(file, start)? else { continue };
        if end == file.len()
            && let Ok(described) = read(file, start, end)?
        {
            return Ok(Some(described));
        }
    }
    Ok(None)
}

/// The description that begins at `start`, if one does.
pub(super) fn at(file: &StreamFile, start: u64) -> Result<Option<Described>> {
    let Some(end) = text_end(file, start)? else { return Ok(None) };
    if end > file.len() {
        let have = file.len();
        let detail = format!(
            "the file ends at byte {have}, the description at byte {start} should reach to byte {end}"
        );
        return Err(super::invalid(Phase::Device, detail));
    }
    read(file, start, end)?.map(Some).map_err(|error| {
        super::invalid(Phase::Device, format!("the description at byte {start} is invalid")).because(error)
    })
}

/// Where the text ends, if `start` looks like the beginning of a description. The JSON of one
/// begins with a brace.
fn text_end(file: &StreamFile, start: u64) -> Result<Option<u64>> {
    let mut lead = [0; LEAD + 1];
    let count = file.read_at(&mut lead, start)?;
    Ok(match lead {
        [VM_DESCRIPTION, a, b, c, d, b'{'] if count == lead.len() => {
            let len = u32::from_be_bytes([a, b, c, d]);
            (len <= MAX_VMDESC).then(|| start + LEAD as u64 + u64::from(len))
        }
        _ => None,
    })
}

/// The outer error is of the file, the inner one of the text, which is at most [`MAX_VMDESC`] long.
fn read(file: &StreamFile, start: u64, end: u64) -> Result<Result<Described, multifd_wire::Invalid>> {
    let text_start = start + LEAD as u64;
    let mut text = vec![0; usize::try_from(end - text_start).unwrap_or(0)];
    let count = file.read_at(&mut text, text_start)?;
    text.truncate(count);
    let described = |description| Described { start, end, description: Arc::new(description) };
    Ok(VmDescription::parse(&text).map(described))
}

/// Where the last zero byte is, if it is near enough to the end to have a description behind it.
fn last_zero(file: &StreamFile) -> Result<Option<u64>> {
    let farthest = file.len().saturating_sub(u64::from(MAX_VMDESC) + LEAD as u64 + 1);
    let mut buffer = [0; STEP];
    let mut end = file.len();
    while end > farthest {
        let start = end.saturating_sub(STEP as u64).max(farthest);
        let (bytes, _) = buffer.split_at_mut(usize::try_from(end - start).unwrap_or(0));
        let count = file.read_at(bytes, start)?;
        if let Some(at) = bytes.iter().take(count).rposition(|byte| *byte == 0) {
            return Ok(Some(start + at as u64));
        }
        end = start;
    }
    Ok(None)
}
