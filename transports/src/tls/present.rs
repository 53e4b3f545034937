//! Handshakes on the sockets of this crate.

use std::io;
use std::time::Duration;

use multifd_transports_tls::{AsyncSocket, ExpectedName, Ready, TlsClient, TlsStream};
use rustix::event::PollFlags;
use socket2::Socket;

use crate::Endpoint;
use crate::accept::client::Client;
use crate::accept::first_bytes::FirstBytes;
use crate::os::event_loop::within;

/// The name to expect at `endpoint`.
pub(crate) fn expected_name(tls: &TlsClient, endpoint: &Endpoint) -> io::Result<ExpectedName> {
    let host = match endpoint {
        Endpoint::Tcp { host, .. } if host.is_empty() => Some("localhost"),
        Endpoint::Tcp { host, .. } => Some(host.as_str()),
        _ => None,
    };
    tls.expected_name(host, endpoint)
}

/// Makes a connected socket an encrypted stream.
pub(crate) async fn connect(tls: &TlsClient, socket: Socket, name: ExpectedName) -> io::Result<TlsStream> {
    tls.connect(Client::new(socket)?, name).await
}

impl AsyncSocket for Client {
    fn new(socket: Socket) -> io::Result<Self> {
        Self::new(socket)
    }

    async fn when_ready<T>(&self, ready: Ready, call: impl FnMut(&Socket) -> io::Result<T>) -> io::Result<T> {
        let flags = match ready {
            Ready::Readable => PollFlags::IN,
            Ready::Writable => PollFlags::OUT,
        };
        self.when_ready(flags, call).await
    }

    async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        within(limit, work).await
    }

    fn into_socket(self) -> io::Result<Socket> {
        self.into_socket()
    }
}

impl multifd_transports_tls::FirstBytes for FirstBytes {
    fn received(&self) -> usize {
        self.received()
    }

    fn missing(&mut self) -> &mut [u8] {
        self.missing()
    }

    fn note(&mut self, count: usize) {
        self.note(count);
    }
}
