//! The same for `multifd send`: exit codes and texts.

use std::path::Path;
use std::time::Duration;

use multifd_tests::peer::command::{ended, interrupt};
use multifd_tests::peer::{Memory, Recorder, Sink, Stage, Style, Trial};
use multifd_tests::{Multifd, Outcome, Process, Scratch};
use multifd_wire::ReturnMessage;

/// A checkpoint of some MiB.
fn checkpoint() -> Outcome<Trial> {
    let trial = Trial::unix()?.patient(Duration::from_secs(10));
    let mut memory = Memory::zero(&[("pc.ram", 1500)]);
    memory.refill(&memory.all(), 4);
    let mut recorder = Recorder::new(Style::default());
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    trial.write_checkpoint(&recorder.finish())?.result?;
    Ok(trial)
}

fn send(checkpoint: &Path, uri: &str, arguments: &[&str]) -> Outcome<Process> {
    let directory = checkpoint.display().to_string();
    Multifd::spawn("send", ["send", &directory, uri, "--json"].iter().chain(arguments))
}

#[test]
fn what_leaves_the_guest_here_ends_with_exit_code_1() -> Outcome {
    let trial = checkpoint()?;
    let scratch = Scratch::new()?;
    let mut absent = send(&trial.checkpoint(), &scratch.unix_uri("absent"), &["--timeout", "300ms"])?;
    let absent = ended(&mut absent)?;
    assert_eq!((absent.code, &absent.json["status"]), (1, &"failed".into()), "{}", absent.stderr);
    assert!(absent.stderr.contains("gave up after"), "{}", absent.stderr);

    for (channels, done, says) in [
        ("0", "stall", "no byte moved for 500ms, the timeout"),
        ("2", "stall", "no byte moved for 500ms, the timeout"),
        ("2", "cut", "channel 0 (unix:"),
        ("0", "refuse", "status 1"),
    ] {
        let sink = Sink::unix()?;
        let uri = sink.endpoint().to_string();
        let mut send = send(&trial.checkpoint(), &uri, &["--channels", channels, "--timeout", "500ms"])?;
        let mut destination = sink.accept(channels.parse()?)?;
        match done {
            "cut" => {
                destination.read_channel_bytes(128)?;
                destination.cut_channel(0);
            }
            "refuse" => {
                destination.read_to(Stage::Started)?;
                destination.say(&ReturnMessage::Shut(1));
            }
            _ => destination.read_to(Stage::Started)?,
        }
        let ended = ended(&mut send)?;
        assert_eq!((ended.code, &ended.json["status"]), (1, &"failed".into()), "{done}: {}", ended.stderr);
        assert!(
            ended.stderr.contains(says) && !ended.stderr.contains("panicked"),
            "{done}: {}",
            ended.stderr
        );
    }
    Ok(())
}

#[test]
fn a_destination_that_ends_it_brings_up_the_settings_to_compare() -> Outcome {
    let trial = checkpoint()?;
    // What the destination does, and what that looks like.
    for (channels, takes, done, says) in [
        ("0", 0, "stall", "It waits for more channels than these, it seems."),
        ("2", 2, "cut", "multifd-channels 2, multifd-compression none"),
        ("0", 0, "refuse", "capability multifd off"),
    ] {
        let sink = Sink::unix()?;
        let uri = sink.endpoint().to_string();
        let mut send = send(&trial.checkpoint(), &uri, &["--channels", channels, "--timeout", "2s"])?;
        let mut destination = sink.accept(takes)?;
        match done {
            "cut" => destination.cut_main(),
            // Takes everything, and does not answer: it has not all of its channels.
            "stall" => {
                destination.polite = false;
                while destination.read_to(Stage::RamSent).is_ok() {}
            }
            _ => {
                destination.read_to(Stage::Started)?;
                destination.say(&ReturnMessage::Shut(1));
            }
        }
        let ended = ended(&mut send)?;
        let hint = ended.json["hint"].as_str().unwrap_or_default();
        assert_eq!(ended.code, 1, "{done}: {}", ended.stderr);
        for says in [says, "The destination's own log says why", "RAM and ROM pc.ram 5.9 MiB"] {
            assert!(hint.contains(says) && ended.stderr.contains(says), "{done}, {says}: {}", ended.stderr);
        }
    }
    let scratch = Scratch::new()?;
    let mut absent = send(&trial.checkpoint(), &scratch.unix_uri("absent"), &["--timeout", "300ms"])?;
    assert!(ended(&mut absent)?.json.get("hint").is_none());
    Ok(())
}

#[test]
fn silence_after_the_last_byte_ends_with_exit_code_3() -> Outcome {
    let trial = checkpoint()?;
    for (channels, hang_up) in [(0, true), (2, true), (2, false)] {
        let sink = Sink::unix()?;
        let (uri, count) = (sink.endpoint().to_string(), channels.to_string());
        let mut send = send(&trial.checkpoint(), &uri, &["--channels", &count, "--timeout", "2s"])?;
        let mut destination = sink.accept(channels)?;
        destination.read_to(Stage::Finished)?;
        if hang_up {
            destination.cut_main();
        }
        let ended = ended(&mut send)?;
        assert_eq!((ended.code, &ended.json["status"]), (3, &"failed".into()), "{}", ended.stderr);
    }
    Ok(())
}

#[test]
fn ctrl_c_after_the_last_byte_ends_with_exit_code_3() -> Outcome {
    let trial = checkpoint()?;
    let sink = Sink::unix()?;
    let mut send = send(&trial.checkpoint(), &sink.endpoint().to_string(), &[])?;
    let mut destination = sink.accept(0)?;
    destination.read_to(Stage::Finished)?;
    interrupt(&send)?;
    let ended = ended(&mut send)?;
    assert_eq!((ended.code, &ended.json["status"]), (3, &"failed".into()), "{}", ended.stderr);
    assert!(ended.stderr.contains("after the hand-over: cancelled"), "{}", ended.stderr);
    Ok(())
}

#[test]
fn ctrl_c_twice_after_the_last_byte_ends_with_exit_code_3_too() -> Outcome {
    let trial = checkpoint()?;
    let sink = Sink::unix()?;
    let mut send = send(&trial.checkpoint(), &sink.endpoint().to_string(), &[])?;
    let mut destination = sink.accept(0)?;
    destination.read_to(Stage::Finished)?;
    interrupt(&send)?;
    interrupt(&send)?;
    assert_eq!(ended(&mut send)?.code, 3);
    Ok(())
}

#[test]
fn ctrl_c_ends_a_send_at_once() -> Outcome {
    let trial = checkpoint()?;
    for channels in [0, 2] {
        let sink = Sink::unix()?;
        let (uri, count) = (sink.endpoint().to_string(), channels.to_string());
        let mut send = send(&trial.checkpoint(), &uri, &["--channels", &count])?;
        let mut destination = sink.accept(channels)?;
        destination.read_to(Stage::Started)?;
        interrupt(&send)?;
        // Waits for less time than the command's timeout is.
        let ended = ended(&mut send)?;
        assert_eq!((ended.code, &ended.json["status"]), (130, &"cancelled".into()), "{}", ended.stderr);
    }
    Ok(())
}

#[test]
fn a_source_that_is_told_not_to_ask_does_not_know() -> Outcome {
    let trial = checkpoint()?;
    let sink = Sink::unix()?;
    let uri = sink.endpoint().to_string();
    let mut send = send(&trial.checkpoint(), &uri, &["--no-return-path"])?;
    let mut destination = sink.accept(0)?;
    destination.read_to(Stage::Finished)?;
    destination.cut_main();
    let ended = ended(&mut send)?;
    assert_eq!((ended.code, &ended.json["confirmed"]), (0, &false.into()), "{}", ended.stderr);
    Ok(())
}
