//! Connections in any order and of any speed; which of two copies of a page wins.

use std::time::Duration;

use multifd_tests::peer::{Codec, Lane, Memory, PAGE, PageAt, Recorder, Recording, Step, Style, Trial};
use multifd_tests::{Outcome, ZeroPages};

use crate::fixture::{TIMEOUT, arrives};

const A_WHILE: Duration = Duration::from_millis(60);

fn sample(channels: u8) -> (Recording, Memory) {
    let mut memory = Memory::small(12);
    let recording = Recorder::migration(Style::multifd(channels), &mut memory);
    (recording, memory)
}

#[test]
fn lanes_connect_in_any_order() -> Outcome {
    let [main, one, two, three] = [Lane::Main, Lane::Channel(0), Lane::Channel(1), Lane::Channel(2)];
    for order in
        [[main, one, two, three], [three, two, one, main], [two, main, three, one], [one, three, main, two]]
    {
        let (recording, memory) = sample(3);
        arrives(&recording.connecting(order), &memory)?;
    }
    Ok(())
}

#[test]
fn main_connects_last() -> Outcome {
    let (recording, memory) = sample(2);
    let recording = recording.preceded("header", 0, [Step::Pause(A_WHILE)]);
    arrives(&recording, &memory)?;
    Ok(())
}

/// Puts the hello and the first SYNC of a channel, which connects at once, after what main has sent
/// up to `what`.
fn hello_after(mut recording: Recording, channel: usize, what: &str) -> Recording {
    let sync = recording.steps.remove(recording.position("sync", channel));
    let hello = recording.steps.remove(recording.position("hello", channel));
    let lanes = [Lane::Main, Lane::Channel(0), Lane::Channel(1), Lane::Channel(2)];
    recording.preceded(what, 0, [Step::Pause(A_WHILE), hello, sync]).connecting(lanes)
}

#[test]
fn a_hello_is_late() -> Outcome {
    for channel in 0..3 {
        for what in ["header", "start", "flush", "part"] {
            let (recording, memory) = sample(3);
            arrives(&hello_after(recording, channel, what), &memory)?;
        }
    }
    Ok(())
}

#[test]
fn the_list_of_blocks_is_overtaken_by_pages() -> Outcome {
    // The first sync point of the channels is held back with main, so that they are at their first
    // page when it comes.
    let (recording, memory) = sample(2);
    arrives(&recording.preceded("block", 0, [Step::Pause(A_WHILE)]), &memory)?;
    Ok(())
}

#[test]
fn a_connection_without_a_word_is_no_channel() -> Outcome {
    let (recording, memory) = sample(2);
    let stranger = Lane::Channel(200);
    let steps = [Step::Connect(stranger), Step::HangUp(stranger)];
    arrives(&recording.preceded("start", 0, steps), &memory)?;
    Ok(())
}

#[test]
fn numbers_of_channels_have_no_order() -> Outcome {
    let (recording, memory) = sample(4);
    let recording =
        (0..4).fold(recording, |recording, id| recording.patched("hello", id.into(), 24, &[3 - id]));
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn the_largest_number_of_channels() -> Outcome {
    for trial in [Trial::unix()?, Trial::tcp()?] {
        let trial = trial.patient(TIMEOUT);
        let mut memory = Memory::small(13);
        let recording = Recorder::migration(Style { packet_pages: 1, ..Style::multifd(255) }, &mut memory);
        let main_first = recording.clone().connecting([Lane::Main]);
        for recording in [recording, main_first] {
            let (verdict, received) = trial.receive(&recording, &memory)?;
            assert_eq!(verdict.result?.progress.channels, 255);
            memory.check(&received.blocks)?;
        }
    }
    Ok(())
}

const PAGE_0: PageAt = PageAt { block: 0, page: 0 };

/// Two copies of one page, one sync point between them, the older one on a channel that is slower.
fn copies(style: Style, newer: [u8; PAGE]) -> Outcome {
    let mut memory = Memory::zero(&[("pc.ram", 1)]);
    let mut recorder = Recorder::new(style);
    recorder.setup(&memory);
    memory.set(PAGE_0, &[0x11; PAGE]);
    recorder.part(&memory, &[PAGE_0]);
    memory.set(PAGE_0, &newer);
    recorder.part(&memory, &[PAGE_0]);
    recorder.end(&memory, &[]);
    let mut recording = recorder.finish();
    // The older copy's bytes, and all that its channel says later, come after everything that main
    // and the other channel have to say in the meantime.
    let older = recording.position("payload", 0);
    let late = recording.steps.split_off(older);
    let of_channel_0 = |step: &Step| matches!(step, Step::Send { lane: Lane::Channel(0), .. });
    let (slow, fast): (Vec<_>, Vec<_>) = late.into_iter().partition(of_channel_0);
    recording.steps.extend(fast);
    recording.steps.push(Step::Pause(A_WHILE));
    recording.steps.extend(slow);
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn the_newest_copy_of_a_page_wins_whatever_its_channel() -> Outcome {
    for codec in [Codec::None, Codec::Zlib, Codec::Zstd] {
        for zero_pages in [ZeroPages::Legacy, ZeroPages::Multifd, ZeroPages::None] {
            for newer in [[0; PAGE], [0x22; PAGE]] {
                copies(Style { codec, zero_pages, ..Style::multifd(2) }, newer)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_long_round_may_leave_main_silent() -> Outcome {
    let memory = Memory::small(14);
    let mut recorder = Recorder::new(Style::multifd(2));
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    let mut recording = recorder.finish();
    // Each packet comes long before the limit; all of them together take twice as long as it.
    let (limit, packets) = (Duration::from_secs(1), 12);
    for nth in (0..packets).rev() {
        recording = recording.preceded("packet", usize::try_from(nth)?, [Step::Pause(limit * 2 / packets)]);
    }
    let (verdict, received) = Trial::unix()?.patient(limit).receive(&recording, &memory)?;
    verdict.result?;
    memory.check(&received.blocks)?;
    assert!(verdict.took > limit * 2, "{:?}", verdict.took);
    Ok(())
}
