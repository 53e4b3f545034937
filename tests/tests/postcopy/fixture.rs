//! A QEMU whose guest writes without end, under KVM: the dirty log of TCG loses pages by itself.

use std::path::Path;
use std::time::Duration;

pub(crate) use multifd_tests::skip::missing_kvm;
use multifd_tests::{
    BootSector, CheckpointFiles, Fill, Outcome, Qemu, QemuBuilder, Receive, Scratch, Settings, Side, ram,
};

pub(crate) const SOON: Duration = Duration::from_secs(120);

const MIB: u64 = 1 << 20;

/// A guest of 64 MiB that rewrites 128 pages.
pub(crate) fn guest(scratch: &Scratch) -> Outcome<QemuBuilder> {
    let firmware = scratch.path("firmware");
    BootSector::new().laps_per_line(16).write_firmware(&firmware)?;
    Ok(Qemu::builder().accel("kvm").firmware(&firmware))
}

/// When the source switches to post-copy.
#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    /// It is told before it has begun.
    AtOnce,
    /// A part of its RAM has gone.
    InFirstRound,
    /// All of its RAM has gone, and some of it is stale.
    InThirdRound,
}

pub(crate) const ALWAYS: [When; 3] = [When::AtOnce, When::InFirstRound, When::InThirdRound];

/// A post-copy that is on its way into a checkpoint.
pub(crate) struct Moving {
    pub(crate) source: Qemu,
    pub(crate) receive: Receive,
    out: std::path::PathBuf,
}

impl Moving {
    /// Starts, and has the source switch.
    pub(crate) fn start(
        mut source: Qemu,
        receive: Receive,
        out: &Path,
        settings: &Settings,
        when: When,
    ) -> Outcome<Self> {
        switch(&mut source, receive.uri(), settings, when)?;
        Ok(Self { source, receive, out: out.to_owned() })
    }

    /// Both ends are content, and RAM is the stopped source's.
    pub(crate) fn check_arrived(mut self) -> Outcome<(CheckpointFiles, Qemu)> {
        if let Err(failure) = self.source.wait_completed(SOON) {
            return Err(self.receive.process().explain(failure));
        }
        self.receive.wait_success(SOON)?;
        let checkpoint = CheckpointFiles::open(&self.out)?;
        ram::check_equal(self.source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok((checkpoint, self.source))
    }
}

/// Starts to migrate, and switches.
pub(crate) fn switch(source: &mut Qemu, to: &str, settings: &Settings, when: When) -> Outcome {
    source.serial().wait_lines(2, 0, SOON)?;
    source.set_up(settings, Side::Source)?;
    match when {
        When::AtOnce | When::InFirstRound => source.set_parameter("max-bandwidth", 8 * MIB)?,
        When::InThirdRound => {}
    }
    source.migrate(to)?;
    match when {
        When::AtOnce => {}
        When::InFirstRound => source.wait_transferred(MIB, SOON)?,
        When::InThirdRound => {
            source.wait_first_window(SOON)?;
            source.set_parameter("max-bandwidth", 20 * MIB)?;
            // From here on what the guest writes in a round takes longer than QEMU's windows of 100
            // ms: a guest that gets no CPU for a moment does not end the rounds.
            source.wait_remaining(3 * MIB, SOON)?;
            source.set_parameter("max-bandwidth", 4 * MIB)?;
            source.wait_rounds(3, SOON)?;
        }
    }
    source.start_postcopy()
}

/// A migration that may switch to post-copy; in its rounds until it does.
pub(crate) fn settings() -> Settings {
    Settings {
        return_path: true,
        capabilities: vec!["postcopy-ram"],
        min_rounds: 1000,
        ..Settings::default()
    }
}

/// A source with content, and what it moves into.
pub(crate) fn moving(
    scratch: &Scratch,
    machine: &QemuBuilder,
    uri: &str,
    flags: &[&str],
    settings: &Settings,
    when: When,
) -> Outcome<Moving> {
    let out = scratch.path("checkpoint");
    let source = machine.clone().fill(Fill::new(7)).spawn("source")?;
    let receive = Receive::listen_with(uri, &out, flags)?;
    Moving::start(source, receive, &out, settings, when)
}
