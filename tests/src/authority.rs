//! A CA for tests, and directories of credentials under QEMU's names.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

use crate::{Failure, Outcome};

/// A CA. Its certificates are in the directories that [`Authority::issue`] makes.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Whom a certificate is for.
#[derive(Clone, Debug)]
pub struct Member {
    /// Common name.
    pub name: &'static str,
    /// Alternative names: DNS names and addresses.
    pub hosts: Vec<String>,
    /// Days from now on which it begins and ends to be valid.
    pub days: (i64, i64),
}

impl Member {
    /// A certificate with these names, valid now.
    pub fn new(name: &'static str, hosts: &[&str]) -> Self {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Self { name, hosts, days: (-2, 2) }
    }

    /// This machine, as a destination.
    pub fn server() -> Self {
        Self::new("destination", &["localhost", "127.0.0.1"])
    }

    /// A source.
    pub fn client() -> Self {
        Self::new("source", &["source.example"])
    }

    /// The same, but it has been invalid since yesterday.
    #[must_use]
    pub fn expired(mut self) -> Self {
        self.days = (-9, -1);
        self
    }
}

impl Authority {
    /// A CA of this name.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str) -> Outcome<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = from_now((-20, 20));
        let key = KeyPair::generate().map_err(failure)?;
        Ok(Self(CertifiedIssuer::self_signed(params, key).map_err(failure)?))
    }

    /// Makes the directory, or adds to it: this CA, and the server's and client's certificates and
    /// keys. Without a member, that end has none.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn issue(&self, dir: &Path, server: Option<&Member>, client: Option<&Member>) -> Outcome {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("ca-cert.pem"), self.0.pem())?;
        for (end, member) in [("server", server), ("client", client)] {
            let Some(member) = member else { continue };
            let mut params = CertificateParams::new(member.hosts.clone()).map_err(failure)?;
            params.distinguished_name.push(DnType::OrganizationName, "Example");
            params.distinguished_name.push(DnType::CommonName, member.name);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            (params.not_before, params.not_after) = from_now(member.days);
            let key = KeyPair::generate().map_err(failure)?;
            let certificate = params.signed_by(&key, &self.0).map_err(failure)?;
            fs::write(dir.join(format!("{end}-cert.pem")), certificate.pem())?;
            fs::write(dir.join(format!("{end}-key.pem")), key.serialize_pem())?;
        }
        Ok(())
    }
}

fn from_now((from, to): (i64, i64)) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now + Duration::days(from), now + Duration::days(to))
}

fn failure(error: rcgen::Error) -> Failure {
    Failure::new(error.to_string())
}
