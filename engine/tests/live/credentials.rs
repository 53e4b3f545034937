//! A CA, and certificates by it.

use std::fs;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;

/// Credentials for both ends on this machine.
pub(crate) fn credentials(ca: &str) -> TempDir {
    let [credentials, _] = two_of(ca);
    credentials
}

/// Two such, by one CA.
pub(crate) fn two_of(ca: &str) -> [TempDir; 2] {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, ca);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    [(); 2].map(|()| issue(&authority))
}

fn issue(authority: &CertifiedIssuer<'_, KeyPair>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ca-cert.pem"), authority.pem()).unwrap();
    for end in ["server", "client"] {
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, authority).unwrap();
        fs::write(dir.path().join(format!("{end}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.path().join(format!("{end}-key.pem")), key.serialize_pem()).unwrap();
    }
    dir
}
