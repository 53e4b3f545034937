//! Post-copy: what may come when, and what it leads to.

use multifd_wire::{Advise, BlockName, DiscardRange};

use super::*;

const DEVICES: SectionId = SectionId(5);

fn allowed() -> Session {
    let mut session = Session::new(true);
    session.machine = Machine::new(true, SwitchoverAck::Never, Some(1 << 20));
    session
}

fn advise(target_page: u64) -> Input {
    command(Command::PostcopyAdvise(Some(Advise { page_sizes: 0x1000, target_page })))
}

fn discard() -> Input {
    let ranges = vec![DiscardRange { offset: 0, len: 0x1000 }];
    command(Command::RamDiscard { block: BlockName::try_from("pc.ram").unwrap(), ranges })
}

fn advised() -> Vec<Input> {
    let mut inputs = vec![configuration("pc-q35-10.0"), command(Command::OpenReturnPath), advise(0x1000)];
    inputs.extend(start());
    inputs.extend(part());
    inputs
}

/// A package with the PINGs of a QEMU from 10.2 on.
fn package() -> Vec<Input> {
    vec![
        command(Command::Packaged(1000)),
        Input::Package,
        command(Command::PostcopyListen),
        Input::Item(Item::SectionFull(head("cpu", DEVICES))),
        Input::Devices,
        command(Command::Ping(3)),
        command(Command::Ping(0x42)),
        command(Command::PostcopyRun),
    ]
}

fn switched() -> Vec<Input> {
    [advised(), vec![command(Command::SwitchoverStart), discard(), command(Command::Ping(2))], package()]
        .concat()
}

#[test]
fn a_source_switches_and_its_last_page_ends_the_stream() {
    let mut session = allowed();
    session.run(switched()).unwrap();
    assert!(session.machine.has_switched() && session.machine.facts().guest_stopped.is_some());
    let pong = |value| Effect::Answer(Phase::Active, ReturnMessage::Pong(value));
    let (ranges, block) =
        (vec![DiscardRange { offset: 0, len: 0x1000 }], BlockName::try_from("pc.ram").unwrap());
    let expected = [
        Effect::OpenReturnPath,
        Effect::KeepListening,
        Effect::SyncPoint,
        Effect::CountRound,
        Effect::SyncPoint,
        Effect::Discard { block, ranges },
        pong(2),
        Effect::Listen,
        Effect::AnswerWhenLoaded(3),
        Effect::AnswerWhenLoaded(0x42),
        Effect::Run,
    ];
    assert_eq!(session.done, expected);
    session.done.clear();
    session.run([command(Command::Ping(4))]).unwrap();
    session.run(empty_part()).unwrap();
    session.run([Input::Item(Item::SectionEnd(RAM)), Input::EndOfRecords, Input::Footer(RAM)]).unwrap();
    session.run([Input::Item(Item::Eof)]).unwrap();
    assert_eq!(session.machine.expects().unwrap(), Expected::End);
    assert_eq!(session.done, [pong(4)], "no channel is waited for");
}

#[test]
fn a_source_that_may_switch_can_end_as_a_precopy() {
    let mut session = allowed();
    session.run(advised()).unwrap();
    session.run(piece(Item::SectionEnd(RAM))).unwrap();
    session.main(device(3)).unwrap();
    assert!(session.is_done() && !session.machine.has_switched());
}

/// Capability dirty-bitmaps of QEMU, which is on and has no bitmap, or postcopy-ram is off.
#[test]
fn a_source_that_may_move_dirty_bitmaps_and_has_none_is_a_precopy() {
    for mut session in [allowed(), Session::new(true)] {
        session.run([configuration("pc-q35-10.0"), command(Command::OpenReturnPath)]).unwrap();
        session.main(command(Command::PostcopyAdvise(None))).unwrap();
        session.run(start()).unwrap();
        session.run(part()).unwrap();
        session.run(piece(Item::SectionEnd(RAM))).unwrap();
        session.main(device(3)).unwrap();
        assert!(session.is_done() && !session.machine.has_switched());
    }
}

#[test]
fn steps_of_a_postcopy_out_of_order_are_the_peers_fault() {
    let open = || vec![configuration("pc-q35-10.0"), command(Command::OpenReturnPath)];
    let listening = || [advised(), package()[..3].to_vec()].concat();
    let run = || vec![command(Command::PostcopyRun)];
    for (before, then, expected) in [
        (vec![configuration("pc-q35-10.0")], vec![advise(0x1000)], "has not opened the return path"),
        (open(), vec![advise(0x4000)], "pages of 16384 bytes at the source"),
        ([open(), start()].concat(), vec![command(Command::PostcopyAdvise(None))], "capability postcopy-ram"),
        (open(), vec![command(Command::PostcopyAdvise(None)), command(Command::Packaged(5))], "is Allowed"),
        ([open(), vec![advise(0x1000)]].concat(), vec![advise(0x1000)], "out of order"),
        ([open(), start()].concat(), vec![advise(0x1000)], "switch off capability postcopy-ram"),
        ([open(), start()].concat(), vec![discard()], "post-copy is Allowed"),
        ([open(), vec![advise(0x1000)]].concat(), vec![discard()], "before ram"),
        ([open(), start()].concat(), vec![command(Command::Packaged(5))], "post-copy is Allowed"),
        (advised(), vec![command(Command::Packaged(u32::MAX))], "a package of 4294967295 bytes"),
        (advised(), vec![command(Command::Packaged(0))], "a package of 0 bytes"),
        (advised(), vec![command(Command::PostcopyListen)], "PostcopyListen out of order"),
        (advised(), run(), "PostcopyRun out of order"),
        (advised(), vec![command(Command::PostcopyResume)], "PostcopyResume out of order"),
        ([advised(), package()[..2].to_vec()].concat(), run(), "in a package, out of order"),
        ([advised(), package()[..2].to_vec()].concat(), package()[3..4].to_vec(), "out of order"),
        (listening(), vec![command(Command::PostcopyListen)], "PostcopyListen) in a package"),
        (listening(), vec![Input::Item(Item::SectionPart(RAM))], "in a package"),
        (listening(), vec![command(Command::Packaged(9))], "in a package"),
        (
            listening(),
            vec![Input::Item(Item::SectionFull(head("cpu", RAM)))],
            "a device with the number of ram",
        ),
        (switched(), vec![discard()], "post-copy is Running"),
        (switched(), vec![command(Command::Packaged(9))], "post-copy is Running"),
        (switched(), vec![device(9)], "the devices are here"),
        (switched(), vec![Input::Item(Item::Eof)], "no END of ram before it"),
        (switched(), vec![command(Command::PostcopyResume)], "PostcopyResume out of order"),
        (switched(), start(), "a second START of ram"),
    ] {
        let mut session = allowed();
        session.run(before).unwrap();
        let error = session.run(then).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(matches!(error.kind(), ErrorKind::PeerMisbehaved | ErrorKind::Incompatible), "{error}");
    }
}

/// What was sent on a channel before the switch is in its place when pages are discarded, and what
/// is sent behind it is not read before memory is armed.
#[test]
fn the_channels_meet_at_the_switch_before_anything_is_discarded() {
    let channels = || command(Command::PostcopyChannels);
    let mut session = allowed();
    session.run(advised()).unwrap();
    session.done.clear();
    session.run([channels(), discard(), command(Command::Ping(0x6d66_6131))]).unwrap();
    session.run(package()).unwrap();
    assert!(matches!(session.done[..3], [Effect::HoldChannels, Effect::Discard { .. }, Effect::Answer(..)]));
    assert_eq!(session.done[3], Effect::Listen);
    let held = || [advised(), vec![channels()]].concat();
    for (before, then, expected) in [
        ([advised(), vec![discard()]].concat(), channels(), "PostcopyChannels out of order"),
        (held(), channels(), "PostcopyChannels out of order"),
        (switched(), channels(), "PostcopyChannels out of order"),
        (vec![configuration("pc-q35-10.0")], channels(), "before ram"),
        (held(), Input::Item(Item::SectionPart(RAM)), "between the sync point at the switch and the package"),
        (held(), Input::Item(Item::SectionEnd(RAM)), "between the sync point at the switch and the package"),
        (held(), device(9), "between the sync point at the switch and the package"),
    ] {
        let mut session = allowed();
        session.run(before).unwrap();
        let error = session.main(then).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(error.kind(), ErrorKind::PeerMisbehaved);
    }
}

#[test]
fn a_source_that_may_switch_is_refused_by_name_where_that_is_not_wanted() {
    let mut session = Session::new(true);
    session.run([configuration("pc-q35-10.0"), command(Command::OpenReturnPath)]).unwrap();
    let error = session.main(advise(0x1000)).unwrap_err().to_string();
    for says in ["not allowed here: allow it", "switch off capability postcopy-ram at the source"] {
        assert!(error.contains(says), "{error}");
    }
}

/// Wherever the link breaks, and whatever has become of the machine.
#[test]
fn over_a_new_link_bitmaps_are_asked_for_and_pages_go_on() {
    let end = [Input::Item(Item::SectionEnd(RAM)), Input::EndOfRecords, Input::Footer(RAM)];
    for cut in 0..=end.len() {
        let mut session = allowed();
        session.run(switched()).unwrap();
        session.run(end[..cut].to_vec()).unwrap();
        // Twice: a recovery breaks, too.
        for _ in 0..2 {
            session.machine.recover().unwrap();
            session.done.clear();
            let block = BlockName::try_from("pc.ram").unwrap();
            session
                .run([command(Command::RecvBitmap(block.clone())), command(Command::PostcopyResume)])
                .unwrap();
            assert_eq!(session.done, [Effect::SendBitmap(block), Effect::Resume]);
            session.run(empty_part()).unwrap();
        }
        session.run(end.to_vec()).unwrap();
        session.run([Input::Item(Item::Eof)]).unwrap();
        assert_eq!(session.machine.expects().unwrap(), Expected::End);
    }
    let mut failed = allowed();
    failed.run(switched()).unwrap();
    failed.main(device(9)).unwrap_err();
    failed.machine.recover().unwrap();
    failed.run(empty_part()).unwrap();
    let mut early = allowed();
    early.run(advised()).unwrap();
    assert_eq!(early.machine.recover().unwrap_err().kind(), ErrorKind::Bug);
}

/// The connection for urgent pages of a machine type up to 7.2, which speaks behind the switch.
#[test]
fn a_connection_for_urgent_pages_holds_up_no_sync_point_of_a_source_without_channels() {
    let mut session = Session::new(true);
    session.sync.opened();
    let now = session.now;
    let passes = |whole_pages_on_main: bool, sync: &mut SyncState| {
        let mut wait = MainWait::new(sync, TIMEOUT, now).past_urgent(sync, whole_pages_on_main);
        sync.poll(&mut wait, now).is_some()
    };
    assert!(passes(false, &mut session.sync), "no page comes before the first");
    assert!(!passes(false, &mut session.sync), "zero pages of a source with channels come on main, too");
    assert!(passes(true, &mut session.sync));
    let mut with_channel = Session::new(true).sync;
    with_channel.opened();
    with_channel.join(0).unwrap();
    assert!(!passes(true, &mut with_channel));
}
