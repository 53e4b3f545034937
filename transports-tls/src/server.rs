//! The accepting end of TLS.

use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use super::alert::Role;
use super::credentials::{Directory, InvalidCredentials, TlsRules};
use super::handshake::{Failure, Line, Parts};
use super::provider::TlsProvider;
use super::socket::{AsyncSocket, FirstBytes, Ready};
use super::stream::{Settings, TlsStream};
use super::verify::{Circumstances, Seen, Verifiers, Witness};

/// TLS settings of the accepting end: own certificate, authorised peers. Cheap to clone.
///
/// TLS 1.3 and 1.2. Every client must show a certificate signed by a CA of `ca-cert.pem`, unless
/// [`without_client_certificates`](Self::without_client_certificates) says otherwise.
#[derive(Clone, Debug)]
pub struct TlsServer {
    directory: Directory,
    verifier: Arc<Verifiers<dyn ClientCertVerifier>>,
    /// No client needs a certificate, unless there is a list.
    anonymous: bool,
    identity: Arc<CertifiedKey>,
    crypto: Arc<CryptoProvider>,
    allowed: Arc<[String]>,
    settings: Settings,
}

/// How far a client has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In its handshake; bytes received so far.
    Handshake(usize),
    /// Encrypted; bytes received on the connection so far.
    Encrypted(usize),
}

impl TlsServer {
    /// Reads `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and if it is there `ca-crl.pem` of
    /// a directory.
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
        let identity = directory.identity("server", &crypto)?.ok_or_else(|| {
            InvalidCredentials::new(&directory.path().join("server-cert.pem"), "there is no such file")
        })?;
        let roots = directory.roots()?;
        let verifier = Verifiers::build(directory.revoked(current_lists)?, |lists| {
            let mut verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&crypto));
            if !lists.is_empty() {
                verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
            }
            if current_lists {
                verifier = verifier.enforce_revocation_expiration();
            }
            verifier.build()
        });
        let verifier = verifier.map_err(|error| directory.blame(&error))?;
        let settings = Settings { role: Role::Server, certified: true, provider, refresh_after: None };
        let allowed = Arc::default();
        Ok(Self { directory, verifier, anonymous: false, identity, crypto, allowed, settings })
    }

    /// Accepts clients without a certificate. The stream is encrypted, but the sender is not
    /// authenticated. With a list of [`authorise`](Self::authorise) a certificate is demanded
    /// nevertheless.
    #[must_use]
    pub fn without_client_certificates(mut self) -> Self {
        self.anonymous = true;
        self
    }

    /// Lets only those in whose certificate has one of these names: a subject as QEMU writes it
    /// (`CN=host,O=Example`, in either order), or a subject alternative name: with an `@` a mail
    /// address, with a `:` a URI or an address, otherwise a DNS name or an address (`host.example`,
    /// `10.0.0.7`). A `*` stands for any text, and `\,` for a comma within a value. An empty list,
    /// the default, admits every certificate of the CA.
    #[must_use]
    pub fn authorise<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.allowed = names.into_iter().map(Into::into).collect();
        self
    }

    /// As [`TlsClient::refresh_keys_after`](crate::TlsClient::refresh_keys_after).
    #[must_use]
    pub fn refresh_keys_after(mut self, bytes: NonZeroU64) -> Self {
        self.settings.refresh_after = Some(bytes);
        self
    }

    /// Makes an accepted client an encrypted stream, and receives its first bytes: they are in
    /// `first`, and come again. `stage` is kept up to date for a caller that stops waiting. `None`:
    /// it hung up before its first byte.
    ///
    /// # Errors
    /// `InvalidData`: the handshake failed, with the reason; `UnexpectedEof`: the client closed the
    /// connection right after it.
    pub async fn accept<S: AsyncSocket>(
        &self,
        client: S,
        first: &mut impl FirstBytes,
        stage: &mut Stage,
    ) -> io::Result<Option<TlsStream>> {
        let seen = Seen::default();
        let parts = self.handshake(client, &seen, stage).await;
        let stream = match parts {
            Ok(parts) => TlsStream::new(parts, self.settings).with_client_certificate(seen.certificate()),
            // A connection that was opened and closed: a port scan, a health check.
            Err(Failure::Ended(0)) => return Ok(None),
            Err(failure) => {
                let ca = self.directory.ca_path();
                let circumstances =
                    Circumstances { role: Role::Server, seen: &seen, ca: &ca, allowed: &self.allowed };
                return Err(io::Error::new(ErrorKind::InvalidData, circumstances.explain(&failure)));
            }
        };
        let stream = first_bytes::<S>(stream, first, stage).await?;
        stream.into_blocking().map(Some)
    }

    async fn handshake<S: AsyncSocket>(
        &self,
        client: S,
        seen: &Seen,
        stage: &mut Stage,
    ) -> Result<Parts, Failure> {
        let config = self.config(seen).map_err(Failure::Tls)?;
        let connection = UnbufferedServerConnection::new(Arc::new(config)).map_err(Failure::Tls)?;
        let mut line = Line::new(client);
        let connection = line
            .handshake(connection, &mut |received| {
                *stage = Stage::Handshake(received);
            })
            .await?;
        line.into_parts(connection, self.settings.provider)
    }

    fn config(&self, seen: &Seen) -> Result<ServerConfig, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.crypto))
            .with_safe_default_protocol_versions()?;
        let builder = if self.anonymous && self.allowed.is_empty() {
            builder.with_no_client_auth()
        } else {
            let verifier = Arc::clone(&self.verifier);
            builder.with_client_cert_verifier(Witness::new(verifier, seen, &self.allowed))
        };
        let mut config =
            builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.identity))));
        config.enable_secret_extraction = true;
        // No call would give them back, and a client that does not read would leave them in the
        // socket.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(config)
    }
}

/// Fills `first` with what the client sends.
async fn first_bytes<S: AsyncSocket>(
    stream: TlsStream,
    first: &mut impl FirstBytes,
    stage: &mut Stage,
) -> io::Result<TlsStream> {
    let client: S = stream.waiting()?;
    loop {
        let received = first.received();
        *stage = Stage::Encrypted(received);
        let missing @ [_, ..] = first.missing() else { break };
        // Before the wait: something may have come with the handshake.
        let count = match stream.recv_now(missing) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                client.when_ready(Ready::Readable, |_| stream.recv_now(missing)).await?
            }
            outcome => outcome?,
        };
        if count == 0 {
            let text = format!(
                "the peer closed the connection {received} bytes after the TLS handshake: it may have refused our certificate, and says why on its side"
            );
            return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
        }
        first.note(count);
    }
    Ok(stream)
}
