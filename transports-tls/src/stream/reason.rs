//! Why a connection has ended, in words: what the socket says of it, and what the peer may mean.

use std::io::{self, ErrorKind};
use std::sync::PoisonError;
use std::time::Duration;

use super::{Ended, Role, TlsStream, lock};
use crate::opener::Opener;

/// Timeout of a sender whose connection broke, until the receiver has read the peer's alert, which
/// gives the reason.
const PEER_ALERT_TIMEOUT: Duration = Duration::from_millis(500);

impl TlsStream {
    pub(super) fn end_of_connection(&self, opener: &Opener) -> Ended {
        match opener.partial() {
            0 if opener.has_received_data() || self.settings.role == Role::Server => Ended::Well,
            0 => Ended::Badly(
                ErrorKind::UnexpectedEof,
                self.with_hint(opener, "the peer closed the connection without an alert"),
            ),
            partial => Ended::Badly(
                ErrorKind::UnexpectedEof,
                format!("the connection ended after {partial} bytes of a TLS record"),
            ),
        }
    }

    /// A server of TLS 1.3 looks at the client's certificate when the client is through with its
    /// handshake.
    pub(super) fn with_hint(&self, opener: &Opener, text: &str) -> String {
        if opener.has_received_data() || self.settings.role == Role::Server {
            return text.to_owned();
        }
        let maybe = match self.settings.certified {
            true => "it may have refused our certificate, and says why on its side",
            false => "it may demand a client certificate, and we have none",
        };
        format!("{text}, right after the TLS handshake: {maybe}")
    }

    /// The peer's alert says more than "broken pipe".
    pub(super) fn explain_broken(&self, error: io::Error) -> io::Error {
        if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) {
            return error;
        }
        let listened = self.listen();
        if let Err(said) = listened {
            return said;
        }
        let received_end = lock(&self.received_end);
        let received_end =
            self.end_received.wait_timeout_while(received_end, PEER_ALERT_TIMEOUT, |end| end.is_none());
        match &*received_end.unwrap_or_else(PoisonError::into_inner).0 {
            Some(Ended::Badly(kind, text)) => io::Error::new(*kind, text.clone()),
            _ => error,
        }
    }
}
