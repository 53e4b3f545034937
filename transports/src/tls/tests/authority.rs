//! A CA for a test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

pub(super) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Whom to make a certificate for.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) hosts: Vec<String>,
    /// Days from now.
    pub(super) from: i64,
    pub(super) to: i64,
}

impl Member {
    pub(super) fn server() -> Self {
        Self { name: "server", hosts: vec!["localhost".to_owned(), "127.0.0.1".to_owned()], from: -2, to: 2 }
    }

    pub(super) fn client() -> Self {
        Self { name: "client", hosts: vec!["source.example".to_owned()], from: -2, to: 2 }
    }
}

/// Certificate and key in PEM.
pub(super) struct Identity {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Identity {
    pub(super) fn write(&self, dir: &Path, end: &str) {
        fs::write(dir.join(format!("{end}-cert.pem")), &self.certificate).unwrap();
        let key = dir.join(format!("{end}-key.pem"));
        fs::write(&key, &self.key).unwrap();
        // A key that everybody may read is warned of.
        fs::set_permissions(key, fs::Permissions::from_mode(0o600)).unwrap();
    }
}

impl Authority {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(super) fn write(&self, dir: &Path) {
        fs::write(dir.join("ca-cert.pem"), self.0.pem()).unwrap();
    }

    /// Signed by a CA between, whose certificate comes along and has expired.
    pub(super) fn member_by_expired_intermediate(&self, member: &Member) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "between");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - Duration::days(9), now - Duration::days(1));
        let between = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.0).unwrap();
        let chain = between.pem();
        let Identity { certificate, key } = Self(between).member(member);
        Identity { certificate: certificate + &chain, key }
    }

    pub(super) fn member(&self, member: &Member) -> Identity {
        let mut params = CertificateParams::new(member.hosts.clone()).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "Example, Inc");
        params.distinguished_name.push(DnType::CommonName, member.name);
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) =
            (now + Duration::days(member.from), now + Duration::days(member.to));
        // Its signatures have one length, so that a handshake has the same places every time.
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }
}
