//! `multifd send --postcopy` into `multifd receive`: links that break, ends that stop or die.
#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::path::PathBuf;
use std::time::Duration;

use multifd_engine::vm_memory::Bytes as _;
use multifd_engine::wire::Configuration;
use multifd_engine::{DeviceState, HostMemory, PAGE, RamBlock, Source};
use multifd_tests::{
    CheckpointFiles, CommandReport, Fill, Multifd, Outcome, Process, Receive, Scratch, Settings, ram,
};
use rustix::process::Signal;

use crate::fixture::SOON;
use crate::memory::text;
use crate::relay::Relay;

const PAGES: usize = 2048;

/// Slow enough that something can be done to a migration under way.
const RATE: &str = "16MiB/s";

/// A guest at rest, and a destination that it is on its way to.
struct Own {
    scratch: Scratch,
    guest: CheckpointFiles,
    relay: Relay,
    receive: Receive,
    send: Process,
}

impl Own {
    /// `limits`: after how many bytes each connection is cut.
    fn start(limits: &[Option<u64>], receive_flags: &[&str], send_flags: &[&str]) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let guest = CheckpointFiles::open(&at_rest(&scratch)?)?;
        let receive = Receive::listen_with("tcp:127.0.0.1:0", &scratch.path("arrived"), receive_flags)?;
        let relay = Relay::to(receive.uri().strip_prefix("tcp:").unwrap_or_default().parse()?, limits);
        let send = send(&guest, &relay, send_flags)?;
        relay.wait_loaded();
        Ok(Self { scratch, guest, relay, receive, send })
    }

    /// Both ends are content, and the guest is as it was.
    fn check_arrived(mut self) -> Outcome<CommandReport> {
        self.send.wait_success(SOON).map_err(|failure| self.receive.process().explain(failure))?;
        self.receive.wait_success(SOON)?;
        let arrived = CheckpointFiles::open(&self.scratch.path("arrived"))?;
        ram::check_equal(&self.guest.block("pc.ram")?, &arrived.block("pc.ram")?)?;
        CommandReport::by(&self.send)
    }

    fn wait_listening_again(&mut self) -> Outcome {
        let again = |said: &[u8]| String::from_utf8_lossy(said).contains("listening again on").then_some(());
        self.receive.process().stderr().wait_until("its pause", SOON, again)
    }
}

fn send(guest: &CheckpointFiles, relay: &Relay, flags: &[&str]) -> Outcome<Process> {
    let settings = Settings { return_path: true, ..Settings::default() };
    let flags = [&["--postcopy", "--quiet", "--max-postcopy-bandwidth", RATE], flags].concat();
    Multifd::send_with(guest.directory(), &relay.uri(), &settings, &flags)
}

/// A checkpoint with content.
fn at_rest(scratch: &Scratch) -> Outcome<PathBuf> {
    let ram = RamBlock::new("pc.ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?);
    let (fill, mut page) = (Fill::new(5), Vec::new());
    for index in 0..PAGES {
        page.clear();
        fill.page(index as u64, &mut page);
        ram.memory().slice(index * PAGE, PAGE).unwrap().write_slice(&page, 0)?;
    }
    let out = scratch.path("at-rest");
    let mut receive = Receive::listen(&scratch.unix_uri("at-rest.sock"), &out)?;
    let source = Source::builder(vec![ram], Configuration::new("own-1.0")).paused_guest().build();
    let precopy = source.and_then(|source| source.connect(&receive.uri().parse().unwrap())).map_err(text)?;
    let state = DeviceState::opaque("devices", 1, b"state");
    precopy.stop_copy().and_then(|last| last.commit(&state)).map_err(text)?;
    receive.wait_success(SOON)?;
    Ok(out)
}

/// The second link breaks while what has arrived is asked for, the third when pages go again.
#[test]
fn a_link_that_breaks_again_and_again_is_replaced_by_both_ends() -> Outcome {
    // Less than the time to recover in: a step that waits in vain is made again.
    let recover = ["--recover", "100s", "--timeout", "10s"];
    for more in [&[][..], &["--postcopy-preempt"]] {
        let limits = [None, Some(60), Some(1 << 20), Some(30), Some(1 << 20)];
        let own = Own::start(&limits, &recover, &[&recover, more].concat())?;
        own.relay.wait_sent(0, 1 << 20);
        own.relay.cut(0);
        let report = own.check_arrived()?;
        let recoveries = report.object().pointer("/postcopy/recoveries").and_then(serde_json::Value::as_u64);
        assert!(recoveries >= Some(1), "{report}");
    }
    Ok(())
}

#[test]
fn pages_that_are_asked_for_have_as_many_connections_as_the_flag_says() -> Outcome {
    let own = Own::start(&[], &[], &["--channels", "2", "--postcopy-urgent-channels", "3"])?;
    // Main, two channels, then three for pages that are asked for, each with its first record.
    own.relay.wait_sent(5, 8);
    own.check_arrived().map(drop)
}

/// Without a switch: what has come stays, and the rest follows over another link.
#[test]
fn a_link_that_breaks_before_the_hand_over_is_replaced_by_both_ends() -> Outcome {
    let scratch = Scratch::new()?;
    let guest = CheckpointFiles::open(&at_rest(&scratch)?)?;
    let resume = ["--resume-for", "100s"];
    let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &scratch.path("arrived"), &resume)?;
    let to = receive.uri().strip_prefix("tcp:").unwrap_or_default().parse()?;
    // In the pages, while the source introduces itself, in the pages that are left.
    let relay = Relay::to(to, &[Some(3 << 20), Some(60), Some(2 << 20)]);
    let flags = [&resume[..], &["--quiet"]].concat();
    let settings = Settings { return_path: true, ..Settings::default() };
    let mut send = Multifd::send_with(guest.directory(), &relay.uri(), &settings, &flags)?;
    send.wait_success(SOON).map_err(|failure| receive.process().explain(failure))?;
    receive.wait_success(SOON)?;
    let arrived = CheckpointFiles::open(&scratch.path("arrived"))?;
    ram::check_equal(&guest.block("pc.ram")?, &arrived.block("pc.ram")?)?;
    let report = CommandReport::by(&send)?;
    assert!(report.number("resumptions")? >= 1 && report.number("bytes_not_repeated")? > 0, "{report}");
    Ok(())
}

/// Its destination takes its silence for a link that is gone, and waits for it again.
#[test]
fn a_source_that_is_stopped_for_a_while_goes_on() -> Outcome {
    let waits = ["--recover", "60s", "--timeout", "4s"];
    let mut own = Own::start(&[], &waits, &["--recover", "60s"])?;
    own.relay.wait_sent(0, 1 << 20);
    own.send.signal(Signal::STOP)?;
    let paused = own.wait_listening_again();
    own.send.signal(Signal::CONT)?;
    paused?;
    own.check_arrived().map(drop)
}

#[test]
fn a_destination_that_dies_is_named_and_what_it_was_sent_can_be_sent_again() -> Outcome {
    let mut own = Own::start(&[], &[], &[])?;
    own.relay.wait_sent(0, 1 << 20);
    own.receive.process().kill();
    let status = own.send.wait(SOON)?;
    let report = CommandReport::by(&own.send)?;
    let error = report.text("error")?;
    assert_eq!(status.code(), Some(3), "{error}");
    assert!(error.contains("still at the source") && error.contains("the guest is gone"), "{error}");
    let receive = Receive::listen("tcp:127.0.0.1:0", &own.scratch.path("arrived"))?;
    let relay = Relay::to(receive.uri().strip_prefix("tcp:").unwrap_or_default().parse()?, &[]);
    let send = send(&own.guest, &relay, &[])?;
    Own { relay, receive, send, ..own }.check_arrived().map(drop)
}

/// How long a destination without its source may take to give up.
const GIVES_UP: Duration = Duration::from_secs(60);

#[test]
fn a_destination_whose_source_does_not_come_back_says_so() -> Outcome {
    let mut own = Own::start(&[], &["--recover", "1s"], &[])?;
    own.relay.cut(0);
    let status = own.receive.process().wait(GIVES_UP)?;
    assert_eq!(status.code(), Some(3));
    let said = CommandReport::by(own.receive.process())?;
    assert!(said.text("error")?.contains("no source for the recovery"), "{said}");
    assert!(!own.scratch.path("arrived").exists(), "a checkpoint that is not whole");
    Ok(())
}
