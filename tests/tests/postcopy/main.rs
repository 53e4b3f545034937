//! Post-copy: a QEMU source that switches into `multifd receive`, whose checkpoint appears when the
//! last page is there; and a scripted source into memory that threads read meanwhile.

mod author;
mod faults;
mod fixture;
#[path = "../../../engine/tests/dirty/huge_pages.rs"]
mod huge_pages;
mod live;
mod memory;
#[path = "../../../engine/tests/postcopy/open_files.rs"]
mod open_files;
mod own;
mod recovery;
#[path = "../../../engine/tests/postcopy/relay.rs"]
mod relay;
mod traps;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use fixture::{ALWAYS, SOON, When, guest, missing_kvm, moving, settings};
use multifd_tests::qemu::PROGRAM;
use multifd_tests::skip::newest_qemu;
use multifd_tests::{
    CheckpointFiles, Fill, Multifd, Outcome, Receive, Scratch, Settings, Side, ram, skip, skip_without_qemu,
};

macro_rules! skip_without_kvm {
    () => {
        skip_without_qemu!();
        if let Some(why) = missing_kvm() {
            skip!("{why}");
        }
    };
}

#[test]
fn a_source_that_switches_in_any_round_arrives_whole() -> Outcome {
    skip_without_kvm!();
    for when in ALWAYS {
        for unix in [false, true] {
            let scratch = Scratch::new()?;
            let uri = if unix { scratch.unix_uri("receive") } else { "tcp:127.0.0.1:0".to_owned() };
            moving(&scratch, &guest(&scratch)?, &uri, &[], &settings(), when)?.check_arrived()?;
        }
    }
    Ok(())
}

/// A source that may switch, and ends as a pre-copy: QEMU from 10.1 on, over channels, too.
#[test]
fn a_source_that_may_switch_and_does_not_arrives() -> Outcome {
    skip_without_kvm!();
    let mut ways = vec![(PathBuf::from(PROGRAM), None)];
    ways.extend(newest_qemu().into_iter().flat_map(|path| [(path.clone(), None), (path, Some(2))]));
    for (program, channels) in ways {
        let scratch = Scratch::new()?;
        let settings = Settings { channels, min_rounds: 2, ..settings() };
        let out = scratch.path("checkpoint");
        let mut source = guest(&scratch)?.program(&program).fill(Fill::new(7)).spawn("source")?;
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
        source.serial().wait_lines(2, 0, SOON)?;
        source.set_up(&settings, Side::Source)?;
        source.migrate(receive.uri())?;
        source
            .settle(&settings, SOON)?
            .check_completed()
            .map_err(|failure| receive.process().explain(failure))?;
        receive.wait_success(SOON)?;
        ram::check_equal(source.ram(), &CheckpointFiles::open(&out)?.block("pc.ram")?)?;
    }
    Ok(())
}

/// QEMU from 10.1 on: pages go over channels before the switch, and over main after it.
#[test]
fn a_source_with_channels_switches() -> Outcome {
    skip_without_kvm!();
    let program = match newest_qemu() {
        Ok(program) => program,
        Err(why) => skip!("{why}"),
    };
    for when in ALWAYS {
        for preempt in [false, true] {
            let scratch = Scratch::new()?;
            let mut settings = Settings { channels: Some(2), ..settings() };
            settings.capabilities.extend(preempt.then_some("postcopy-preempt"));
            let machine = guest(&scratch)?.program(&program);
            moving(&scratch, &machine, "tcp:127.0.0.1:0", &[], &settings, when)?.check_arrived()?;
        }
    }
    Ok(())
}

/// A connection of its own for pages that are asked for: none is asked for here, but it has to be
/// taken.
#[test]
fn a_source_with_a_channel_for_urgent_pages_switches() -> Outcome {
    skip_without_kvm!();
    for machine in ["pc", "pc-i440fx-7.2"] {
        for when in ALWAYS {
            let scratch = Scratch::new()?;
            let mut settings = settings();
            settings.capabilities.push("postcopy-preempt");
            let uri = scratch.unix_uri("receive");
            moving(&scratch, &guest(&scratch)?.machine(machine), &uri, &[], &settings, when)?
                .check_arrived()?;
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_came_by_postcopy_is_sent_on_and_runs() -> Outcome {
    skip_without_kvm!();
    let scratch = Scratch::new()?;
    let machine = guest(&scratch)?;
    let moving = moving(&scratch, &machine, "tcp:127.0.0.1:0", &[], &settings(), When::InFirstRound)?;
    let (checkpoint, _source) = moving.check_arrived()?;
    let mut destination = machine.incoming("defer").spawn("destination")?;
    let plain = Settings { return_path: true, ..Settings::default() };
    destination.set_up(&plain, Side::Destination)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    let mut send = Multifd::send(checkpoint.directory(), &uri, &plain)?;
    send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    assert_eq!(destination.run_state()?, "running", "as it was at the source");
    destination.serial().wait_lines(3, 0, SOON)
}

#[test]
fn a_link_that_breaks_is_made_again_and_nothing_is_lost() -> Outcome {
    skip_without_kvm!();
    breaks(false)
}

#[test]
fn an_encrypted_link_that_breaks_is_made_again_encrypted() -> Outcome {
    skip_without_kvm!();
    breaks(true)
}

fn breaks(tls: bool) -> Outcome {
    let scratch = Scratch::new()?;
    let mut machine = guest(&scratch)?;
    let slowly = [("max-postcopy-bandwidth".to_owned(), (4 << 20).into())];
    let mut settings = Settings { parameters: slowly.into_iter().collect(), ..settings() };
    let dir = live::credentials(&scratch)?;
    let mut flags = vec!["--recover", "120s"];
    if tls {
        machine = live::with_tls(machine, &mut settings, &dir);
        flags.extend(["--tls-dir", dir.to_str().unwrap_or_default()]);
    }
    let mut moving = moving(&scratch, &machine, "tcp:127.0.0.1:0", &flags, &settings, When::InFirstRound)?;
    for round in 1..=3 {
        moving.source.wait_status("postcopy-active", SOON)?;
        moving.source.execute("migrate-pause", serde_json::json!({}))?;
        moving.source.wait_status("postcopy-paused", SOON)?;
        moving.receive.process().stderr().wait_until("its pause", SOON, |said| {
            (String::from_utf8_lossy(said).matches("listening again on").count() >= round).then_some(())
        })?;
        moving.source.resume_postcopy(moving.receive.uri())?;
    }
    moving.source.wait_status("postcopy-active", SOON)?;
    moving.source.set_parameter("max-postcopy-bandwidth", 0)?;
    moving.check_arrived().map(drop)
}

/// Connections are accepted until the end: those that are not the source's do nothing.
#[test]
fn strangers_during_postcopy_do_nothing() -> Outcome {
    skip_without_kvm!();
    let scratch = Scratch::new()?;
    let slowly = [("max-postcopy-bandwidth".to_owned(), (4 << 20).into())];
    let settings = Settings { parameters: slowly.into_iter().collect(), ..settings() };
    let machine = guest(&scratch)?;
    let mut moving = moving(&scratch, &machine, "tcp:127.0.0.1:0", &[], &settings, When::InFirstRound)?;
    moving.source.wait_status("postcopy-active", SOON)?;
    let address = moving.receive.uri().strip_prefix("tcp:").unwrap_or_default().to_owned();
    let mut strangers = Vec::new();
    // A page for a block that is not there; what it says before its record is whole; silence.
    let unknown = [&[0, 0, 0, 0, 0, 0, 0x10, 8, 4][..], b"none", &[1; 4096]].concat();
    for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &unknown, &[0; 4], &[0; 5], &[]] {
        let mut stranger = std::net::TcpStream::connect(&address)?;
        stranger.write_all(said)?;
        strangers.push(stranger);
    }
    // A second main, as a source that resumes would begin, and as one that begins anew.
    for said in [&[8, 0, 10, 0][..], b"QEVM"] {
        let mut stranger = std::net::TcpStream::connect(&address)?;
        stranger.write_all(said)?;
        // It is closed.
        let ended = stranger.read(&mut [0; 16]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }
    drop(strangers.split_off(2));
    moving.source.set_parameter("max-postcopy-bandwidth", 0)?;
    moving.check_arrived().map(drop)
}
