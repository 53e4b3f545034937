//! The same for `multifd receive`, once for each class: exit code, texts, what is on disk.

use std::time::Duration;

use multifd_tests::peer::command::{ReceiveTrial, ended, interrupt, names};
use multifd_tests::peer::{Ending, Lane, Memory, Recorder, Recording, Style, field};
use multifd_tests::{Multifd, Outcome, Scratch};
use multifd_wire::ReturnMessage;
use serde_json::Value;

use crate::fixture::{multifd, recording, single};

/// A source without a return path.
fn unasked() -> Recording {
    recording(&Style { return_path: false, ..Style::default() })
}

#[test]
fn each_class_ends_with_exit_code_1_and_nothing_on_disk() -> Outcome {
    let silent = Recording { steps: Vec::new(), ending: Ending::Wait };
    let cases = [
        ("magic", single().patched("header", 0, 0, b"HTTP"), "magic 0x48545450"),
        ("silence", single().stopped(Lane::Main, 0), "no main channel on unix:"),
        ("silent", silent, "no main channel on unix:"),
        ("cut", multifd().cut(Lane::Channel(1), 3000), "channel 1 (unix:"),
        ("main cut", unasked().cut(Lane::Main, 300), "main (unix:"),
        ("duplicate", multifd().patched("hello", 1, 24, &[0]), "channel id 0 is taken"),
        ("packet", multifd().patched("packet", 0, field::NORMAL_PAGES + 2, &[1]), "pages in a packet: 264"),
        ("record", single().inserted("page", 0, &[0, 0, 0, 0, 0, 0, 4, 0]), "ram record: 0x400"),
        ("blocks", single().patched("block", 0, 0, &[0]), "block name: 0 bytes"),
        (
            "device state",
            unasked().cut(Lane::Main, unasked().bytes(Lane::Main).len() - 5),
            "within device state",
        ),
    ];
    for (class, recording, says) in cases {
        let mut receive = ReceiveTrial::start(&["--timeout", "300ms"])?;
        let (ended, _) = receive.play(&recording, |_| Ok(()))?;
        assert_eq!(ended.code, 1, "{class}: {}", ended.stderr);
        assert!(ended.stderr.contains(says), "{class}: {}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{class}: {}", ended.stderr);
        assert_eq!(ended.json["status"], "failed", "{class}");
        assert!(
            ended.json["error"].as_str().is_some_and(|text| text.contains(says)),
            "{class}: {}",
            ended.json
        );
        assert_eq!(receive.left()?, Vec::<String>::new(), "{class}");
    }
    Ok(())
}

/// A hold is for a source that is silent between rounds, not for one that stops in the middle of
/// something.
#[test]
fn a_source_that_stalls_within_an_item_ends_by_the_timeout_whatever_hold_is_allowed() -> Outcome {
    let mut receive = ReceiveTrial::start(&["--timeout", "4s", "--hold-timeout", "1h"])?;
    let (ended, _) = receive.play(&single().stopped(Lane::Main, 3000), |_| Ok(()))?;
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("no byte moved for 4s"), "{}", ended.stderr);
    Ok(())
}

#[test]
fn a_source_that_asked_is_told_of_the_failure() -> Outcome {
    let mut receive = ReceiveTrial::start(&["--timeout", "300ms"])?;
    let (ended, heard) = receive.play(&single().patched("footer", 1, 4, &[9]), |_| Ok(()))?;
    assert_eq!(ended.code, 1);
    assert_eq!(heard.replies.last(), Some(&ReturnMessage::Shut(1)), "{:?}", heard.replies);
    Ok(())
}

#[test]
fn ctrl_c_ends_a_receive_at_once_wherever_it_is() -> Outcome {
    let whole = multifd();
    let silent = Recording { steps: Vec::new(), ending: Ending::Wait };
    let places = [
        silent,
        whole.clone().stopped(Lane::Main, 0),
        whole.clone().stopped(Lane::Main, 150),
        whole.stopped(Lane::Channel(0), 2000),
    ];
    for recording in places {
        let mut receive = ReceiveTrial::start(&[])?;
        // Waits for less time than the command's timeout is.
        let (ended, _) = receive.play(&recording, interrupt)?;
        assert_eq!(ended.code, 130, "{}", ended.stderr);
        assert_eq!(ended.json["status"], "cancelled");
        assert_eq!(receive.left()?, Vec::<String>::new());
    }
    Ok(())
}

/// Until the command has said it on stderr.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn progress_is_told_without_a_terminal_while_the_source_has_stopped() -> Outcome {
    for (how, says) in
        [("auto", "round 0  "), ("lines", " of 40.0 KiB  wire "), ("json", "\"event\":\"progress\"")]
    {
        let mut receive = ReceiveTrial::start(&["--progress", how])?;
        let (ended, _) = receive.play(&single().stopped(Lane::Main, 20_000), |process| {
            process.stderr().wait_for(says, 0, SOON)?;
            interrupt(process)
        })?;
        assert_eq!(ended.code, 130, "{how}: {}", ended.stderr);
        let mut events = ended.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let last = events.next_back().map(|event| (event["event"].clone(), event["ram_bytes"].clone()));
        assert_eq!(last, (how == "json").then(|| ("end".into(), 40_960.into())), "{how}: {}", ended.stderr);
    }
    Ok(())
}

#[test]
fn what_a_peer_calls_its_blocks_does_not_reach_the_terminal() -> Outcome {
    let mut receive = ReceiveTrial::start(&["--timeout", "300ms"])?;
    let mut memory = Memory::zero(&[("\u{1b}]0;x\u{7}\r\nmultifd: all is well", 2)]);
    memory.refill(&memory.all(), 1);
    let mut recorder = Recorder::new(Style { return_path: false, ..Style::default() });
    recorder.setup(&memory);
    // One page is missing, and is named with its block.
    recorder.part(&memory, &memory.all()[..1]);
    recorder.end(&memory, &[]);
    let (ended, _) = receive.play(&recorder.finish(), |_| Ok(()))?;
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!ended.stderr.contains(control), "{:?}", ended.stderr);
    assert!(ended.stderr.contains("multifd: all is well"), "{:?}", ended.stderr);
    assert!(!ended.stderr.lines().any(|line| line.starts_with("multifd: all")), "{:?}", ended.stderr);
    Ok(())
}

#[test]
fn an_existing_directory_is_refused_and_left_alone() -> Outcome {
    let scratch = Scratch::new()?;
    for name in ["empty", "full", "file"] {
        let out = scratch.path(name);
        match name {
            "empty" => std::fs::create_dir(&out)?,
            "full" => std::fs::create_dir_all(out.join("ram"))?,
            _ => std::fs::write(&out, "text")?,
        }
        let (uri, out) = (scratch.unix_uri("socket"), out.display().to_string());
        let mut receive = Multifd::spawn("receive", ["receive", &uri, "--out", &out, "--json"])?;
        let ended = ended(&mut receive)?;
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(&format!("{out} exists")), "{}", ended.stderr);
    }
    let mut left = names(scratch.dir())?;
    left.sort();
    assert_eq!(left, ["empty", "file", "full"]);
    Ok(())
}

#[test]
fn an_address_or_a_folder_that_cannot_be_had_leaves_nothing() -> Outcome {
    let scratch = Scratch::new()?;
    let taken = scratch.unix_uri("taken");
    let _listener = std::os::unix::net::UnixListener::bind(scratch.path("taken"))?;
    let out = |name: &str| scratch.path(name).display().to_string();
    let cases =
        [(taken.as_str(), out("out"), "listen on"), ("tcp:127.0.0.1:0", out("no/such/folder"), "no/such")];
    for (uri, out, says) in cases {
        let mut receive = Multifd::spawn("receive", ["receive", uri, "--out", &out, "--json"])?;
        let ended = ended(&mut receive)?;
        assert_eq!((ended.code, &ended.json["status"]), (1, &"failed".into()), "{}", ended.stderr);
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    }
    assert_eq!(names(scratch.dir())?, ["taken"]);
    Ok(())
}

#[test]
fn a_sound_source_is_served() -> Outcome {
    let mut memory = Memory::small(3);
    let recording = Recorder::migration(Style::multifd(3), &mut memory);
    let mut receive = ReceiveTrial::start(&["--timeout", "10s"])?;
    let (ended, heard) = receive.play(&recording, |_| Ok(()))?;
    assert_eq!((ended.code, &ended.json["status"]), (0, &"completed".into()), "{}", ended.stderr);
    assert_eq!(heard.replies.last(), Some(&ReturnMessage::Shut(0)));
    assert_eq!(receive.left()?, ["checkpoint"]);
    memory.check_checkpoint(&receive.checkpoint())
}
