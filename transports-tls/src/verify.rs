//! Checking the peer's certificate: rustls does it, we remember what it has seen, and look it up in
//! the list.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertRevocationListError, CertificateError, DigitallySignedStruct, DistinguishedName, Error,
    SignatureScheme,
};

use super::alert::{self, Role};
use super::handshake::Failure;
use super::names::Names;

/// Verifiers of rustls that differ in the order in which they ask the revocation lists.
#[derive(Debug)]
pub(crate) struct Verifiers<V: ?Sized> {
    first: Arc<V>,
    others: Vec<Arc<V>>,
}

impl<V: ?Sized> Verifiers<V> {
    /// `build` makes one with these lists; there are no lists without any order.
    pub(crate) fn build<E>(
        orders: Vec<Vec<CertificateRevocationListDer<'static>>>,
        build: impl Fn(Vec<CertificateRevocationListDer<'static>>) -> Result<Arc<V>, E>,
    ) -> Result<Arc<Self>, E> {
        let mut orders = orders.into_iter();
        let first = build(orders.next().unwrap_or_default())?;
        Ok(Arc::new(Self { first, others: orders.map(build).collect::<Result<_, _>>()? }))
    }

    /// What the first of them says that did not come upon a list, or a CA, of another key.
    fn decide<R>(&self, verify: impl Fn(&V) -> Result<R, Error>) -> Result<R, Error> {
        let is_of_another_key = |result: &Result<R, Error>| {
            matches!(
                result,
                Err(Error::InvalidCertRevocationList(CertRevocationListError::BadSignature)
                    | Error::InvalidCertificate(CertificateError::BadSignature))
            )
        };
        let mut others = self.others.iter();
        let mut result = verify(&self.first);
        while is_of_another_key(&result)
            && let Some(other) = others.next()
        {
            result = verify(other);
        }
        result
    }
}

/// A verifier of rustls for one connection: notes whose certificate came.
#[derive(Debug)]
pub(crate) struct Witness<V: ?Sized> {
    inner: Arc<Verifiers<V>>,
    seen: Seen,
    /// Names that a peer's certificate may have; empty: any certificate that verifies.
    allowed: Arc<[String]>,
}

/// The peer's certificate, if one came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(Arc<Mutex<SeenChain>>);

#[derive(Debug, Default)]
struct SeenChain {
    names: Option<Names>,
    /// In DER.
    certificate: Option<CertificateDer<'static>>,
    /// The certificates that came with it.
    intermediates: Vec<Names>,
}

impl Seen {
    fn note(&self, certificate: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Names {
        let names = Names::of(certificate);
        *self.lock() = SeenChain {
            names: Some(names.clone()),
            certificate: Some(certificate.clone().into_owned()),
            intermediates: intermediates.iter().map(|certificate| Names::of(certificate)).collect(),
        };
        names
    }

    pub(crate) fn names(&self) -> Option<Names> {
        self.lock().names.clone()
    }

    /// The certificate itself.
    pub(crate) fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.lock().certificate.clone()
    }

    /// The first of those that came with the certificate that has expired.
    fn expired_intermediate(&self) -> Option<Names> {
        self.lock().intermediates.iter().find(|names| names.has_expired).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, SeenChain> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V: ?Sized> Witness<V> {
    pub(crate) fn new(inner: Arc<Verifiers<V>>, seen: &Seen, allowed: &Arc<[String]>) -> Arc<Self> {
        Arc::new(Self { inner, seen: seen.clone(), allowed: Arc::clone(allowed) })
    }
}

/// What both of rustls' verifiers must say of signatures: as the inner one does.
macro_rules! signatures_of_inner {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.inner.first.verify_tls12_signature(message, cert, dss)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.inner.first.verify_tls13_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.inner.first.supported_verify_schemes()
        }
    };
}

impl<V: ServerCertVerifier + ?Sized> ServerCertVerifier for Witness<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.seen.note(end_entity, intermediates);
        self.inner.decide(|inner| {
            inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        })
    }

    signatures_of_inner!();
}

impl<V: ClientCertVerifier + ?Sized> ClientCertVerifier for Witness<V> {
    /// None: with hints, a client of another CA would send no certificate, and the error could not
    /// say what is wrong with it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let names = self.seen.note(end_entity, intermediates);
        let verified = self.inner.decide(|inner| inner.verify_client_cert(end_entity, intermediates, now))?;
        if self.allowed.is_empty() || self.allowed.iter().any(|pattern| names.match_pattern(pattern)) {
            return Ok(verified);
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    signatures_of_inner!();
}

/// What an error text needs to know beside the error.
pub(crate) struct Circumstances<'a> {
    pub(crate) role: Role,
    pub(crate) seen: &'a Seen,
    pub(crate) ca: &'a Path,
    pub(crate) allowed: &'a [String],
}

impl Circumstances<'_> {
    /// The error text of a failed handshake.
    pub(crate) fn explain(&self, failure: &Failure) -> String {
        match failure {
            Failure::Broken(error) => {
                format!("the connection broke in the TLS handshake: {error}; {}", self.maybe())
            }
            Failure::Ended(received) => {
                format!("the peer hung up in the TLS handshake, after {received} bytes: {}", self.maybe())
            }
            Failure::NotTls(first) => {
                format!(
                    "the peer does not speak TLS: its first bytes are {}, expected a handshake",
                    Hex(first)
                )
            }
            Failure::Tls(error) => self.explain_tls(error),
        }
    }

    /// The most likely reason of a peer that says none.
    fn maybe(&self) -> &'static str {
        match self.role {
            Role::Client => "is it set up for TLS?",
            Role::Server => "it may have refused our certificate",
        }
    }

    fn explain_tls(&self, error: &Error) -> String {
        match error {
            Error::AlertReceived(description) => alert::received(u8::from(*description), self.role),
            Error::InvalidCertificate(problem) => self.explain_certificate(problem),
            Error::NoCertificatesPresented => {
                format!(
                    "the peer has sent no certificate, expected one signed by a CA of {}",
                    self.ca.display()
                )
            }
            Error::InvalidCertRevocationList(CertRevocationListError::BadSignature) => format!(
                "refused the peer's certificate {}: the revocation list of \"{}\" was not signed by the CA that signed it",
                self.seen.names().unwrap_or_default(),
                self.seen.names().unwrap_or_default().issuer
            ),
            Error::PeerIncompatible(reason) => format!("no TLS in common with the peer: {reason:?}"),
            Error::PeerMisbehaved(reason) => format!("the peer breaks the rules of TLS: {reason:?}"),
            other => format!("the TLS handshake failed: {other}"),
        }
    }

    fn explain_certificate(&self, problem: &CertificateError) -> String {
        use CertificateError as Problem;
        let names = self.seen.names().unwrap_or_default();
        let refused = |why: String| format!("refused the peer's certificate {names}: {why}");
        match problem {
            Problem::UnknownIssuer | Problem::BadSignature => refused(format!(
                "unknown CA, it was signed by \"{}\" and not by a CA of {}",
                names.issuer,
                self.ca.display()
            )),
            Problem::Expired | Problem::ExpiredContext { .. } => {
                match self.seen.expired_intermediate().filter(|_| !names.has_expired) {
                    Some(signer) => refused(format!(
                        "{signer}, a CA certificate that came with it, expired at {}",
                        signer.not_after
                    )),
                    None => refused(format!("it expired at {}", names.not_after)),
                }
            }
            Problem::NotValidYet | Problem::NotValidYetContext { .. } => {
                refused(format!("it is not valid before {}", names.not_before))
            }
            Problem::NotValidForNameContext { expected, .. } => refused(format!(
                "it is for {}, expected {:?}; the host name to expect can be set",
                names.alternatives(),
                expected.to_str()
            )),
            Problem::Revoked => refused("it was revoked".to_owned()),
            Problem::ExpiredRevocationList | Problem::ExpiredRevocationListContext { .. } => {
                refused(format!("the revocation list of \"{}\" is past its next update", names.issuer))
            }
            Problem::ApplicationVerificationFailure => {
                refused(format!("its name is not authorised, expected {}", self.allowed.join(" or ")))
            }
            other => refused(other.to_string()),
        }
    }
}

/// Bytes as hexadecimal numbers with blanks between.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(at, byte)| {
            let blank = if at == 0 { "" } else { " " };
            write!(f, "{blank}{byte:02x}")
        })
    }
}
