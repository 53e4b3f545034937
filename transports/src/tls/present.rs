//! Handshakes on the sockets of this crate.

use std::io;
use std::time::Duration;

use multifd_transports_tls::{AsyncSocket, ExpectedName, Ready, TlsClient, TlsStream};
use socket2::{SockRef, Socket};
use tokio::io::Interest;
use tokio::time::timeout;

use crate::Endpoint;
use crate::door::Client;

/// The name to expect at `endpoint`.
pub(crate) fn expected_name(tls: &TlsClient, endpoint: &Endpoint) -> io::Result<ExpectedName> {
    let host = match endpoint {
        Endpoint::Tcp { host, .. } if host.is_empty() => Some("localhost"),
        Endpoint::Tcp { host, .. } => Some(host.as_str()),
        _ => None,
    };
    tls.expected_name(host, endpoint)
}

/// Makes a connected socket a sealed stream. Must be called in a runtime.
pub(crate) async fn connect(tls: &TlsClient, socket: Socket, name: ExpectedName) -> io::Result<TlsStream> {
    tls.connect(Client::new(socket)?, name).await
}

impl AsyncSocket for Client {
    fn new(socket: Socket) -> io::Result<Self> {
        Self::new(socket)
    }

    async fn when_ready<T: Send>(
        &self,
        ready: Ready,
        call: impl FnMut(SockRef<'_>) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        let interest = match ready {
            Ready::Readable => Interest::READABLE,
            Ready::Writable => Interest::WRITABLE,
        };
        self.when_ready(interest, call).await
    }

    async fn within<T>(limit: Duration, work: impl Future<Output = T> + Send) -> Option<T> {
        timeout(limit, work).await.ok()
    }

    fn into_socket(self) -> io::Result<Socket> {
        self.into_socket()
    }
}
