//! Packets, codecs and sync points, as ten years of senders make them.

use multifd_tests::peer::{Codec, Memory, Recorder, Style, SyncPackets, SyncPoints, Trial};
use multifd_tests::{Outcome, ZeroPages};
use multifd_wire::{CodecId, PacketFlags, PageSize, RamPacketHeader};

use crate::fixture::{TIMEOUT, arrives, style_arrives};

#[test]
fn every_way_to_pack_pages() -> Outcome {
    for codec in Codec::ALL {
        for (channels, packet_pages) in [(1, 128), (2, 1), (3, 16)] {
            style_arrives(&Style { codec, packet_pages, ..Style::multifd(channels) })?;
        }
    }
    Ok(())
}

#[test]
fn the_same_over_tcp() -> Outcome {
    for (channels, codec) in [(0, Codec::None), (1, Codec::None), (3, Codec::Zlib), (3, Codec::Zstd)] {
        let mut memory = Memory::small(16);
        let recording = Recorder::migration(Style { codec, ..Style::multifd(channels) }, &mut memory);
        let (verdict, received) = Trial::tcp()?.patient(TIMEOUT).receive(&recording, &memory)?;
        verdict.result?;
        memory.check(&received.blocks)?;
    }
    Ok(())
}

#[test]
fn every_form_of_sync_with_either_kind_of_sync_point() -> Outcome {
    for sync_packets in [SyncPackets::Clean, SyncPackets::Stale, SyncPackets::WithPages] {
        for (sync, machine) in
            [(SyncPoints::PerRound, "pc-q35-8.2"), (SyncPoints::PerSection, "pc-i440fx-7.2")]
        {
            for codec in [Codec::None, Codec::Zlib, Codec::Zstd] {
                for channels in [1, 3] {
                    let zero_pages = ZeroPages::Legacy;
                    let style =
                        Style { machine, sync, sync_packets, codec, zero_pages, ..Style::multifd(channels) };
                    style_arrives(&style)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_last_sync_that_main_knows_nothing_of() -> Outcome {
    for return_path in [false, true] {
        let machine = "pc-q35-9.2";
        style_arrives(&Style { machine, unmatched_sync: true, return_path, ..Style::multifd(3) })?;
    }
    Ok(())
}

#[test]
fn an_allocation_of_a_hundred_packets() -> Outcome {
    for pages_alloc_factor in [2, 100] {
        style_arrives(&Style { pages_alloc_factor, ..Style::multifd(2) })?;
    }
    Ok(())
}

#[test]
fn many_rounds_in_one_part_and_parts_without_any() -> Outcome {
    for channels in [0, 2] {
        let mut memory = Memory::small(2);
        let mut recorder = Recorder::new(Style::multifd(channels));
        recorder.setup(&memory);
        recorder.empty_part();
        let mut rounds = vec![(memory.clone(), memory.all())];
        for seed in 0..5 {
            let some = memory.every(4, 1);
            memory.refill(&some, seed);
            rounds.push((memory.clone(), some));
        }
        recorder.rounds(&rounds);
        (0..50).for_each(|_| recorder.empty_part());
        recorder.rounds(&[(memory.clone(), Vec::new()), (memory.clone(), Vec::new())]);
        recorder.end(&memory, &[]);
        arrives(&recorder.finish(), &memory)?;
    }
    Ok(())
}

#[test]
fn packets_with_nothing_in_them() -> Outcome {
    let mut memory = Memory::small(3);
    let mut recording = Recorder::migration(Style { codec: Codec::Zstd, ..Style::multifd(1) }, &mut memory);
    for flags in [CodecId::NONE, CodecId::ZSTD].map(PacketFlags::pages) {
        let mut empty = Vec::new();
        RamPacketHeader { flags, packet_num: 9, block: None, normal: &[], zero: &[], payload_len: 0 }
            .encode(PageSize::K4, &mut empty);
        recording = recording.inserted("packet", 2, &empty).inserted("sync", 1, &empty);
    }
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn a_hundred_rounds_on_two_channels() -> Outcome {
    let mut memory = Memory::zero(&[("pc.ram", 8)]);
    let mut recorder = Recorder::new(Style { packet_pages: 1, codec: Codec::Zlib, ..Style::multifd(2) });
    recorder.setup(&memory);
    for seed in 0..100 {
        let pages = memory.every(1 + usize::from(seed % 3 == 0), 0);
        memory.refill(&pages, seed);
        recorder.part(&memory, &pages);
    }
    recorder.end(&memory, &[]);
    arrives(&recorder.finish(), &memory)?;
    Ok(())
}
