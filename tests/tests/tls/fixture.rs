//! A small guest, and credentials for both ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::{Authority, BootSector, Fill, Member, Outcome, Qemu, QemuBuilder, Scratch, Settings};

pub(crate) const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Vm {
    pub(crate) scratch: Scratch,
    builder: QemuBuilder,
}

impl Vm {
    pub(crate) fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let builder = Qemu::builder().ram_mib(32).floppy(&floppy);
        Ok(Self { scratch, builder })
    }

    /// A guest that runs, in a QEMU with these credentials.
    pub(crate) fn source(&self, object: Option<&str>) -> Outcome<Qemu> {
        let mut builder = self.builder.clone().fill(Fill::new(1));
        if let Some(object) = object {
            builder = builder.argument("-object").argument(object);
        }
        let source = builder.spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        Ok(source)
    }

    /// A QEMU with these objects that waits for a guest.
    pub(crate) fn destination(&self, objects: &[&str]) -> Outcome<Qemu> {
        let builder = self.builder.clone().incoming("defer").paused();
        let with = |builder: QemuBuilder, object: &&str| builder.argument("-object").argument(*object);
        objects.iter().fold(builder, with).spawn("destination")
    }
}

/// `settings` with QEMU's parameters for credentials that are called `tls0`.
pub(crate) fn encrypted(settings: &Settings, unix: bool) -> Settings {
    let mut settings = settings.clone();
    settings.parameters.insert("tls-creds".into(), "tls0".into());
    if unix {
        settings.parameters.insert("tls-hostname".into(), "localhost".into());
    }
    settings
}

/// A directory with certificates and keys.
pub(crate) struct Credentials(PathBuf);

impl Credentials {
    /// Good ones for both ends.
    pub(crate) fn new(scratch: &Scratch) -> Outcome<Self> {
        Self::issued(
            scratch,
            "tls",
            &Authority::new("test CA")?,
            Some(&Member::server()),
            Some(&Member::client()),
        )
    }

    /// By this CA, for these.
    pub(crate) fn issued(
        scratch: &Scratch,
        name: &str,
        authority: &Authority,
        server: Option<&Member>,
        client: Option<&Member>,
    ) -> Outcome<Self> {
        let dir = scratch.path(name);
        authority.issue(&dir, server, client)?;
        Ok(Self(dir))
    }

    /// Trusts the CA of `other` from now on, and only that one.
    pub(crate) fn trusting(self, other: &Self) -> Outcome<Self> {
        fs::copy(other.0.join("ca-cert.pem"), self.0.join("ca-cert.pem"))?;
        Ok(self)
    }

    /// QEMU's object for one end. It is not asked whether its own certificates are any good: some
    /// are to be bad.
    pub(crate) fn object(&self, endpoint: &str, priority: Option<&str>) -> String {
        let priority = priority.map_or_else(String::new, |words| format!(",priority={words}"));
        format!(
            "tls-creds-x509,id=tls0,dir={},endpoint={endpoint},verify-peer=on,sanity-check=off{priority}",
            self.0.display()
        )
    }

    pub(crate) fn text(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }
}
