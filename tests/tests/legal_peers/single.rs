//! Everything on main.

use multifd_tests::peer::{Codec, Lane, Memory, Recorder, Recording, Step, Style, SyncPoints};
use multifd_tests::{Outcome, ZeroPages};
use multifd_wire::{BlockRef, Command, HELLO_PING, Item, PageSize, RamRecord, ReturnMessage};

use crate::fixture::{arrives, style_arrives};

#[test]
fn names_in_full_or_by_continue() -> Outcome {
    for full_names in [false, true] {
        for zero_pages in [ZeroPages::Legacy, ZeroPages::None] {
            style_arrives(&Style { full_names, zero_pages, ..Style::default() })?;
            style_arrives(&Style { full_names, zero_pages, ..Style::multifd(2) })?;
        }
    }
    Ok(())
}

#[test]
fn continue_goes_on_over_sections_and_rounds() -> Outcome {
    let memory = Memory::small(4);
    let mut recorder = Recorder::new(Style::default());
    recorder.setup(&memory);
    // After the first page, no record has a name any more.
    let (bios, ram): (Vec<_>, Vec<_>) = memory.all().into_iter().partition(|at| at.block == 1);
    recorder.part(&memory, &ram);
    recorder.part(&memory, &bios);
    (0..10).for_each(|_| recorder.part(&memory, &bios));
    recorder.end(&memory, &bios);
    let recording = recorder.finish();
    let names = String::from_utf8_lossy(&recording.bytes(Lane::Main)).matches("pc.bios").count();
    assert_eq!(names, 2, "in the list of blocks and in one record");
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn flush_without_channels() -> Outcome {
    let machine = "pc-q35-8.1";
    let style = Style { machine, stray_flush: true, ..Style::default() };
    style_arrives(&style)?;
    // Not in START, only later.
    let mut memory = Memory::small(1);
    let recording = Recorder::migration(style, &mut memory).without("flush", 0);
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn differences_over_several_rounds() -> Outcome {
    let style = Style { xbzrle: true, ..Style::default() };
    style_arrives(&style)?;
    let mut memory = Memory::small(6);
    let mut recorder = Recorder::new(style);
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    for round in 0..8 {
        let pages = memory.every(3, round % 3);
        memory.touch(&pages, u8::try_from(round + 1)?);
        recorder.part(&memory, &pages);
    }
    recorder.end(&memory, &[]);
    let recording = recorder.finish();
    let deltas =
        recording.steps.iter().filter(|step| matches!(step, Step::Send { what: "delta", .. })).count();
    assert!(deltas > 500, "{deltas} deltas");
    let (verdict, _) = arrives(&recording, &memory)?;
    assert_eq!(verdict.result?.progress.pages_xbzrle, deltas as u64);
    Ok(())
}

#[test]
fn older_and_newer_machines() -> Outcome {
    for machine in ["pc-i440fx-7.2", "pc-q35-8.0", "pc-q35-9.0", "microvm", "virt-10.1"] {
        for sync in [SyncPoints::PerRound, SyncPoints::PerSection] {
            style_arrives(&Style { machine, sync, ..Style::default() })?;
        }
    }
    Ok(())
}

#[test]
fn writes_may_end_anywhere() -> Outcome {
    let styles =
        [Style { xbzrle: true, ..Style::default() }, Style { codec: Codec::Zstd, ..Style::multifd(2) }];
    for style in styles {
        for len in [1, 7, 4096] {
            let mut memory = Memory::zero(&[("pc.ram", 3), ("a block", 1)]);
            memory.refill(&memory.all(), 11);
            arrives(&Recorder::migration(style.clone(), &mut memory).in_pieces(len), &memory)?;
        }
    }
    Ok(())
}

#[test]
fn all_of_main_in_one_write() -> Outcome {
    let mut memory = Memory::small(15);
    let recording = Recorder::migration(Style { xbzrle: true, ..Style::default() }, &mut memory);
    let bytes = recording.bytes(Lane::Main);
    arrives(&Recording { ending: recording.ending, ..Recording::of_main(&bytes) }, &memory)?;
    Ok(())
}

#[test]
fn a_page_again_and_again_without_a_sync_point() -> Outcome {
    let mut memory = Memory::zero(&[("pc.ram", 2)]);
    let mut recorder = Recorder::new(Style::default());
    recorder.setup(&memory);
    for seed in 0..50 {
        let pages = memory.all();
        memory.refill(&pages, seed);
        recorder.pages(&memory, &pages);
    }
    // Without PART before them, the records are still in START: a place for pages that no QEMU
    // uses.
    let recording = recorder.recording();
    let (before, records) = recording.steps.split_at(recording.position("footer", 0) + 1);
    let mut recorder = Recorder::new(Style::default());
    recorder.end(&memory, &[]);
    let end = recorder.finish();
    let part = |record: RamRecord| {
        let mut bytes = Vec::new();
        Item::SectionPart(multifd_wire::SectionId(7)).encode(&mut bytes);
        record.encode(PageSize::K4, &mut bytes);
        Step::Send { lane: Lane::Main, what: "part", bytes }
    };
    let first = RamRecord::Zero { offset: 0, block: BlockRef::Named("pc.ram".try_into()?) };
    let close = &recording.steps[recording.position("end of section", 0)..=recording.position("footer", 0)];
    let steps = [before, &[part(first)], records, close, &end.steps].concat();
    arrives(&Recording { steps, ..end }, &memory)?;
    Ok(())
}

#[test]
fn the_return_path_answers_every_ping_and_a_repeated_opening() -> Outcome {
    let memory = Memory::zero(&[("pc.ram", 1)]);
    let mut recorder = Recorder::new(Style { machine: "pc-q35-8.0", ..Style::default() });
    recorder.header();
    recorder.command(Command::OpenReturnPath);
    recorder.command(Command::Ping(HELLO_PING));
    recorder.start(&memory);
    recorder.command(Command::Ping(u32::MAX));
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    recorder.command(Command::Ping(0));
    let (verdict, _) = arrives(&recorder.finish(), &memory)?;
    let pongs = [1, HELLO_PING, u32::MAX, 0].map(ReturnMessage::Pong);
    let [one, ours, most, zero] = pongs;
    let [hello, said @ ..] = &verdict.replies[1..] else { panic!("{:?}", verdict.replies) };
    assert_eq!(verdict.replies[0], one);
    assert!(matches!(hello, ReturnMessage::Hello(_)), "{hello:?}");
    // To a source that speaks the dialect: signs of life, and how long loading took.
    let ours_alone =
        |reply: &&ReturnMessage| matches!(reply, ReturnMessage::Alive | ReturnMessage::Loaded(_));
    let others: Vec<_> = said.iter().filter(|reply| !ours_alone(reply)).collect();
    assert_eq!(others, [&ours, &most, &zero, &ReturnMessage::Shut(0)]);
    assert!(matches!(said, [.., ReturnMessage::Loaded(_), ReturnMessage::Shut(0)]), "{said:?}");
    Ok(())
}

#[test]
fn switchover_is_acknowledged_to_machines_that_know_of_it() -> Outcome {
    for (machine, wanted) in [
        ("pc-q35-8.0", false),
        ("pc-q35-8.1", true),
        ("pc-i440fx-10.0", true),
        ("pc-q35-11.0", true),
        ("pc-q35-11.1", false),
        ("pc-q35-noble", false),
        ("firecracker-9.1", false),
    ] {
        let mut memory = Memory::zero(&[("pc.ram", 1)]);
        let style = Style { machine, switchover_start: true, ..Style::default() };
        let (verdict, _) = arrives(&Recorder::migration(style, &mut memory), &memory)?;
        let acknowledged = verdict.replies.contains(&ReturnMessage::SwitchoverAck);
        assert_eq!(acknowledged, wanted, "{machine}: {:?}", verdict.replies);
    }
    Ok(())
}

#[test]
fn a_source_that_waits_for_the_acknowledgement_gets_one_whatever_its_machine_type() -> Outcome {
    for machine in ["pc-q35-7.2", "pc-q35-noble", "pc-q35-11.1"] {
        let style = Style { machine, ..Style::default() };
        let memory = Memory::small(3);
        let mut recorder = Recorder::new(style);
        recorder.setup(&memory);
        recorder.part(&memory, &memory.all());
        let mut empty = Recorder::new(Style { machine, ..Style::default() });
        empty.empty_part();
        let idle = empty.recording().bytes(Lane::Main);
        recorder.end(&memory, &[]);
        let recording = recorder.finish().preceded("end", 0, [Step::UntilAcknowledged(idle)]);
        let (verdict, _) = arrives(&recording, &memory)?;
        let acknowledged =
            verdict.replies.iter().filter(|reply| **reply == ReturnMessage::SwitchoverAck).count();
        assert_eq!(acknowledged, 1, "{machine}: {:?}", verdict.replies);
    }
    Ok(())
}
