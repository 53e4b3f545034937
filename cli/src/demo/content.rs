//! A guest that was made up: RAM with the kinds of content that real guests have, and no devices.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use multifd_engine::{CheckpointBlock, Manifest, PAGE};
use multifd_wire::Configuration;

const MACHINE: &str = "multifd-demo-1.0";

/// Pages of one kind in a row: guests allocate in runs, too.
const RUN_PAGES: u64 = 64;

/// Writes a checkpoint of a guest with `ram` bytes, rounded down to whole pages.
pub(crate) fn checkpoint(directory: &Path, ram: u64) -> Result<(), Box<dyn std::error::Error>> {
    let length = ram / PAGE as u64 * PAGE as u64;
    if length == 0 {
        return Err(format!("{ram} bytes of RAM, expected at least one page of {PAGE}").into());
    }
    fs::create_dir_all(directory.join("ram"))?;
    let file = OpenOptions::new().create_new(true).write(true).open(directory.join("ram/00.img"))?;
    file.set_len(length)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for run in 0..(length / PAGE as u64).div_ceil(RUN_PAGES) {
        let pages = RUN_PAGES.min(length / PAGE as u64 - run * RUN_PAGES);
        let content = content(&mut random, usize::try_from(pages)? * PAGE);
        if !content.is_empty() {
            file.write_all_at(&content, run * RUN_PAGES * PAGE as u64)?;
        }
    }
    let mut state = Vec::new();
    Configuration { machine: MACHINE.to_owned(), page_bits: None, capabilities: Vec::new(), uuid: None }
        .encode(&mut state);
    // No devices: the end of the stream follows at once, with an empty description.
    let description = br#"{"page_size": 4096, "devices": []}"#;
    state.extend_from_slice(&[0x00, 0x06]);
    state.extend_from_slice(&u32::try_from(description.len())?.to_be_bytes());
    state.extend_from_slice(description);
    fs::write(directory.join("device-state.bin"), state)?;
    let manifest = Manifest {
        format: 1,
        machine: MACHINE.to_owned(),
        uuid: None,
        switchover_start: false,
        blocks: vec![CheckpointBlock {
            idstr: "demo.ram".to_owned(),
            length,
            page_size: PAGE as u64,
            file: "ram/00.img".to_owned(),
        }],
        source: "generated".to_owned(),
        codec: "none".to_owned(),
        channels: 0,
        created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        total_ms: 0,
    };
    fs::write(directory.join("manifest.json"), serde_json::to_vec_pretty(&manifest)?)?;
    Ok(())
}

/// A run of one kind: nothing (40 %), text (25 %), heap-like (25 %), random (10 %).
fn content(random: &mut Random, len: usize) -> Vec<u8> {
    match random.below(20) {
        0..8 => Vec::new(),
        8..13 => text(random, len),
        13..18 => heap(random, len),
        _ => (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect(),
    }
}

fn text(random: &mut Random, len: usize) -> Vec<u8> {
    const WORDS: [&str; 12] = [
        "page ",
        "guest ",
        "the ",
        "of ",
        "memory\n",
        "channel ",
        "0x7f ",
        "error: ",
        "a ",
        "migration ",
        "is ",
        "dirty ",
    ];
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        out.extend_from_slice(WORDS.get(random.below(12)).unwrap_or(&" ").as_bytes());
    }
    out.truncate(len);
    out
}

/// Pointers into a few arenas, small numbers, zeros.
fn heap(random: &mut Random, len: usize) -> Vec<u8> {
    let word = |random: &mut Random| match random.below(4) {
        0 => 0x0000_7f3a_0000_0000 | (random.next() & 0x00ff_fff0),
        1 => random.next() & 0xff,
        _ => 0,
    };
    (0..len / 8).flat_map(|_| word(random).to_le_bytes()).collect()
}

/// xorshift64*: good enough to look like data, the same at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> usize {
        usize::try_from(self.next() % limit).unwrap_or(0)
    }
}
