//! What is left of the handshake: where the next keys come from.

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::UnbufferedStatus;
use rustls::{ExtractedSecrets, ProtocolVersion, SupportedCipherSuite};

use super::provider::{TlsProvider, Unsound};
use super::record::Protection;

/// Derives the keys that follow those in use, for either end of a connection.
pub(crate) enum Secrets {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

/// One of the two directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Receive,
    Send,
}

impl Secrets {
    pub(crate) fn version(&self) -> ProtocolVersion {
        match self {
            Self::Client(kernel) => kernel.protocol_version(),
            Self::Server(kernel) => kernel.protocol_version(),
        }
    }

    /// Keys can be changed: TLS 1.2 would have to shake hands again.
    pub(crate) fn can_refresh(&self) -> bool {
        self.version() == ProtocolVersion::TLSv1_3
    }

    pub(crate) fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        }
    }

    /// Records that one key may protect.
    pub(crate) fn record_limit(&self) -> u64 {
        match self.suite() {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        }
    }

    /// The next key of one direction. There is none in TLS 1.2.
    pub(crate) fn next(
        &mut self,
        direction: Direction,
        provider: TlsProvider,
    ) -> Result<Protection, Unsound> {
        let keys = match (self, direction) {
            (Self::Client(kernel), Direction::Receive) => kernel.update_rx_secret(),
            (Self::Client(kernel), Direction::Send) => kernel.update_tx_secret(),
            (Self::Server(kernel), Direction::Receive) => kernel.update_rx_secret(),
            (Self::Server(kernel), Direction::Send) => kernel.update_tx_secret(),
        };
        Protection::new(provider, ProtocolVersion::TLSv1_3, keys.map_err(|_| Unsound)?)
    }
}

/// A connection in its handshake, of either end.
pub(crate) trait Handshaking: Sized {
    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// Whether there is something to send before anything else, such as an alert.
    fn has_to_send(&self) -> bool;

    /// The keys in use, and where the next ones come from.
    fn into_secrets(self) -> Result<(ExtractedSecrets, Secrets), rustls::Error>;
}

macro_rules! handshaking {
    ($connection:ident, $data:ident, $end:ident) => {
        impl Handshaking for $connection {
            type Data = $data;

            fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
                self.process_tls_records(incoming)
            }

            fn has_to_send(&self) -> bool {
                self.wants_write()
            }

            fn into_secrets(self) -> Result<(ExtractedSecrets, Secrets), rustls::Error> {
                let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
                Ok((secrets, Secrets::$end(kernel)))
            }
        }
    };
}

handshaking!(UnbufferedClientConnection, ClientConnectionData, Client);
handshaking!(UnbufferedServerConnection, ServerConnectionData, Server);
