//! `multifd send --postcopy` into the real QEMU: the guest goes on at once, and pulls its RAM while
//! it works.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use multifd_tests::{
    Authority, BootSector, CheckpointFiles, CommandReport, Failure, Fill, Member, Multifd, Outcome, Process,
    Qemu, QemuBuilder, Receive, Scratch, Settings, Side, guest, skip::newest_qemu, skip_without_qemu,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// Pages that the guest writes, and what is below them: the BIOS's and the boot sector's.
const WRITTEN_BELOW: usize = 0x90 * 4096;

/// A guest at rest, and the QEMU that it is to run in.
struct Rest {
    scratch: Scratch,
    vm: QemuBuilder,
    checkpoint: CheckpointFiles,
    /// What it said before.
    said: String,
    settings: Settings,
    /// Credentials, if all connections are encrypted.
    tls: Option<String>,
}

impl Rest {
    /// A guest of the machine type that was stopped while it counted, for a destination with these
    /// capabilities.
    fn new(program: Option<PathBuf>, machine: &str, capabilities: Vec<&'static str>) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let mut vm = Qemu::builder().machine(machine).ram_mib(32).floppy(&floppy);
        if let Some(program) = program {
            vm = vm.program(&program);
        }
        let mut source = vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        source.stop()?;
        let out = scratch.path("checkpoint");
        let mut receive = Receive::listen(&scratch.unix_uri("in"), &out)?;
        source.set_up(&Settings { return_path: true, ..Settings::default() }, Side::Source)?;
        source.migrate(receive.uri())?;
        source.wait_completed(SOON)?;
        receive.wait_success(SOON)?;
        let checkpoint = CheckpointFiles::open(&out)?;
        let said = source.quit()?;
        let settings = Settings { return_path: true, capabilities, ..Settings::default() };
        Ok(Self { scratch, vm, checkpoint, said, settings, tls: None })
    }

    /// The same encrypted.
    fn with_tls(mut self) -> Outcome<Self> {
        let dir = self.scratch.path("tls");
        Authority::new("test CA")?.issue(&dir, Some(&Member::server()), Some(&Member::client()))?;
        let dir = dir.display().to_string();
        let object = format!("tls-creds-x509,id=tls0,dir={dir},endpoint=server,verify-peer=on");
        self.vm = self.vm.argument("-object").argument(object);
        self.settings.parameters.insert("tls-creds".into(), "tls0".into());
        self.tls = Some(dir);
        Ok(self)
    }

    /// A QEMU that waits for the guest, and where.
    fn destination(&self, uri: &str) -> Outcome<(Qemu, String)> {
        let mut destination = self.vm.clone().incoming("defer").spawn("destination")?;
        destination.set_up(&self.settings, Side::Destination)?;
        let uri = destination.listen(uri)?;
        Ok((destination, uri))
    }

    fn send(&self, uri: &str, flags: &[&str]) -> Outcome<Process> {
        let mut all = vec!["--postcopy", "--quiet"];
        if self.settings.capabilities.contains(&"postcopy-preempt") {
            all.push("--postcopy-preempt");
        }
        if let Some(dir) = &self.tls {
            all.extend(["--tls-dir", dir, "--tls-hostname", "localhost"]);
        }
        all.extend(flags);
        Multifd::send_with(self.checkpoint.directory(), uri, &self.settings, &all)
    }

    /// The destination has all RAM, as it was but for what the guest writes, and the guest has
    /// counted on.
    fn check(self, mut destination: Qemu, mut send: Process) -> Outcome<CommandReport> {
        send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        if destination.run_state()? != "running" {
            destination.resume()?;
        }
        destination.serial().wait_lines(5, 0, SOON)?;
        destination.stop()?;
        let there = fs::read(destination.ram())?;
        let here = fs::read(self.checkpoint.block("pc.ram")?)?;
        assert_eq!(here.len(), there.len());
        let pages = here.chunks(4096).zip(there.chunks(4096)).enumerate().skip(WRITTEN_BELOW / 4096);
        let differ: Vec<_> = pages.filter(|(_, (here, there))| here != there).map(|(page, _)| page).collect();
        assert!(differ.is_empty(), "pages {differ:?} differ");
        guest::check_sequence(&(self.said + &destination.quit()?))?;
        CommandReport::by(&send)
    }
}

fn runs_at_once(program: Option<PathBuf>, machine: &str, preempt: bool, uri: Option<&str>) -> Outcome {
    let mut capabilities = vec!["postcopy-ram"];
    capabilities.extend(preempt.then_some("postcopy-preempt"));
    let rest = Rest::new(program, machine, capabilities)?;
    let uri = uri.map_or_else(|| rest.scratch.unix_uri("out"), str::to_owned);
    let (mut destination, uri) = rest.destination(&uri)?;
    // Its RAM would take minutes: the guest counts long before.
    let send = rest.send(&uri, &["--max-postcopy-bandwidth", "256KiB/s"])?;
    destination.wait_status("postcopy-active", SOON).map_err(|failure| send.explain(failure))?;
    destination.serial().wait_lines(3, 0, SOON).map_err(|failure| destination.explain(failure))?;
    assert_eq!(destination.migration()?.status, "postcopy-active", "pages are still on their way");
    Ok(())
}

fn arrives(
    program: Option<PathBuf>,
    machine: &str,
    preempt: bool,
    uri: Option<&str>,
) -> Outcome<CommandReport> {
    let mut capabilities = vec!["postcopy-ram"];
    capabilities.extend(preempt.then_some("postcopy-preempt"));
    let rest = Rest::new(program, machine, capabilities)?;
    let uri = uri.map_or_else(|| rest.scratch.unix_uri("out"), str::to_owned);
    let (destination, uri) = rest.destination(&uri)?;
    let send = rest.send(&uri, &["--max-postcopy-bandwidth", "16MiB/s"])?;
    rest.check(destination, send)
}

#[test]
fn the_guest_counts_while_its_pages_are_on_their_way() -> Outcome {
    skip_without_qemu!();
    runs_at_once(None, "pc", false, None)
}

#[test]
fn with_a_channel_for_pages_that_are_asked_for_too() -> Outcome {
    skip_without_qemu!();
    runs_at_once(None, "pc", true, Some("tcp:127.0.0.1:0"))
}

#[test]
fn every_page_arrives() -> Outcome {
    skip_without_qemu!();
    let report = arrives(None, "pc", false, Some("tcp:127.0.0.1:0"))?;
    let postcopy = &report.object()["postcopy"];
    assert!(postcopy["run_ms"].is_u64() && postcopy["requests"].as_u64() > Some(0), "{report}");
    Ok(())
}

#[test]
fn every_page_arrives_with_a_channel_for_those_that_are_asked_for() -> Outcome {
    skip_without_qemu!();
    arrives(None, "pc", true, None).map(drop)
}

/// The channel is connected with main, and ends with a record.
#[test]
fn every_page_arrives_at_an_older_machine_type() -> Outcome {
    skip_without_qemu!();
    arrives(None, "pc-i440fx-7.2", true, None)?;
    arrives(None, "pc-i440fx-7.2", false, None).map(drop)
}

#[test]
fn every_page_arrives_at_the_newest_qemu() -> Outcome {
    let program = match newest_qemu() {
        Ok(program) => program,
        Err(why) => multifd_tests::skip!("{why}"),
    };
    for preempt in [false, true] {
        arrives(Some(program.clone()), "pc", preempt, None)?;
    }
    Ok(())
}

fn recovers(program: Option<PathBuf>, preempt: bool, tls: bool) -> Outcome {
    let mut capabilities = vec!["postcopy-ram"];
    capabilities.extend(preempt.then_some("postcopy-preempt"));
    let mut rest = Rest::new(program, "pc", capabilities)?;
    if tls {
        rest = rest.with_tls()?;
    }
    let (mut destination, uri) = rest.destination(&rest.scratch.unix_uri("out"))?;
    let send = rest.send(&uri, &["--max-postcopy-bandwidth", "4MiB/s", "--recover", "60s"])?;
    for _ in 0..2 {
        destination.wait_status("postcopy-active", SOON).map_err(|failure| send.explain(failure))?;
        // A QEMU that listens still takes the source back at once; here it is found again when it
        // is told to recover.
        fs::remove_file(rest.scratch.path("out")).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        destination.execute("migrate-pause", json!({}))?;
        destination.wait_status("postcopy-paused", SOON)?;
        destination.forget_events();
        destination.execute("migrate-recover", json!({ "uri": uri }))?;
    }
    let report = rest.check(destination, send)?;
    // QEMU is active again before the source has heard so: a second break that comes in between
    // breaks the recovery, and both are replaced by one.
    let recoveries = report.object().pointer("/postcopy/recoveries").and_then(Value::as_u64);
    assert!(matches!(recoveries, Some(1 | 2)), "{report}");
    Ok(())
}

#[test]
fn a_link_that_breaks_twice_is_replaced() -> Outcome {
    skip_without_qemu!();
    recovers(None, false, false)
}

#[test]
fn a_link_that_breaks_twice_is_replaced_with_its_channel_for_pages_that_are_asked_for() -> Outcome {
    skip_without_qemu!();
    recovers(None, true, false)
}

#[test]
fn an_encrypted_link_that_breaks_twice_is_replaced() -> Outcome {
    skip_without_qemu!();
    recovers(None, false, true)
}

#[test]
fn an_encrypted_link_that_breaks_twice_is_replaced_with_its_channel_for_pages_that_are_asked_for() -> Outcome
{
    skip_without_qemu!();
    recovers(None, true, true)
}

#[test]
fn a_destination_that_dies_is_named_and_the_checkpoint_is_kept() -> Outcome {
    skip_without_qemu!();
    let rest = Rest::new(None, "pc", vec!["postcopy-ram"])?;
    let (mut destination, uri) = rest.destination(&rest.scratch.unix_uri("out"))?;
    let mut send = rest.send(&uri, &["--max-postcopy-bandwidth", "256KiB/s"])?;
    destination.wait_status("postcopy-active", SOON).map_err(|failure| send.explain(failure))?;
    destination.serial().wait_lines(1, 0, SOON)?;
    drop(destination);
    let status = send.wait(SOON)?;
    assert_eq!(status.code(), Some(3), "{status:?}");
    let report = CommandReport::by(&send)?;
    let error = report.text("error")?;
    assert!(error.contains("still at the source") && error.contains("the guest is gone"), "{error}");
    // It can be sent again, from where it was.
    let (destination, uri) = rest.destination(&rest.scratch.unix_uri("again"))?;
    let send = rest.send(&uri, &[])?;
    rest.check(destination, send).map(drop)
}

/// Another QEMU than the one of the tests above.
#[test]
#[ignore = "MULTIFD_TEST_QEMU=qemu-system-x86_64 cargo test --test postcopy_send -- --ignored"]
fn every_way_into_another_qemu() -> Outcome {
    let Some(program) = std::env::var_os("MULTIFD_TEST_QEMU").map(PathBuf::from) else {
        multifd_tests::skip!("MULTIFD_TEST_QEMU names no QEMU")
    };
    for preempt in [false, true] {
        for uri in [None, Some("tcp:127.0.0.1:0")] {
            arrives(Some(program.clone()), "pc", preempt, uri)?;
            runs_at_once(Some(program.clone()), "pc", preempt, uri)?;
        }
    }
    for preempt in [false, true] {
        for tls in [false, true] {
            recovers(Some(program.clone()), preempt, tls)
                .map_err(|failure| Failure::new(format!("preempt {preempt}, TLS {tls}: {failure}")))?;
        }
    }
    Ok(())
}
