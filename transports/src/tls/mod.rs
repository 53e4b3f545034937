//! TLS on a channel, if the crate is built with it: `multifd-transports-tls` over the sockets of
//! this one.
//!
//! Without a feature of TLS the types of `absent` stand in its place. They have no values, so the
//! rest of the crate is the same in both builds.

#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-ring")))]
mod absent;
#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
mod present;

#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-ring")))]
pub(crate) use absent::{Stage, TlsStream, connect, expected_name};
#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-ring")))]
pub use absent::{TlsClient, TlsServer};

#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
pub use multifd_transports_tls::{InvalidCredentials, TlsClient, TlsProvider, TlsRules, TlsServer};
#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
pub(crate) use multifd_transports_tls::{Stage, TlsStream};
#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
pub(crate) use present::{connect, expected_name};

#[cfg(test)]
#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
mod tests;
