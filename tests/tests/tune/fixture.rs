//! A paused guest, and what `multifd tune` says of it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::{
    BootSector, CommandReport, Failure, Fill, Multifd, Outcome, Qemu, QemuBuilder, Receive, Scratch,
    Settings, Side,
};
use serde_json::Value;

/// Longest wait for anything that must happen: generous, for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// A paused QEMU whose RAM has zeros, text, patterns and random pages.
pub(crate) struct Still {
    pub(crate) qemu: Qemu,
    pub(crate) builder: QemuBuilder,
    pub(crate) scratch: Scratch,
}

impl Still {
    pub(crate) fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let builder = Qemu::builder().ram_mib(96).floppy(&floppy);
        let mut qemu = builder.clone().fill(Fill::new(7)).spawn("source")?;
        qemu.serial().wait_lines(1, 0, SOON)?;
        qemu.stop()?;
        Ok(Self { qemu, builder, scratch })
    }

    /// Moves it into a checkpoint.
    pub(crate) fn checkpoint(&mut self) -> Outcome<PathBuf> {
        let out = self.scratch.path("checkpoint");
        let settings = Settings { channels: Some(2), return_path: true, ..Settings::default() };
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
        self.qemu.set_up(&settings, Side::Source)?;
        self.qemu.migrate(receive.uri())?;
        receive.wait_success(SOON)?;
        self.qemu.wait_completed(SOON)?;
        Ok(out)
    }
}

/// `multifd tune ... --json`, which must succeed.
pub(crate) fn tune<A: AsRef<OsStr>>(source: &[A], flags: &[&str]) -> Outcome<Value> {
    let source = source.iter().map(|argument| argument.as_ref().to_owned());
    let flags = flags.iter().chain(&["--json", "--quick", "-q"]).map(Into::into);
    let mut process = Multifd::spawn("tune", ["tune".into()].into_iter().chain(source).chain(flags))?;
    process.wait_success(SOON)?;
    Ok(CommandReport::by(&process)?.object().clone())
}

pub(crate) fn of(path: &Path) -> [&OsStr; 1] {
    [path.as_os_str()]
}

/// The prediction for a link, a number of channels and a codec.
pub(crate) fn prediction<'f>(
    findings: &'f Value,
    link: &str,
    channels: u64,
    codec: &str,
) -> Outcome<&'f Value> {
    let fits =
        |found: &&Value| found["link"] == link && found["channels"] == channels && found["codec"] == codec;
    let all = findings["predictions"].as_array();
    all.and_then(|all| all.iter().find(fits))
        .ok_or_else(|| Failure::new(format!("no prediction for {link}, {channels}, {codec} in {findings:#}")))
}
