//! TLS for the channels of a migration: handshakes and a record layer over connected sockets.
//!
//! ```text
//!  credentials ── files under QEMU's names ──> client, server: settings
//!                                                  | connect, accept
//!  verify, names ── whose certificate it is ──> handshake: rustls, on a socket that does not block
//!                                                  | keys
//!  record: one record, encrypted or decrypted in place  v
//!    sealer: several to one write ──────────── stream: blocking, one thread sends, one receives
//!    opener: several from one read ─────────────+
//!    secrets: the next keys ────────────────────+
//!  provider: whose AES it is      alert: what the peer's alert means      socket: the caller's event loop
//! ```
//!
//! rustls does the handshake, checks certificates and derives keys. The record layer is our own,
//! because that of rustls copies data three times and locks both directions together: see
//! docs/tls.md.

mod alert;
mod client;
mod credentials;
mod handshake;
#[doc(hidden)]
pub mod measure;
mod names;
mod opener;
mod provider;
mod record;
mod revocation;
mod sealer;
mod secrets;
mod server;
mod socket;
mod stream;
mod verify;

pub use client::{ExpectedName, TlsClient};
pub use credentials::{InvalidCredentials, TlsRules};
pub use provider::TlsProvider;
pub use server::{Stage, TlsServer};
pub use socket::{AsyncSocket, FirstBytes, Ready};
pub use stream::TlsStream;

#[cfg(test)]
mod tests {
    mod records;
}
