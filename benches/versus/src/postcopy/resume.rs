//! How soon a guest at rest runs: our checkpoint into a QEMU by post-copy, and QEMU's own file.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use multifd_tests::skip::newest_qemu;
use multifd_tests::{CommandReport, Failure, Multifd, Outcome, Qemu, QemuBuilder, Scratch, Settings, Side};

use super::guest::write_firmware;
use crate::guest::{TIMEOUT, receive, touch};

/// A guest at rest in both forms. An eighth of its RAM was touched.
pub(crate) struct AtRest {
    builder: QemuBuilder,
    checkpoint: PathBuf,
    mapped: PathBuf,
    _scratch: Scratch,
}

/// What a start cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// From the command until the guest ran.
    pub(crate) run: Duration,
    /// The same, as `multifd send` has measured it from its own start.
    pub(crate) run_ms: Option<u64>,
    /// Until all of RAM was there.
    pub(crate) total: Duration,
}

impl AtRest {
    pub(crate) fn new(ram_mib: u32) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let firmware = scratch.path("firmware");
        write_firmware(&firmware, ram_mib, 1)?;
        let program = newest_qemu().map_err(Failure::new)?;
        let builder = Qemu::builder().program(&program).ram_mib(ram_mib).firmware(&firmware);
        let mut source = builder.spawn("source")?;
        source.serial().wait_for("H", 0, TIMEOUT)?;
        source.stop()?;
        touch(source.ram(), ram_mib, 4)?;
        let (checkpoint, mapped) = (scratch.path("checkpoint"), scratch.path("mapped"));
        // A guest that has moved away once may only move again after it has run.
        source.resume()?;
        receive(&mut source, &checkpoint, &[])?;
        source.resume()?;
        source.set_up(&mapped_ram(), Side::Source)?;
        source.migrate(&format!("file:{}", mapped.display()))?;
        source.wait_completed(TIMEOUT)?;
        source.quit()?;
        Ok(Self { builder, checkpoint, mapped, _scratch: scratch })
    }

    fn destination(&self, settings: &Settings) -> Outcome<Qemu> {
        let mut qemu = self.builder.clone().incoming("defer").spawn("destination")?;
        qemu.set_up(settings, Side::Destination)?;
        Ok(qemu)
    }

    pub(crate) fn by_qemu(&self) -> Outcome<Start> {
        let mut qemu = self.destination(&mapped_ram())?;
        let begun = Instant::now();
        qemu.listen(&format!("file:{}", self.mapped.display()))?;
        wait_run(&mut qemu)?;
        // Nothing is missing when it runs.
        Ok(Start { run: begun.elapsed(), run_ms: None, total: begun.elapsed() })
    }

    pub(crate) fn by_ours(&self) -> Outcome<Start> {
        let settings =
            Settings { return_path: true, capabilities: vec!["postcopy-ram"], ..Settings::default() };
        let mut qemu = self.destination(&settings)?;
        let uri = qemu.listen("tcp:127.0.0.1:0")?;
        let begun = Instant::now();
        let mut send = Multifd::send_with(&self.checkpoint, &uri, &settings, &["--postcopy", "--quiet"])?;
        wait_run(&mut qemu).map_err(|failure| send.explain(failure))?;
        let run = begun.elapsed();
        send.wait_success(TIMEOUT).map_err(|failure| qemu.explain(failure))?;
        let total = begun.elapsed();
        qemu.wait_completed(TIMEOUT)?;
        let report = CommandReport::by(&send)?;
        let run_ms = report.object().pointer("/postcopy/run_ms").and_then(serde_json::Value::as_u64);
        Ok(Start { run, run_ms, total })
    }
}

fn wait_run(qemu: &mut Qemu) -> Outcome {
    let is_resume = |event: &serde_json::Value| event.get("event").is_some_and(|name| name == "RESUME");
    qemu.wait_event("RESUME", TIMEOUT, is_resume).map(drop)
}

/// As QEMU recommends it: by several threads.
fn mapped_ram() -> Settings {
    Settings { channels: Some(2), capabilities: vec!["mapped-ram"], ..Settings::default() }
}
