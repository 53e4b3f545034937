//! Signals at any time, and limits of the process: what ends cleanly, and with which exit code.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use multifd_tests::peer::command::ended;
use multifd_tests::peer::{Lane, Memory, Recorder, Style};
use multifd_tests::process::Signal;
use multifd_tests::{Multifd, Outcome, Process, Receive, Scratch};
use multifd_wire::ReturnMessage;

use crate::SOON;
use crate::commands::{check_gone, line_of};
use crate::verdicts::Place;

/// `multifd receive URI` by a shell that does something before.
fn receive_after(before: &str, place: &Place, uri: &str) -> Outcome<Process> {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{before}; exec \"$0\" \"$@\"")]).arg(Multifd::binary()?);
    shell.args(["receive", uri, "--out", &place.checkpoint(), "--json"]);
    Process::spawn("receive", shell.stdin(Stdio::null()).stdout(Stdio::piped()))
}

fn received(place: &Place) -> Outcome {
    place.memory.check_checkpoint(&place.scratch.path("out/guest"))
}

#[test]
fn what_a_dropped_terminal_sends_cancels_as_ctrl_c_does() -> Outcome {
    let place = Place::new(false)?;
    let (stream, number, checkpoint) = (place.path("stream"), place.path("number"), place.checkpoint());
    for signal in [Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT] {
        let command = format!("exec:echo $$ > {number}; head -c 9000 {stream}; exec sleep 1000");
        let arguments = ["receive", &command, "--out", &checkpoint, "--json"];
        let mut receive = Multifd::spawn("receive", arguments)?;
        let shell = line_of(Path::new(&number))?;
        receive.signal(signal)?;
        let cancelled = ended(&mut receive)?;
        assert_eq!((cancelled.code, &cancelled.json["status"]), (130, &"cancelled".into()), "{signal:?}");
        check_gone(&shell)?;
        place.check_nothing_left()?;
        std::fs::remove_file(&number)?;
    }
    Ok(())
}

#[test]
fn signals_that_the_parent_has_blocked_cancel_all_the_same() -> Outcome {
    let place = Place::new(false)?;
    let (uri, checkpoint) = (place.scratch.unix_uri("socket"), place.checkpoint());
    for signal in ["TERM", "HUP", "INT"] {
        let mut env = Command::new("env");
        env.arg(format!("--block-signal={signal}")).arg(Multifd::binary()?);
        env.args(["receive", &uri, "--out", &checkpoint, "--json"]);
        let mut receive = Process::spawn("receive", env.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        receive.stderr().wait_for("listening on ", 0, SOON)?;
        receive.signal(match signal {
            "TERM" => Signal::TERM,
            "HUP" => Signal::HUP,
            _ => Signal::INT,
        })?;
        assert_eq!(ended(&mut receive)?.code, 130, "{signal}");
    }
    Ok(())
}

#[test]
fn a_save_to_a_file_that_is_hung_up_leaves_no_file() -> Outcome {
    let place = Place::new(false)?;
    let (stream, checkpoint) = (format!("file:{}", place.path("stream")), place.checkpoint());
    let mut receive = Multifd::spawn("receive", ["receive", &stream, "--out", &checkpoint, "--json"])?;
    assert_eq!(ended(&mut receive)?.code, 0);
    let file = place.scratch.path("saved");
    let uri = format!("file:{}", file.display());
    let arguments = ["send", &checkpoint, &uri, "--json", "--max-bandwidth", "4K"];
    let mut send = Multifd::spawn("send", arguments)?;
    let begun = Instant::now();
    while !file.exists() {
        assert!(begun.elapsed() < SOON, "no file");
        thread::yield_now();
    }
    send.signal(Signal::HUP)?;
    assert_eq!(ended(&mut send)?.code, 130);
    assert!(!file.exists());
    Ok(())
}

#[test]
fn a_signal_before_the_migration_begins_is_not_lost() -> Outcome {
    let place = Place::new(false)?;
    let checkpoint = place.checkpoint();
    // The command is started before the migration is there that could be cancelled.
    let arguments = ["receive", "exec:kill -INT $PPID; exec sleep 1000", "--out", &checkpoint, "--json"];
    let cancelled = ended(&mut Multifd::spawn("receive", arguments)?)?;
    assert_eq!(
        (cancelled.code, &cancelled.json["status"]),
        (130, &"cancelled".into()),
        "{}",
        cancelled.stderr
    );
    place.check_nothing_left()
}

#[test]
fn a_command_that_was_started_by_nohup_is_not_hung_up() -> Outcome {
    let place = Place::new(false)?;
    let uri = format!("exec:kill -HUP $PPID; cat {}", place.path("stream"));
    let ended = ended(&mut receive_after("trap '' HUP", &place, &uri)?)?;
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    received(&place)
}

#[test]
fn a_checkpoint_that_the_limit_of_file_sizes_forbids_is_an_error_as_on_a_full_disk() -> Outcome {
    let place = Place::new(false)?;
    let uri = format!("file:{}", place.path("stream"));
    let refused = ended(&mut receive_after("ulimit -f 1", &place, &uri)?)?;
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("File too large"), "{}", refused.stderr);
    place.check_nothing_left()
}

#[test]
fn a_standard_error_that_takes_nothing_is_no_reason_to_fail() -> Outcome {
    let place = Place::new(false)?;
    let uri = format!("exec:cat {}", place.path("stream"));
    let ended = ended(&mut receive_after("exec 2> /dev/full", &place, &uri)?)?;
    assert_eq!(ended.code, 0, "{}", ended.json);
    received(&place)
}

/// Reads the return path up to the SHUT that confirms the guest.
fn read_to_success(main: &mut UnixStream) -> Outcome {
    let mut success = Vec::new();
    ReturnMessage::Shut(0).encode(&mut success);
    let (mut heard, mut byte) = (Vec::new(), [0]);
    main.set_read_timeout(Some(SOON))?;
    while !heard.ends_with(&success) {
        main.read_exact(&mut byte)?;
        heard.extend(byte);
    }
    Ok(())
}

#[test]
fn two_signals_after_the_source_was_told_of_success_end_with_exit_code_0() -> Outcome {
    let (scratch, mut memory) = (Scratch::new()?, Memory::small(9));
    let recording = Recorder::migration(Style::multifd(2), &mut memory);
    let mut receive = Receive::listen(&scratch.unix_uri("socket"), &scratch.path("guest"))?;
    // They stay open: the destination waits for their end.
    let mut sockets = Vec::new();
    thread::scope(|scope| -> Outcome {
        let lanes = [Lane::Main, Lane::Channel(0), Lane::Channel(1)];
        // All of them first, as a source does: from the first sync point on nothing listens.
        for _ in lanes {
            sockets.push(UnixStream::connect(scratch.path("socket"))?);
        }
        for (lane, socket) in lanes.into_iter().zip(&sockets) {
            let (mut socket, bytes) = (socket.try_clone()?, recording.bytes(lane));
            scope.spawn(move || socket.write_all(&bytes));
        }
        read_to_success(&mut sockets[0])
    })?;
    let process = receive.process();
    process.signal(Signal::TERM)?;
    process.stderr().wait_for("multifd: the guest is handed over already", 0, SOON)?;
    process.signal(Signal::TERM)?;
    let ended = ended(process)?;
    assert_eq!((ended.code, &ended.json["status"]), (0, &"completed".into()), "{}", ended.stderr);
    memory.check_checkpoint(&scratch.path("guest"))
}

#[test]
fn two_signals_while_a_command_passes_on_the_answer_end_it_with_exit_code_3() -> Outcome {
    let place = Place::new(true)?;
    let (number, checkpoint) = (place.path("number"), place.checkpoint());
    // It answers nothing to what it is told, and never ends.
    let command = format!("exec:cat {}; echo $$ > {number}; exec sleep 1000", place.path("stream"));
    let mut receive = Multifd::spawn("receive", ["receive", &command, "--out", &checkpoint, "--json"])?;
    let shell = line_of(Path::new(&number))?;
    let begun = Instant::now();
    while !Path::new(&checkpoint).exists() {
        assert!(begun.elapsed() < SOON, "no checkpoint");
        thread::yield_now();
    }
    receive.signal(Signal::INT)?;
    receive.stderr().wait_for("multifd: the guest is handed over already", 0, SOON)?;
    receive.signal(Signal::INT)?;
    let ended = ended(&mut receive)?;
    // On a slow machine the command may have been given up before the second signal: it was not
    // needed any more.
    let given_up = ended.stderr.contains("did not end within");
    assert_eq!(ended.code, if given_up { 0 } else { 3 }, "{}", ended.stderr);
    check_gone(&shell)?;
    received(&place)
}
