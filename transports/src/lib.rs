//! Connected byte channels for a migration: sockets, pipes and commands; dialling, accepting,
//! pacing.
//!
//! ```text
//!  "tcp:10.0.0.7:4444"                      Listener::bind(&endpoint)
//!        | parse                                  | serve: accepts for ever, reads the
//!     Endpoint                                    | first bytes of all clients side by side
//!        | dial: names, retries, deadline,        v
//!        v       Stopper                    Arrival::Identified { channel, first, .. }
//!     Channel <------------ bytes ------------> Channel
//!        | send_all, send_vectored, recv, direct (the bare socket, for iovecs over guest memory)
//!        | settle: how the command behind `exec:` has ended
//!        | closer(): ends blocked calls, from any thread
//!        | Pacer::take before each packet: one rate over all channels
//! ```
//!
//! With a [`TlsClient`] in [`DialOptions`] and a [`TlsServer`] at the [`Listener`], the bytes
//! between the two channels are encrypted. [`encrypt`] does that to a connection that is there
//! already.
//!
//! [`dial`] and [`Listener::serve`] block the thread that calls them, and wait for all they have to
//! by poll(2): no runtime is needed. The result is a connected channel with blocking calls, for one
//! worker thread each. Nothing here knows the meaning of the bytes.
//!
//! Every wait ends: [`dial`] by its deadline or a [`Stopper`], [`Listener::serve`] by its
//! [`Stopper`], a blocked [`Channel`] by its [`Closer`] or the timeout, [`Pacer::take`] by
//! [`Pacer::stop`].

mod accept;
mod channel;
mod dial;
mod endpoint;
mod error;
mod file;
mod os;
mod pacer;
mod stopper;
#[cfg(test)]
mod testing;
mod thread_hook;
mod tls;

pub use accept::Arrival;
pub use accept::first_bytes::OpeningLen;
pub use accept::listener::Listener;
pub use channel::Channel;
pub use channel::broken::PeerVanished;
pub use channel::byte_stream::ByteStream;
pub use channel::closer::Closer;
pub use channel::zero_copy::ZeroCopy;
pub use dial::descriptor::receive_descriptor;
pub use dial::{DialOptions, dial, encrypt};
pub use endpoint::{Endpoint, InvalidEndpoint, VSOCK_ANY};
pub use error::TransportError;
pub use file::FileStream;
pub use os::socket_options::{Keepalive, SocketOptions};
pub use pacer::{Pacer, Stopped};
pub use stopper::Stopper;
pub use thread_hook::ThreadHook;
#[cfg(any(feature = "tls-aws-lc", feature = "tls-ring"))]
pub use tls::{InvalidCredentials, TlsProvider, TlsRules};
pub use tls::{TlsClient, TlsServer};
