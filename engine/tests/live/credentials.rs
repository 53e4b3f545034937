//! Certificates of a CA of the test's own.

use std::fs;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;

/// Credentials for both ends on this machine.
pub(crate) fn credentials(ca: &str) -> TempDir {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, ca);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ca-cert.pem"), authority.pem()).unwrap();
    for end in ["server", "client"] {
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(dir.path().join(format!("{end}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.path().join(format!("{end}-key.pem")), key.serialize_pem()).unwrap();
    }
    dir
}
