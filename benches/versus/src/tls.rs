//! Certificates for both ends, as `multifd tls-init` makes them.

use std::path::PathBuf;

use multifd_tests::{Multifd, Outcome, Qemu, Scratch};
use serde_json::json;

use crate::guest::TIMEOUT;

/// What QEMU knows its credentials by.
pub(crate) const OBJECT: &str = "tls0";

/// A folder with the files that both ends need.
pub(crate) struct Credentials(PathBuf);

impl Credentials {
    pub(crate) fn new(scratch: &Scratch) -> Outcome<Self> {
        let folder = scratch.path("tls");
        let text = folder.display().to_string();
        Multifd::spawn("tls-init", ["tls-init", &text, "--host", "127.0.0.1"])?.wait_success(TIMEOUT)?;
        Ok(Self(folder))
    }

    /// Makes them known to QEMU, as `client` or as `server`.
    pub(crate) fn give_to(&self, qemu: &mut Qemu, side: &str) -> Outcome {
        let dir = self.0.display().to_string();
        let object = json!({ "qom-type": "tls-creds-x509", "id": OBJECT, "dir": dir, "endpoint": side, "verify-peer": true });
        qemu.execute("object-add", object).map(drop)
    }

    /// The flags of our own command.
    pub(crate) fn flags(&self) -> [String; 2] {
        ["--tls-dir".to_owned(), self.0.display().to_string()]
    }
}
