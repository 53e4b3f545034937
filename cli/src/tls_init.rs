//! `multifd tls-init DIR --host NAME...`: a test CA, with certificates and keys for both ends of a
//! migration.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::flags::TlsInit;
use crate::outcome::Outcome;

pub(crate) fn run(flags: &TlsInit) -> Outcome {
    match make(flags) {
        Ok(made) => {
            let files: Vec<&str> = FILES.to_vec();
            Outcome::shown(made, json!({ "directory": flags.dir, "files": files }))
        }
        Err(problem) => Outcome::broken(format!("tls-init {}: {problem}", flags.dir.display())),
    }
}

/// All that is made, under QEMU's names; `ca-key.pem` signs more.
const FILES: [&str; 6] =
    ["ca-cert.pem", "ca-key.pem", "client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"];

/// The time by which clocks may differ.
const SKEW: Duration = Duration::hours(1);

/// Longest common name, in characters (RFC 5280, ub-common-name).
const MAX_COMMON_NAME: usize = 64;

fn make(flags: &TlsInit) -> Result<String, String> {
    if let Some(there) = FILES.iter().find(|name| flags.dir.join(name).exists()) {
        return Err(format!("{there} is there already, and is not overwritten"));
    }
    fs::create_dir_all(&flags.dir).map_err(|error| error.to_string())?;
    let authority = authority(flags).map_err(|error| error.to_string())?;
    let name = flags.host.first().map_or("", String::as_str);
    let server = member(flags, name, &flags.host, ExtendedKeyUsagePurpose::ServerAuth, &authority)?;
    let client = member(flags, &flags.client, &[], ExtendedKeyUsagePurpose::ClientAuth, &authority)?;
    for (name, content, mode) in [
        ("ca-cert.pem", authority.pem(), 0o644),
        ("ca-key.pem", authority.key().serialize_pem(), 0o600),
        ("server-cert.pem", server.0, 0o644),
        ("server-key.pem", server.1, 0o600),
        ("client-cert.pem", client.0, 0o644),
        ("client-key.pem", client.1, 0o600),
    ] {
        write(&flags.dir.join(name), &content, mode).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(report(flags))
}

fn report(flags: &TlsInit) -> String {
    let TlsInit { dir, host, days, client } = flags;
    let (dir, hosts) = (dir.display(), host.join(", "));
    format!(
        "{dir}, valid for {days} days:\n  \
         ca-cert.pem       the CA; goes to both ends\n  \
         ca-key.pem        its key, which signs more; goes nowhere\n  \
         server-cert.pem   for {hosts}; with server-key.pem to the destination\n  \
         client-cert.pem   for CN={client},O={ORGANISATION}; with client-key.pem to the source\n"
    )
}

const ORGANISATION: &str = "multifd";

fn params(flags: &TlsInit, name: &str, hosts: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.push(DnType::OrganizationName, ORGANISATION);
    params
        .distinguished_name
        .push(DnType::CommonName, name.chars().take(MAX_COMMON_NAME).collect::<String>());
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + Duration::days(flags.days.into());
    Ok(params)
}

fn authority(flags: &TlsInit) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let mut params = params(flags, "multifd test CA", &[])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate()?)
}

/// The certificate and key of one end, in PEM.
fn member(
    flags: &TlsInit,
    name: &str,
    hosts: &[String],
    purpose: ExtendedKeyUsagePurpose,
    authority: &CertifiedIssuer<'static, KeyPair>,
) -> Result<(String, String), String> {
    let made = || {
        let mut params = params(flags, name, hosts)?;
        // QEMU refuses a server certificate without either, whatever kind of key it is.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, authority)?;
        Ok((certificate.pem(), key.serialize_pem()))
    };
    made().map_err(|error: rcgen::Error| format!("a certificate for {name:?}: {error}"))
}

/// A file that was not there before, with its mode from the first byte on.
fn write(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(content.as_bytes())
}
