//! The handshake, of either end, on a socket that does not block.

use std::io::{self, Read};
use std::net::Shutdown;
use std::time::Duration;

use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use socket2::Socket;

use super::opener::Opener;
use super::provider::{TlsProvider, Unsound};
use super::record::{HEADER_LEN, MAX_PAYLOAD, Protection, content};
use super::sealer::Sealer;
use super::secrets::{Handshaking, Secrets};
use super::socket::{AsyncSocket, Ready};

/// Bytes of a handshake that may be waiting to be understood; a chain of certificates is some KiB.
const MAX_WAITING: usize = 128 << 10;

/// Timeout for a refused peer to receive the alert.
const ALERT_TIMEOUT: Duration = Duration::from_secs(1);

/// A fatal alert in the clear, as a record of its own.
const UNEXPECTED_MESSAGE: [u8; 7] = [content::ALERT, 3, 3, 0, 2, 2, 10];

/// A socket in its handshake.
pub(crate) struct Line<S> {
    socket: S,
    /// Received and not understood yet.
    incoming: Vec<u8>,
    /// How much of it rustls has been shown: whole records.
    shown: usize,
    outgoing: Vec<u8>,
    /// Bytes received in total.
    received: usize,
}

/// Why a handshake failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection broke.
    Broken(io::Error),
    /// The peer ended it; the number of bytes that it had sent.
    Ended(usize),
    /// The first byte is not that of a TLS record; these are the first ones.
    NotTls(Vec<u8>),
    /// TLS failed: a certificate, an alert, a fault.
    Tls(rustls::Error),
}

/// The outcome of a handshake.
pub(crate) struct Parts {
    pub(crate) socket: Socket,
    pub(crate) sealer: Sealer,
    pub(crate) opener: Opener,
    pub(crate) secrets: Secrets,
}

/// What to do next.
enum Next {
    Done,
    Go,
    Read,
    Write,
}

impl<S: AsyncSocket> Line<S> {
    pub(crate) fn new(socket: S) -> Self {
        Self { socket, incoming: Vec::new(), shown: 0, outgoing: Vec::new(), received: 0 }
    }

    /// Runs the handshake. When it fails, the peer has been sent an alert with the reason.
    /// `on_received` is called with the bytes that the peer has sent so far.
    pub(crate) async fn handshake<C: Handshaking>(
        &mut self,
        mut connection: C,
        on_received: &mut dyn FnMut(usize),
    ) -> Result<C, Failure> {
        loop {
            match self.step(&mut connection) {
                Ok(Next::Done) => {
                    self.flush().await.map_err(Failure::Broken)?;
                    return Ok(connection);
                }
                Ok(Next::Go) => {}
                Ok(Next::Read) if self.show_record() => {}
                Ok(Next::Read) => {
                    if let Err(failure) = self.read().await {
                        self.refuse_plaintext(&failure).await;
                        return Err(failure);
                    }
                    on_received(self.received);
                }
                Ok(Next::Write) => self.flush().await.map_err(Failure::Broken)?,
                Err(error) => {
                    self.send_alert(&mut connection).await;
                    return Err(Failure::Tls(error));
                }
            }
        }
    }

    /// The end of the asynchronous part.
    pub(crate) fn into_parts<C: Handshaking>(
        self,
        connection: C,
        provider: TlsProvider,
    ) -> Result<Parts, Failure> {
        let (keys, secrets) = connection.into_secrets().map_err(Failure::Tls)?;
        let unsound = |Unsound| Failure::Tls(rustls::Error::General("unusable keys".to_owned()));
        let version = secrets.version();
        let sending = Protection::new(provider, version, keys.tx).map_err(unsound)?;
        let receiving = Protection::new(provider, version, keys.rx).map_err(unsound)?;
        Ok(Parts {
            socket: self.socket.into_socket().map_err(Failure::Broken)?,
            sealer: Sealer::new(sending, secrets.record_limit()),
            opener: Opener::new(receiving, &self.incoming),
            secrets,
        })
    }

    fn step<C: Handshaking>(&mut self, connection: &mut C) -> Result<Next, rustls::Error> {
        let shown = self.incoming.get_mut(..self.shown).unwrap_or_default();
        let UnbufferedStatus { discard, state } = connection.process(shown);
        let next = match state {
            Ok(ConnectionState::BlockedHandshake) => Ok(Next::Read),
            Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.outgoing).map(|()| Next::Go),
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Ok(Next::Write)
            }
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
            Ok(_) => Err(rustls::Error::General("the peer ended the handshake".to_owned())),
            Err(error) => Err(error),
        };
        let discard = discard.min(self.shown);
        self.incoming.drain(..discard);
        self.shown -= discard;
        next
    }

    /// Shows rustls one more record, if one is here as a whole. Never more, and only when it waits
    /// for it: what the peer sends right behind its part of the handshake is for the [`Opener`].
    /// rustls would follow a key, and queue an answer to it.
    fn show_record(&mut self) -> bool {
        let hidden = self.incoming.get(self.shown..).unwrap_or_default();
        let Some([_, major, _, high, low]) = hidden.first_chunk::<HEADER_LEN>() else { return false };
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        if *major != 3 || len > MAX_PAYLOAD {
            // It says what is wrong with that.
            self.shown = self.incoming.len();
            return true;
        }
        let is_whole = hidden.len() >= HEADER_LEN + len;
        if is_whole {
            self.shown += HEADER_LEN + len;
        }
        is_whole
    }

    async fn read(&mut self) -> Result<(), Failure> {
        if self.incoming.len() > MAX_WAITING {
            let text = format!("more than {MAX_WAITING} bytes of one handshake message");
            return Err(Failure::Tls(rustls::Error::General(text)));
        }
        let mut bytes = [0; 4096];
        let received = self.receive(&mut bytes).await.map_err(Failure::Broken)?;
        if received == 0 {
            return Err(Failure::Ended(self.received));
        }
        self.incoming.extend_from_slice(bytes.get(..received).unwrap_or_default());
        let first = self.received == 0;
        self.received += received;
        match self.incoming.first() {
            Some(kind) if first && ![content::HANDSHAKE, content::ALERT].contains(kind) => {
                self.incoming.truncate(8);
                Err(Failure::NotTls(std::mem::take(&mut self.incoming)))
            }
            _ => Ok(()),
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let sent = self
                .socket
                .when_ready(Ready::Writable, |socket| {
                    socket.send_with_flags(&self.outgoing, libc::MSG_NOSIGNAL)
                })
                .await?;
            self.outgoing.drain(..sent);
        }
        Ok(())
    }

    /// Receives at least a byte, or 0 at the end.
    async fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.when_ready(Ready::Readable, |mut socket| socket.read(bytes)).await
    }

    /// Sends the alert.
    async fn send_alert<C: Handshaking>(&mut self, connection: &mut C) {
        // No further: rustls looks for more of what it has refused, and panics if that is not
        // there.
        while connection.has_to_send() {
            match connection.process(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    if encode(data, &mut self.outgoing).is_err() {
                        break;
                    }
                }
                _ => break,
            }
        }
        self.part().await;
    }

    /// Sends an alert to a peer that does not speak TLS: a multifd source recognises it.
    async fn refuse_plaintext(&mut self, failure: &Failure) {
        if let Failure::NotTls(_) = failure {
            self.outgoing = UNEXPECTED_MESSAGE.to_vec();
            self.part().await;
        }
    }

    /// Sends what is left, and waits for the peer to hang up: to close with bytes unread would
    /// reset the connection, and the alert might be lost with it.
    async fn part(&mut self) {
        let delivered = S::within(ALERT_TIMEOUT, async {
            self.flush().await?;
            self.socket.when_ready(Ready::Writable, |socket| socket.shutdown(Shutdown::Write)).await?;
            let mut bytes = [0; 4096];
            while self.receive(&mut bytes).await? > 0 {}
            Ok::<_, io::Error>(())
        });
        // Best effort: the connection ends either way.
        let _ = delivered.await;
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), rustls::Error> {
    let failed = |error| rustls::Error::General(format!("{error}"));
    let at = outgoing.len();
    match data.encode(&mut []) {
        Ok(_) => Ok(()),
        Err(EncodeError::InsufficientSize(short)) => {
            outgoing.resize(at + short.required_size, 0);
            let (_, room) = outgoing.split_at_mut(at);
            data.encode(room).map(drop).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}
