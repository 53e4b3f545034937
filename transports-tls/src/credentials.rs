//! Certificates and keys from a directory, under QEMU's names.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::VerifierBuilderError;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

use super::names::shown_subject;
use super::provider::TlsProvider;
use super::revocation::Revocation;

/// How a directory of credentials is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct TlsRules {
    /// What encrypts.
    pub provider: TlsProvider,
    /// A revocation list past its next update is an error: at the start, and of a peer's
    /// certificate whose CA's list has expired since. Default: it is warned of, and still counts.
    pub current_lists: bool,
}

/// A file of credentials that cannot be used, or a setting.
#[derive(Debug, Error)]
#[error("{}: {problem}", path.display())]
pub struct InvalidCredentials {
    path: PathBuf,
    problem: String,
}

impl InvalidCredentials {
    pub(crate) fn new(path: &Path, problem: impl Into<String>) -> Self {
        Self { path: path.to_owned(), problem: problem.into() }
    }
}

type Result<T> = std::result::Result<T, InvalidCredentials>;

/// A directory with QEMU's file names.
#[derive(Clone, Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The certificates that are trusted to sign others.
    pub(crate) fn ca_path(&self) -> PathBuf {
        self.0.join("ca-cert.pem")
    }

    pub(crate) fn roots(&self) -> Result<Arc<RootCertStore>> {
        let path = self.ca_path();
        let mut roots = RootCertStore::empty();
        let mut expired = Vec::new();
        for certificate in certificates(&path)? {
            if let Some(problem) = expired_ca(&certificate) {
                tracing::warn!(file = %path.display(), "{problem}: it is not trusted");
                expired.push(problem);
                continue;
            }
            roots.add(certificate).map_err(|error| {
                let problem = match error {
                    rustls::Error::InvalidCertificate(problem) => unusable_certificate(&problem),
                    other => other.to_string(),
                };
                InvalidCredentials::new(&path, problem)
            })?;
        }
        match expired.first() {
            Some(problem) if roots.is_empty() => {
                Err(InvalidCredentials::new(&path, format!("{problem}, expected one that is valid")))
            }
            _ => Ok(Arc::new(roots)),
        }
    }

    /// The lists of revoked certificates that decide, in the orders in which to ask them; none
    /// without `ca-crl.pem`. One that is out of date is an error where that is `strict`, else it is
    /// warned of.
    pub(crate) fn revoked(&self, strict: bool) -> Result<Vec<Vec<CertificateRevocationListDer<'static>>>> {
        let path = self.revoked_path();
        if !is_there(&path)? {
            return Ok(Vec::new());
        }
        let lists = CertificateRevocationListDer::pem_file_iter(&path).and_then(Iterator::collect);
        let lists: Vec<_> = all(&path, "revocation list", lists)?;
        let revocation = Revocation::of(&lists, ASN1Time::now())
            .map_err(|problem| InvalidCredentials::new(&path, problem))?;
        if let Some(outdated) = revocation.outdated.first().filter(|_| strict) {
            return Err(InvalidCredentials::new(&path, format!("{outdated}, expected a current one")));
        }
        for outdated in &revocation.outdated {
            tracing::warn!(list = %path.display(), "{outdated}: certificates revoked since then are let in");
        }
        for to_come in &revocation.to_come {
            tracing::warn!(list = %path.display(), "{to_come}");
        }
        Ok(revocation.orders)
    }

    /// What rustls says against the roots or the lists of the revoked, by the file that is to
    /// blame.
    pub(crate) fn blame(&self, error: &VerifierBuilderError) -> InvalidCredentials {
        match error {
            VerifierBuilderError::InvalidCrl(why) => {
                let problem = format!("it holds a revocation list that cannot be used: {why:?}");
                InvalidCredentials::new(&self.revoked_path(), problem)
            }
            other => InvalidCredentials::new(&self.ca_path(), other.to_string()),
        }
    }

    fn revoked_path(&self) -> PathBuf {
        self.0.join("ca-crl.pem")
    }

    /// The certificate and key of `end`: `server` or `client`. `None` if there is neither.
    pub(crate) fn identity(&self, end: &str, provider: &CryptoProvider) -> Result<Option<Arc<CertifiedKey>>> {
        let (chain, key) = (self.0.join(format!("{end}-cert.pem")), self.0.join(format!("{end}-key.pem")));
        if !is_there(&chain)? && !is_there(&key)? {
            return Ok(None);
        }
        warn_if_readable_by_all(&key);
        let certificates = certificates(&chain)?;
        let private = PrivateKeyDer::from_pem_file(&key).map_err(|error| {
            let problem = if is_encrypted(&key) {
                format!(
                    "the private key is encrypted, and no password can be given: decrypt it (openssl pkey -in {} -out ...)",
                    key.display()
                )
            } else {
                pem_problem(error, "private key")
            };
            InvalidCredentials::new(&key, problem)
        })?;
        let identity =
            CertifiedKey::from_der(certificates, private, provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => {
                    InvalidCredentials::new(&key, format!("not the key of {}", chain.display()))
                }
                rustls::Error::InvalidCertificate(problem) => {
                    InvalidCredentials::new(&chain, unusable_certificate(&problem))
                }
                other => InvalidCredentials::new(
                    &key,
                    format!("a private key of a kind or size that cannot be used, {KEY_KINDS} ({other})"),
                ),
            })?;
        Ok(Some(Arc::new(identity)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Whether there is something of that name, though it may lead nowhere. What may be there and is
/// not to be seen is an error: to go on without it would be to trust what it revokes.
fn is_there(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(InvalidCredentials::new(path, error.to_string())),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    all(path, "certificate", CertificateDer::pem_file_iter(path).and_then(Iterator::collect))
}

/// All of a file; `what` names one of them in an error.
fn all<T>(path: &Path, what: &str, read: std::result::Result<Vec<T>, PemError>) -> Result<Vec<T>> {
    match read {
        Ok(list) if list.is_empty() => {
            Err(InvalidCredentials::new(path, pem_problem(PemError::NoItemsFound, what)))
        }
        Ok(list) => Ok(list),
        Err(error) => Err(InvalidCredentials::new(path, pem_problem(error, what))),
    }
}

fn pem_problem(error: PemError, what: &str) -> String {
    match error {
        PemError::NoItemsFound => format!("no {what} in PEM form in it"),
        PemError::Io(error) if error.kind() == io::ErrorKind::NotFound => "there is no such file".to_owned(),
        PemError::Io(error) => error.to_string(),
        other => format!("no {what} in PEM form: {other}"),
    }
}

/// What a key may be.
const KEY_KINDS: &str = "expected RSA of 2048 bits or more, ECDSA (P-256, P-384, P-521) or Ed25519";

/// A certificate file that rustls does not read, in words for its owner.
fn unusable_certificate(problem: &rustls::CertificateError) -> String {
    // rustls gives no variant to a version: the text has its name.
    let said = problem.to_string();
    if said.contains("UnsupportedCertVersion") {
        return "a certificate of X.509 version 1 or 2, expected version 3 (openssl: add an extensions section)"
            .to_owned();
    }
    format!("a certificate that cannot be read: {said}")
}

/// Whether a file holds a key that a password protects, in either of the forms that openssl writes.
fn is_encrypted(key: &Path) -> bool {
    let text = fs::read(key).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED")
}

/// What is wrong with a CA certificate that has expired. rustls does not look: a root is a name and
/// a key to it. QEMU refuses the file.
fn expired_ca(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let end = certificate.validity().not_after;
    let subject = shown_subject(certificate.subject());
    (end < ASN1Time::now()).then(|| format!("the CA certificate \"{subject}\" expired at {end}"))
}

/// A reader of the key can be us.
fn warn_if_readable_by_all(key: &Path) {
    let Ok(metadata) = fs::metadata(key) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o044 != 0 {
        let who = if mode & 0o004 != 0 { "everybody" } else { "its group" };
        tracing::warn!(key = %key.display(), "the private key is readable by {who}, mode {mode:o}; expected 600");
    }
}
