//! The guests that are moved, and credentials.

use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::peer::{Memory, PAGE, Recorder, Style, Trial};
use multifd_tests::{
    Authority, BootSector, Failure, Fill, Member, Outcome, Qemu, QemuBuilder, Receive, Scratch, Settings,
    Side,
};

const SOON: Duration = Duration::from_secs(60);

/// Pages of the small guest, a few of which are zero.
pub(crate) const PAGES: usize = 24;

pub(crate) struct Guests {
    scratch: Scratch,
    /// Our small guest's checkpoint.
    small: Trial,
    qemu: Option<PathBuf>,
}

impl Guests {
    pub(crate) fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let small = Trial::unix()?.patient(SOON);
        let mut memory = Memory::zero(&[("pc.ram", PAGES - 4), ("pc.bios", 4)]);
        for (index, at) in memory.all().into_iter().enumerate().filter(|(index, _)| index % 6 != 5) {
            let bytes = (0..PAGE).map(|byte| u8::try_from(byte * byte / 7 % 200 + index).unwrap_or(0) | 1);
            memory.set(at, &bytes.collect::<Vec<_>>());
        }
        let mut recorder = Recorder::new(Style::default());
        recorder.setup(&memory);
        recorder.part(&memory, &memory.all());
        recorder.end(&memory, &[]);
        small.write_checkpoint(&recorder.finish())?.result?;
        let authority = Authority::new("test CA")?;
        authority.issue(&scratch.path("tls"), Some(&Member::server()), Some(&Member::client()))?;
        BootSector::new().write_floppy(&scratch.path("floppy"))?;
        Ok(Self { scratch, small, qemu: None })
    }

    pub(crate) fn small(&self) -> PathBuf {
        self.small.checkpoint()
    }

    pub(crate) fn tls(&self) -> PathBuf {
        self.scratch.path("tls")
    }

    pub(crate) fn vm(&self) -> QemuBuilder {
        Qemu::builder().ram_mib(16).floppy(&self.scratch.path("floppy"))
    }

    /// A QEMU whose guest runs.
    pub(crate) fn running(&self) -> Outcome<Qemu> {
        let qemu = self.vm().fill(Fill::new(1)).spawn("source")?;
        qemu.serial().wait_lines(1, 0, SOON)?;
        Ok(qemu)
    }

    /// The checkpoint of a guest of QEMU.
    pub(crate) fn of_qemu(&self) -> Outcome<&Path> {
        self.qemu.as_deref().ok_or_else(|| Failure::new("no guest of QEMU was received"))
    }

    /// Receives a guest of QEMU, for cells that send it.
    pub(crate) fn receive_from_qemu(&mut self) -> Outcome {
        if self.qemu.is_none() {
            let out = self.scratch.path("of-qemu");
            let mut qemu = self.running()?;
            qemu.set_up(&Settings { return_path: true, ..Settings::default() }, Side::Source)?;
            let mut receive = Receive::listen(&self.scratch.unix_uri("in"), &out)?;
            qemu.migrate(receive.uri())?;
            qemu.wait_completed(SOON)?;
            receive.wait_success(SOON)?;
            self.qemu = Some(out);
        }
        Ok(())
    }
}
