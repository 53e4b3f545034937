//! The list of RAM blocks.

use multifd_engine::{Destination, RamBlock};
use multifd_tests::Outcome;
use multifd_tests::peer::command::ReceiveTrial;
use multifd_tests::peer::{Lane, Memory, Recording, TIMEOUT, Trial};
use multifd_wire::{BlockEntry, BlockName};

use crate::fixture::{memory, refused, single};

fn entry(name: &str, used_len: u64) -> Vec<u8> {
    let name = BlockName::try_from(name).unwrap();
    let mut bytes = Vec::new();
    BlockEntry { name, used_len, page_size: None, guest_address: None, mapped_ram: None }.encode(&mut bytes);
    bytes
}

/// A list with this total and these blocks.
fn list(total: u64, blocks: &[(&str, u64)]) -> Recording {
    let blocks: Vec<u8> = blocks.iter().flat_map(|(name, len)| entry(name, *len)).collect();
    let list = single().replaced("total", 0, &(total | 4).to_be_bytes()).replaced("block", 0, &blocks);
    list.without("block", 1)
}

#[test]
fn a_list_that_cannot_be() -> Outcome {
    let length = "length of a ram block: ";
    refused([
        (
            "less than its blocks",
            list(0x8000, &[("a", 0x7000), ("b", 0x2000)]),
            &["main", length, "8192 bytes for b, expected at most the 4096 that are left"],
        ),
        ("no length", list(0x8000, &[("a", 0)]), &[length, "0 bytes for a"]),
        (
            "half a page",
            list(0x8000, &[("a", 0x800)]),
            &[length, "2048 bytes for a, expected a multiple of 4096"],
        ),
        (
            "one name twice",
            list(0x8000, &[("a", 0x4000), ("a", 0x4000)]),
            &["ram block: a, expected each name once"],
        ),
        (
            "no name",
            single().patched("block", 0, 0, &[0]),
            &["the list of RAM blocks at byte", "block name: 0 bytes"],
        ),
        (
            "a NUL in a name",
            single().patched("block", 0, 2, &[0]),
            &["block name: p\\x00.ram, expected no NUL byte"],
        ),
        ("no list", single().without("total", 0), &["main", "the list of RAM blocks"]),
        (
            "another record",
            single().inserted("total", 0, &[0, 0, 0, 0, 0, 0, 2, 0]),
            &["Flush, expected the list of RAM blocks"],
        ),
    ])
}

#[test]
fn a_total_beyond_its_blocks_takes_what_follows_for_a_name() -> Outcome {
    refused([("more than its blocks", list(0x1_0000, &[("a", 0x7000), ("b", 0x2000)]), &["main (unix:"])])
}

#[test]
fn lengths_that_no_machine_has() -> Outcome {
    for len in [1 << 47, 1 << 62, !0xfff] {
        refused([(
            "a huge block",
            list(len, &[("pc.ram", len)]),
            &["no memory for the source's RAM blocks", "ram/00.img"],
        )])?;
    }
    Ok(())
}

#[test]
fn a_length_alone_costs_no_memory() -> Outcome {
    // 64 TiB fit in a sparse file and in the address space. They are announced and never come.
    let len = 1 << 46;
    let recording = list(len, &[("pc.ram", len)]);
    let list = recording.boundaries(Lane::Main)[recording.position("block", 0)];
    let mut receive = ReceiveTrial::start(&["--timeout", "300ms"])?;
    let (ended, _) = receive.play(&recording.stopped(Lane::Main, list), |_| Ok(()))?;
    assert_eq!(ended.code, 1);
    let peak = ended.usage.peak_resident_bytes;
    assert!(peak < 100 << 20, "{peak} bytes for nothing: {}", ended.stderr);
    Ok(())
}

#[test]
fn more_blocks_than_any_machine_has() -> Outcome {
    let names: Vec<String> = (0..4097).map(|number| format!("block{number}")).collect();
    let blocks: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 0x1000)).collect();
    let recording = list(4097 << 12, &blocks);
    refused([("4097 blocks", recording, &["ram blocks: 4097, expected at most 4096"])])
}

/// Refused by a destination whose memory is there already.
fn unfit(here: Vec<RamBlock>, says: &str) -> Outcome {
    let destination = Destination::builder(here).timeout(TIMEOUT);
    let verdict = Trial::unix()?.run(&single(), destination, |arrived| arrived.accept())?;
    let error = verdict.result.unwrap_err().chain();
    assert!(error.contains(says) && error.contains("setup, main (unix:"), "{error}");
    Ok(())
}

#[test]
fn blocks_that_do_not_fit_this_machine() -> Outcome {
    unfit(Memory::zero(&[("pc.ram", 8)]).provide(0)?, "RAM block pc.bios is unknown here")?;
    unfit(
        Memory::zero(&[("pc.ram", 8), ("pc.bios", 1)]).provide(0)?,
        "RAM block pc.bios has 8192 bytes at the source, 4096 here",
    )?;
    unfit(Vec::new(), "RAM block pc.ram is unknown here")?;
    assert_eq!(memory().total(), 10 << 12);
    Ok(())
}
