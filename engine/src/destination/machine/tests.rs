//! The machine and the rules of sync points together: a destination without sockets, under a clock
//! that the test moves.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::destination::channels::sync_state::{MainWait, SyncState};
use crate::error::ErrorKind;

mod bitmaps;
mod postcopy;
mod resumption;

const RAM: SectionId = SectionId(2);
const TIMEOUT: Duration = Duration::from_secs(60);

/// What the driver and the workers do, less bytes, threads and waits.
struct Session {
    machine: Machine,
    sync: SyncState,
    now: Instant,
    pages: u64,
    /// Main at a sync point, and what it does behind it.
    waiting: Option<(MainWait, Vec<Effect>)>,
    done: Vec<Effect>,
}

impl Session {
    fn new(two_way: bool) -> Self {
        Self {
            machine: Machine::new(two_way, SwitchoverAck::Auto, None),
            sync: SyncState::new(None),
            now: Instant::now(),
            pages: 0,
            waiting: None,
            done: Vec::new(),
        }
    }

    /// Main's next input. The sync point before it must have been passed.
    fn main(&mut self, input: Input) -> Result<()> {
        assert!(self.waiting.is_none(), "main is at a sync point");
        let has_channels = self.sync.has_channels();
        let observed = Observed { now: self.now, pages: self.pages, has_channels };
        let effects = self.machine.on(input, &observed)?;
        self.perform(effects)
    }

    fn perform(&mut self, effects: Vec<Effect>) -> Result<()> {
        let mut effects = effects.into_iter();
        while let Some(effect) = effects.next() {
            let is_sync_point = effect == Effect::SyncPoint;
            self.done.push(effect);
            if is_sync_point {
                let wait = MainWait::new(&self.sync, TIMEOUT, self.now);
                self.waiting = Some((wait, effects.collect()));
                return self.poll();
            }
        }
        Ok(())
    }

    /// Main goes on, if it can.
    fn poll(&mut self) -> Result<()> {
        let Some((mut wait, effects)) = self.waiting.take() else { return Ok(()) };
        match self.sync.poll(&mut wait, self.now) {
            None => {
                self.waiting = Some((wait, effects));
                Ok(())
            }
            Some(passed) => passed.and_then(|()| self.perform(effects)),
        }
    }

    /// All of these, which must not wait.
    fn run(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<()> {
        inputs.into_iter().try_for_each(|input| self.main(input))
    }

    fn join(&mut self, id: u8) {
        self.sync.join(id).unwrap();
    }

    fn is_done(&self) -> bool {
        self.waiting.is_none() && matches!(self.machine.expects(), Ok(Expected::Tail { .. }))
    }

    fn answers(&self) -> Vec<&ReturnMessage> {
        let answers = self.done.iter().filter_map(|effect| match effect {
            Effect::Answer(_, message) => Some(message),
            _ => None,
        });
        answers.collect()
    }
}

fn configuration(machine: &str) -> Input {
    Input::Configuration(Configuration::new(machine))
}

fn command(command: Command) -> Input {
    Input::Item(Item::Command(command))
}

fn head(idstr: &str, id: SectionId) -> SectionHead {
    SectionHead { id, idstr: idstr.to_owned(), instance_id: 0, version_id: RAM_SECTION_VERSION }
}

fn device(id: u32) -> Input {
    Input::Item(Item::SectionFull(head("virtio-mem", SectionId(id))))
}

/// A piece of RAM with a sync point.
fn piece(item: Item) -> Vec<Input> {
    let mut inputs = vec![Input::Item(item)];
    if matches!(inputs[0], Input::Item(Item::SectionStart(_))) {
        inputs.push(Input::Blocks);
    }
    inputs.extend([Input::Flush, Input::EndOfRecords, Input::Footer(RAM)]);
    inputs
}

fn start() -> Vec<Input> {
    piece(Item::SectionStart(head(RAM_SECTION, RAM)))
}

fn part() -> Vec<Input> {
    piece(Item::SectionPart(RAM))
}

/// A PART without records.
fn empty_part() -> Vec<Input> {
    vec![Input::Item(Item::SectionPart(RAM)), Input::EndOfRecords, Input::Footer(RAM)]
}

/// All of a migration with `rounds` sync points, up to the devices' part.
fn stream(rounds: usize) -> Vec<Input> {
    let mut inputs = vec![
        configuration("pc-q35-10.0"),
        command(Command::OpenReturnPath),
        command(Command::Ping(HELLO_PING)),
        device(40),
        Input::Device(DeviceEnd::Footer),
    ];
    inputs.extend(start());
    (2..rounds).for_each(|_| inputs.extend(part()));
    inputs.push(command(Command::SwitchoverStart));
    inputs.extend(piece(Item::SectionEnd(RAM)));
    inputs.push(device(3));
    inputs
}

#[test]
fn a_whole_stream_is_answered_in_order_and_ends_at_the_devices() {
    let mut session = Session::new(true);
    session.run(stream(4)).unwrap();
    assert!(session.is_done());
    let hello = ReturnMessage::Hello(Hello { version: dialect::VERSION, features: dialect::FEATURES });
    let expected = [
        Effect::OpenReturnPath,
        Effect::Answer(Phase::Setup, ReturnMessage::SwitchoverAck),
        Effect::SpeakDialect,
        Effect::Answer(Phase::Setup, hello),
        Effect::Answer(Phase::Active, ReturnMessage::Pong(HELLO_PING)),
        Effect::KeepEarly { within_ram: false },
        Effect::SyncPoint,
        Effect::CountRound,
        Effect::SyncPoint,
        Effect::CountRound,
        Effect::SyncPoint,
        Effect::CountRound,
        Effect::SyncPoint,
    ];
    assert_eq!(session.done, expected);
    let facts = session.machine.facts();
    assert!(facts.switchover_start && facts.guest_stopped == Some(session.now));
}

/// Loss: what comes instead of the next item is the end of the items.
#[test]
fn the_end_of_the_items_anywhere_before_the_end_of_ram_is_refused() {
    let whole = stream(4);
    for len in 0..whole.len() - 1 {
        let mut session = Session::new(true);
        session.run(whole[..len].to_vec()).unwrap();
        assert!(!session.is_done(), "after {len} inputs");
        if session.machine.expects().unwrap() == Expected::Item {
            let error = session.main(Input::Item(Item::Eof)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerMisbehaved, "after {len} inputs: {error}");
            assert!(!session.is_done());
        }
    }
    let mut session = Session::new(true);
    session.run(whole[..whole.len() - 1].to_vec()).unwrap();
    session.main(Input::Item(Item::Eof)).unwrap();
    assert!(session.is_done(), "behind END, there may be no device at all");
}

/// Only a stream that is not answered, without channels, may do without an END of RAM: a background
/// snapshot.
#[test]
fn a_stream_without_an_end_of_ram_needs_no_return_path_and_no_channels() {
    for (two_way, opens, channels, taken) in [
        (false, false, false, true),
        (true, false, false, true),
        (false, true, false, false),
        (true, true, false, false),
        (false, false, true, false),
    ] {
        let mut session = Session::new(two_way);
        session.main(configuration("microvm")).unwrap();
        if opens {
            session.main(command(Command::OpenReturnPath)).unwrap();
        }
        if channels {
            session.join(0);
            session.sync.arrive(0).unwrap();
        }
        session.run(start()).unwrap();
        session.run([device(9), Input::Device(DeviceEnd::Stream)]).map_or_else(
            |error| assert!(!taken && error.to_string().contains("no END of ram"), "{error}"),
            |()| assert!(taken && session.is_done()),
        );
    }
}

#[test]
fn an_input_that_was_not_expected_is_a_bug_and_the_last_one() {
    let whole = stream(3);
    let kinds = [
        configuration("microvm"),
        Input::Blocks,
        Input::Device(DeviceEnd::Footer),
        Input::EndOfRecords,
        Input::Flush,
        Input::Footer(RAM),
        command(Command::SwitchoverStart),
    ];
    for len in 0..=whole.len() {
        for input in &kinds {
            let mut session = Session::new(true);
            session.run(whole[..len].to_vec()).unwrap();
            let fits = matches!(
                (session.machine.expects().unwrap(), input),
                (Expected::Records { .. }, Input::EndOfRecords | Input::Flush)
                    | (Expected::Blocks { .. }, Input::Blocks)
                    | (Expected::Configuration, Input::Configuration(_))
                    | (Expected::Device { .. }, Input::Device(_))
                    | (Expected::Footer, Input::Footer(_))
                    | (Expected::Item, Input::Item(_))
            );
            let Err(error) = session.main(input.clone()) else {
                assert!(fits, "{input:?} after {len} inputs");
                continue;
            };
            assert!(!fits, "{input:?} after {len} inputs: {error}");
            assert_eq!(error.kind(), ErrorKind::Bug);
            assert!(session.machine.expects().is_err(), "it goes on after an error");
        }
    }
}

#[test]
fn items_out_of_order_are_the_peers_fault() {
    let item = |item| vec![Input::Item(item)];
    let begun = || [vec![configuration("microvm")], start()].concat();
    let ended = || [begun(), piece(Item::SectionEnd(RAM))].concat();
    let other = SectionId(7);
    for (before, then, expected) in [
        (vec![configuration("microvm")], item(Item::SectionPart(RAM)), "was never started"),
        (begun(), start(), "a second START of ram"),
        (begun(), item(Item::SectionPart(other)), "the only live section is ram"),
        (begun(), item(Item::SectionFull(head("cpu", RAM))), "a device with the number of ram"),
        (ended(), item(Item::SectionPart(RAM)), "more of ram after its END"),
        (begun(), vec![command(Command::Ping(1))], "asked for before OPEN_RETURN_PATH"),
        (
            begun(),
            vec![Input::Item(Item::SectionPart(RAM)), Input::EndOfRecords, Input::Footer(other)],
            "footer of section 7",
        ),
        (vec![configuration("microvm")], item(Item::SectionStart(head("cpu", RAM))), "only ram is supported"),
        (vec![configuration("microvm")], item(Item::SectionStart(head("block", other))), "capability block"),
        (begun(), vec![command(Command::PostcopyAdvise(None))], "postcopy-ram"),
        (begun(), vec![command(Command::PostcopyRun)], "is not supported"),
    ] {
        let mut session = Session::new(true);
        session.run(before).unwrap();
        let error = session.run(then).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(matches!(error.kind(), ErrorKind::PeerMisbehaved | ErrorKind::Incompatible), "{error}");
    }
}

#[test]
fn wishes_are_heeded_and_digests_compared_for_a_source_that_was_told_what_this_end_can_do() {
    let wishes = Wishes { checksums: true, digest: true, mixed: false };
    let block = || BlockName::try_from("pc.ram").unwrap();
    let digest = || command(Command::Digest { block: block(), digest: 7 });
    let [asks, wishing] = [HELLO_PING, wishes.ping()].map(|value| command(Command::Ping(value)));
    let opening = || vec![configuration("microvm"), command(Command::OpenReturnPath)];
    let end = || [start(), piece(Item::SectionEnd(RAM))].concat();

    let mut session = Session::new(true);
    session.run([opening(), vec![asks.clone(), wishing.clone()], end(), vec![digest()]].concat()).unwrap();
    assert!(session.done.contains(&Effect::Heed(wishes)), "{:?}", session.done);
    assert_eq!(session.done.last(), Some(&Effect::Compare { block: block(), digest: 7 }));

    // A recorded stream, whose source was told by another destination.
    let mut recorded = Session::new(false);
    recorded.run([opening(), vec![asks.clone(), wishing.clone()], end(), vec![digest()]].concat()).unwrap();
    let checks = |effect: &Effect| matches!(effect, Effect::Heed(_) | Effect::Compare { .. });
    assert!(!recorded.done.iter().any(checks), "{:?}", recorded.done);

    // A source that asks for no HELLO says nothing of the dialect: its PING is one as any other.
    let mut stranger = Session::new(true);
    stranger.run([opening(), vec![wishing.clone()], end()].concat()).unwrap();
    assert!(!stranger.done.iter().any(checks), "{:?}", stranger.done);
    let error = stranger.run([digest()]).unwrap_err();
    assert!(error.to_string().contains("from a source that has asked for no HELLO"), "{error}");

    let mut early = Session::new(true);
    early.run([opening(), vec![asks, wishing], start()].concat()).unwrap();
    let error = early.run([digest()]).unwrap_err();
    assert!(error.to_string().contains("a digest of RAM block pc.ram before the END of ram"), "{error}");
}

#[test]
fn a_source_that_has_nothing_to_send_is_acknowledged_after_a_second_and_once() {
    let mut session = Session::new(true);
    session.run([configuration("microvm"), command(Command::OpenReturnPath)]).unwrap();
    session.run(start()).unwrap();
    // The clock stands: however many PARTs come.
    (0..100).for_each(|_| session.run(empty_part()).unwrap());
    assert_eq!(session.answers(), Vec::<&ReturnMessage>::new());
    session.now += Duration::from_millis(999);
    session.run(empty_part()).unwrap();
    assert_eq!(session.answers(), Vec::<&ReturnMessage>::new());
    // A page puts it off for another second.
    session.pages += 1;
    session.run(empty_part()).unwrap();
    for _ in 0..19 {
        session.now += Duration::from_millis(50);
        session.run(empty_part()).unwrap();
    }
    assert_eq!(session.answers(), Vec::<&ReturnMessage>::new());
    for _ in 0..100 {
        session.now += Duration::from_millis(50);
        session.run(empty_part()).unwrap();
    }
    assert_eq!(session.answers(), [&ReturnMessage::SwitchoverAck]);
}

/// Pages of a PART may still be on their way on a channel, until the channel's SYNC.
#[test]
fn with_channels_only_parts_behind_a_sync_point_show_that_nothing_is_sent() {
    let mut session = Session::new(true);
    session.join(0);
    session.sync.arrive(0).unwrap();
    session.run([configuration("microvm"), command(Command::OpenReturnPath)]).unwrap();
    session.run(start()).unwrap();
    session.run(empty_part()).unwrap();
    for _ in 0..100 {
        session.now += Duration::from_millis(50);
        session.run(empty_part()).unwrap();
    }
    assert_eq!(session.answers(), Vec::<&ReturnMessage>::new());
    for _ in 0..30 {
        session.now += Duration::from_millis(50);
        session.sync.arrive(0).unwrap();
        session.run(part()).unwrap();
    }
    assert_eq!(session.answers(), [&ReturnMessage::SwitchoverAck]);
}

#[test]
fn a_channel_that_is_silent_for_the_timeout_fails_the_sync_point_and_one_that_moves_does_not() {
    let mut session = Session::new(true);
    (0..2).for_each(|id| session.join(id));
    session.main(configuration("microvm")).unwrap();
    session.sync.arrive(0).unwrap();
    session.run(start().into_iter().take(3)).unwrap();
    for _ in 0..5 {
        session.now += TIMEOUT - Duration::from_secs(1);
        session.poll().unwrap();
        session.sync.progressed(1);
        session.now += Duration::from_secs(1);
        session.poll().unwrap();
        assert!(session.waiting.is_some());
    }
    // The first look may find what moved before.
    let silent = |_| {
        session.now += TIMEOUT + TIMEOUT / 2;
        session.poll().err()
    };
    let error = (0..2).find_map(silent).unwrap();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert!(error.to_string().contains("no SYNC within 60s from channel 1"), "{error}");
}

#[test]
fn a_connection_that_never_says_what_it_is_holds_up_a_sync_point_for_five_seconds() {
    let mut session = Session::new(true);
    session.sync.opened();
    session.main(configuration("microvm")).unwrap();
    session.run(start().into_iter().take(3)).unwrap();
    session.now += Duration::from_millis(4999);
    session.poll().unwrap();
    assert!(session.waiting.is_some());
    session.now += Duration::from_millis(1);
    session.poll().unwrap();
    assert!(session.waiting.is_none());
    session.run(start().into_iter().skip(3)).unwrap();
    // The guest may be paused at the next one: what was waited for in vain is not waited for again.
    let mut wait = MainWait::new(&session.sync, TIMEOUT, session.now);
    assert!(session.sync.poll(&mut wait, session.now).is_some());
}

#[test]
fn a_channel_that_ends_before_its_sync_fails_main_at_once() {
    let mut session = Session::new(true);
    (0..2).for_each(|id| session.join(id));
    session.main(configuration("microvm")).unwrap();
    session.sync.arrive(0).unwrap();
    session.run(start().into_iter().take(3)).unwrap();
    session.sync.ended(1);
    let error = session.poll().unwrap_err();
    assert_eq!((error.kind(), error.channel()), (ErrorKind::Transport, Some("channel 1")));
}

/// A channel of the pair: its packets by round, each closed by a SYNC.
#[derive(Clone, Copy, Debug)]
struct Lane {
    joined: bool,
    /// The round that it sends, from 1.
    round: u64,
    /// Pages of the round that have gone, on this channel or another.
    sent: usize,
    /// The sync point that it waits at.
    at: Option<u64>,
}

const PAGES: usize = 6;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Every page is sent in every round, on another channel each time: the last round must win,
    /// whatever the order in which channels and main are read.
    #[test]
    fn the_newest_copy_of_every_page_wins_in_any_order_of_channels(
        channels in 1_u8..5,
        rounds in 2_usize..6,
        choices in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut session = Session::new(true);
        (0..channels).for_each(|_| session.sync.opened());
        let mut main = stream(rounds).into_iter();
        let mut lanes = vec![Lane { joined: false, round: 1, sent: 0, at: None }; channels.into()];
        let mut memory = [0; PAGES];
        let rounds = rounds as u64;
        // Whatever the choices have left is done in turns.
        for choice in choices.into_iter().chain((0..=u8::MAX).cycle().take(4000)) {
            let actor = usize::from(choice) % (lanes.len() + 1);
            let Some(lane) = lanes.get_mut(actor) else {
                session.poll().unwrap();
                if session.waiting.is_none() {
                    main.next().map_or(Ok(()), |input| session.main(input)).unwrap();
                }
                continue;
            };
            let id = u8::try_from(actor).unwrap();
            match lane.at {
                _ if !lane.joined => {
                    session.sync.join(id).unwrap();
                    session.sync.identified();
                    lane.joined = true;
                }
                Some(point) if !session.sync.may_pass(point) => {}
                Some(_) => (lane.at, lane.sent, lane.round) = (None, 0, lane.round + 1),
                None if lane.round > rounds => {}
                None if lane.sent < PAGES => {
                    // This page of the round goes on this channel, or on another.
                    let page = lane.sent;
                    if (page as u64 + lane.round) % u64::from(channels) == u64::from(id) {
                        memory[page] = lane.round;
                        session.sync.progressed(id);
                    }
                    lane.sent += 1;
                }
                None => lane.at = Some(session.sync.arrive(id).unwrap()),
            }
        }
        prop_assert!(session.is_done(), "{:?}", session.machine.expects());
        prop_assert_eq!(memory, [rounds; PAGES]);
    }
}
