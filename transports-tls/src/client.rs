//! The dialling end of TLS.

use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use super::alert::Role;
use super::credentials::{Directory, InvalidCredentials, TlsRules};
use super::handshake::{Failure, Line};
use super::provider::TlsProvider;
use super::socket::AsyncSocket;
use super::stream::{Settings, TlsStream};
use super::verify::{Circumstances, Seen, Verifiers, Witness};

/// TLS settings of the connecting end: trusted CA, own certificate. Cheap to clone.
///
/// TLS 1.3 and 1.2. The server's certificate must be signed by a CA of `ca-cert.pem`, be valid now,
/// and be for the host that is dialled: its subject alternative names count, not its common name.
#[derive(Clone, Debug)]
pub struct TlsClient {
    directory: Directory,
    verifier: Arc<Verifiers<WebPkiServerVerifier>>,
    identity: Option<Arc<CertifiedKey>>,
    crypto: Arc<CryptoProvider>,
    hostname: Option<ServerName<'static>>,
    settings: Settings,
}

/// A name that the certificate of a server must have: see [`TlsClient::expected_name`].
#[derive(Clone, Debug)]
pub struct ExpectedName(ServerName<'static>);

impl TlsClient {
    /// Reads `ca-cert.pem`, and if they are there `ca-crl.pem`, `client-cert.pem` and
    /// `client-key.pem` of a directory. Without a certificate, a server that demands one refuses
    /// us.
    ///
    /// # Errors
    /// A file that is missing, cannot be read or does not fit the others, by its name.
    pub fn from_directory(path: &Path) -> Result<Self, InvalidCredentials> {
        Self::with_provider(path, TlsProvider::default())
    }

    /// The same with a provider of choice.
    ///
    /// # Errors
    /// As [`from_directory`](Self::from_directory).
    pub fn with_provider(path: &Path, provider: TlsProvider) -> Result<Self, InvalidCredentials> {
        Self::with_rules(path, TlsRules { provider, ..TlsRules::default() })
    }

    /// The same by other rules.
    ///
    /// # Errors
    /// As [`from_directory`](Self::from_directory).
    pub fn with_rules(path: &Path, rules: TlsRules) -> Result<Self, InvalidCredentials> {
        let TlsRules { provider, current_lists } = rules;
        let directory = Directory::new(path);
        let crypto = provider.for_rustls();
        let roots = directory.roots()?;
        let verifier = Verifiers::build(directory.revoked(current_lists)?, |lists| {
            let mut verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&crypto));
            if !lists.is_empty() {
                verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
            }
            if current_lists {
                verifier = verifier.enforce_revocation_expiration();
            }
            verifier.build()
        });
        let verifier = verifier.map_err(|error| directory.blame(&error))?;
        let identity = directory.identity("client", &crypto)?;
        let settings =
            Settings { role: Role::Client, certified: identity.is_some(), provider, refresh_after: None };
        Ok(Self { directory, verifier, identity, crypto, hostname: None, settings })
    }

    /// The name or address that the server's certificate must have. Default: the host that is
    /// dialled; without one, on a unix socket, it must be set.
    ///
    /// # Errors
    /// When it is neither a DNS name nor an address.
    pub fn hostname(mut self, name: &str) -> Result<Self, InvalidCredentials> {
        let parsed = ServerName::try_from(name.to_owned()).map_err(|_| {
            let problem = format!(
                "{name:?} is no host name that a certificate may have, expected a DNS name or an address"
            );
            InvalidCredentials::new(self.directory.path(), problem)
        })?;
        self.hostname = Some(parsed);
        Ok(self)
    }

    /// Changes the key after this many bytes sent, rounded up to 256 KiB. Default: when the cipher
    /// demands it, after 2^24 records of 16 KiB or 256 GiB on one channel with AES-GCM. No effect
    /// in TLS 1.2. Not towards a QEMU: see docs/tls.md.
    #[must_use]
    pub fn refresh_keys_after(mut self, bytes: NonZeroU64) -> Self {
        self.settings.refresh_after = Some(bytes);
        self
    }

    /// Whether we have a certificate to show.
    pub fn has_certificate(&self) -> bool {
        self.identity.is_some()
    }

    /// The name to expect of the server: the one that was [set](Self::hostname), or else the `host`
    /// that is dialled, if there is one. `endpoint` is for the error.
    ///
    /// # Errors
    /// `InvalidInput`: there is none, or it is no name that a certificate may have.
    pub fn expected_name(&self, host: Option<&str>, endpoint: &dyn Display) -> io::Result<ExpectedName> {
        if let Some(name) = &self.hostname {
            return Ok(ExpectedName(name.clone()));
        }
        let Some(host) = host else {
            let text = format!("TLS over {endpoint}: no host name to expect in the certificate, set one");
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        };
        // The scope (interface) of an address has a meaning on this host only.
        let host = host.split('%').next().unwrap_or(host);
        ServerName::try_from(host.to_owned()).map(ExpectedName).map_err(|_| {
            let text = format!("{host:?} is no name that a certificate may have, set the one to expect");
            io::Error::new(ErrorKind::InvalidInput, text)
        })
    }

    /// Makes a connected socket an encrypted stream. `name` is that of
    /// [`expected_name`](Self::expected_name).
    ///
    /// # Errors
    /// `InvalidData`: the handshake failed, with the reason.
    pub async fn connect<S: AsyncSocket>(&self, socket: S, name: ExpectedName) -> io::Result<TlsStream> {
        let seen = Seen::default();
        let outcome = self.handshake(socket, name.0, &seen).await;
        match outcome {
            Ok(stream) => Ok(stream),
            Err(failure) => {
                let ca = self.directory.ca_path();
                let circumstances = Circumstances { role: Role::Client, seen: &seen, ca: &ca, allowed: &[] };
                // Never one of the kinds that dialling tries again after: the peer has seen a
                // connection.
                Err(io::Error::new(ErrorKind::InvalidData, circumstances.explain(&failure)))
            }
        }
    }

    async fn handshake<S: AsyncSocket>(
        &self,
        socket: S,
        name: ServerName<'static>,
        seen: &Seen,
    ) -> Result<TlsStream, Failure> {
        let config = self.config(seen).map_err(Failure::Tls)?;
        let connection = UnbufferedClientConnection::new(Arc::new(config), name).map_err(Failure::Tls)?;
        let mut line = Line::new(socket);
        let connection = line.handshake(connection, &mut |_| {}).await?;
        let parts = line.into_parts(connection, self.settings.provider)?;
        TlsStream::new(parts, self.settings).into_blocking().map_err(Failure::Broken)
    }

    fn config(&self, seen: &Seen) -> Result<ClientConfig, rustls::Error> {
        let verifier = Arc::clone(&self.verifier);
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.crypto))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Witness::new(verifier, seen, &Arc::default()));
        let mut config = match &self.identity {
            Some(identity) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(identity))))
            }
            None => builder.with_no_client_auth(),
        };
        config.enable_secret_extraction = true;
        // It saves the certificates, but no round trip in TLS 1.3, and QEMU shows no interest.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}
