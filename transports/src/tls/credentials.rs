//! Certificates and keys from a directory, under QEMU's names.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;

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
        for certificate in certificates(&path)? {
            roots.add(certificate).map_err(|error| InvalidCredentials::new(&path, error.to_string()))?;
        }
        Ok(Arc::new(roots))
    }

    /// Revoked certificates; none without `ca-crl.pem`.
    pub(crate) fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let path = self.0.join("ca-crl.pem");
        if !is_there(&path)? {
            return Ok(Vec::new());
        }
        all(&path, CertificateRevocationListDer::pem_file_iter(&path).and_then(Iterator::collect))
    }

    /// The certificate and key of `end`: `server` or `client`. `None` if there is neither.
    pub(crate) fn identity(&self, end: &str, provider: &CryptoProvider) -> Result<Option<Arc<CertifiedKey>>> {
        let (chain, key) = (self.0.join(format!("{end}-cert.pem")), self.0.join(format!("{end}-key.pem")));
        if !is_there(&chain)? && !is_there(&key)? {
            return Ok(None);
        }
        warn_if_readable_by_all(&key);
        let certificates = certificates(&chain)?;
        let private = PrivateKeyDer::from_pem_file(&key)
            .map_err(|error| InvalidCredentials::new(&key, pem_problem(error, "private key")))?;
        let identity = CertifiedKey::from_der(certificates, private, provider).map_err(|error| {
            let text = match error {
                rustls::Error::InconsistentKeys(_) => format!("not the key of {}", chain.display()),
                other => other.to_string(),
            };
            InvalidCredentials::new(&key, text)
        })?;
        Ok(Some(Arc::new(identity)))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// Whether there is something of that name, though it may lead nowhere. What may be there and is not to be seen is an error:
/// to go on without it would be to trust what it revokes.
fn is_there(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(InvalidCredentials::new(path, error.to_string())),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    all(path, CertificateDer::pem_file_iter(path).and_then(Iterator::collect))
}

fn all<T>(path: &Path, read: std::result::Result<Vec<T>, PemError>) -> Result<Vec<T>> {
    match read {
        Ok(list) if list.is_empty() => {
            Err(InvalidCredentials::new(path, pem_problem(PemError::NoItemsFound, "certificate")))
        }
        Ok(list) => Ok(list),
        Err(error) => Err(InvalidCredentials::new(path, pem_problem(error, "certificate"))),
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

/// Whoever can read the key can be us.
fn warn_if_readable_by_all(key: &Path) {
    let Ok(metadata) = fs::metadata(key) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o004 != 0 {
        tracing::warn!(key = %key.display(), "the private key is readable by everybody, mode {mode:o}; expected 600");
    }
}
