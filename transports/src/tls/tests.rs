mod authority;
mod faults;
mod refusals;
mod relay;
mod revocation;
mod streams;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use tempfile::TempDir;

use super::{TlsStream, connect, expected_name};
use crate::testing::{LONG, Spawned, spawn};
use crate::{
    Arrival, Channel, DialOptions, Endpoint, Listener, TlsClient, TlsProvider, TlsRules, TlsServer,
    TransportError,
};
use authority::{Authority, Member};

/// Credentials of both ends, by one CA.
struct Credentials {
    dir: TempDir,
}

impl Credentials {
    fn new() -> Self {
        let authority = Authority::new("test CA");
        Self::made(&authority, &Member::server(), Some(&Member::client()))
    }

    fn made(authority: &Authority, server: &Member, client: Option<&Member>) -> Self {
        let dir = TempDir::new().unwrap();
        authority.write(dir.path());
        authority.member(server).write(dir.path(), "server");
        if let Some(client) = client {
            authority.member(client).write(dir.path(), "client");
        }
        Self { dir }
    }

    fn client(&self) -> TlsClient {
        TlsClient::from_directory(self.dir.path()).unwrap()
    }

    fn server(&self) -> TlsServer {
        TlsServer::from_directory(self.dir.path()).unwrap()
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// A listener that serves on a thread of its own; the arrivals that matter come out here.
struct Serving {
    listener: std::sync::Arc<Listener>,
    arrivals: Receiver<Arrival>,
    thread: Spawned<()>,
}

impl Serving {
    fn new(uri: &str, tls: Option<TlsServer>, silence: Duration) -> Self {
        let listener = std::sync::Arc::new(Listener::bind(&uri.parse().unwrap()).unwrap().tls(tls));
        let (sender, arrivals) = mpsc::channel();
        let own = std::sync::Arc::clone(&listener);
        let thread = spawn("tls-serving", move || {
            own.serve(4, silence, &mut |arrival| {
                if !matches!(arrival, Arrival::Opened { .. }) {
                    sender.send(arrival).unwrap();
                }
            })
            .unwrap();
        });
        Self { listener, arrivals, thread }
    }

    fn tcp(tls: TlsServer) -> Self {
        Self::new("tcp:localhost:0", Some(tls), LONG)
    }

    fn endpoint(&self) -> Endpoint {
        self.listener.endpoint()
    }

    fn next(&self) -> Arrival {
        self.arrivals.recv_timeout(LONG).unwrap()
    }

    /// The next one, whose first four bytes are still to come out.
    fn identified(&self) -> Channel {
        match self.next() {
            Arrival::Identified { channel, .. } => channel,
            other => panic!("{other:?}"),
        }
    }

    /// Why the next one was not let in.
    fn failed(&self) -> io::Error {
        match self.next() {
            Arrival::Failed { error, .. } => error,
            other => panic!("{other:?}"),
        }
    }

    fn stop(self) {
        self.listener.stopper().stop();
        self.thread.join();
    }
}

fn dial(endpoint: &Endpoint, tls: TlsClient) -> Result<Channel, TransportError> {
    dial_within(endpoint, tls, LONG)
}

/// A client's stream over a socket that a test keeps, to say what TLS would not.
fn encrypted(client: &TlsClient, socket: &TcpStream, endpoint: &Endpoint) -> TlsStream {
    let name = expected_name(client, endpoint).unwrap();
    let copy = socket.try_clone().unwrap().into();
    crate::os::event_loop::block_on(connect(client, copy, name)).unwrap().unwrap()
}

fn dial_within(endpoint: &Endpoint, tls: TlsClient, deadline: Duration) -> Result<Channel, TransportError> {
    crate::dial(endpoint, &DialOptions { deadline, tls: Some(tls), ..DialOptions::default() })
}

/// The reason of an error that is not worth another attempt.
fn reason(outcome: Result<Channel, TransportError>) -> String {
    match outcome.unwrap_err() {
        TransportError::Io { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    }
}

/// A client and a server that have said hello to each other.
fn pair(client: TlsClient, server: TlsServer) -> (Channel, Channel) {
    let serving = Serving::tcp(server);
    let one = dial(&serving.endpoint(), client).unwrap();
    let pair = say_hello(one, &serving);
    serving.stop();
    pair
}

fn say_hello(one: Channel, serving: &Serving) -> (Channel, Channel) {
    one.send_all(b"QEVM").unwrap();
    let other = serving.identified();
    let mut hello = [0; 4];
    other.recv_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"QEVM");
    (one, other)
}

/// Bytes that do not repeat soon.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..len).map(byte).collect()
}

fn bytes(count: u64) -> NonZeroU64 {
    NonZeroU64::new(count).unwrap()
}

fn bind() -> (TcpListener, Endpoint) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, Endpoint::Tcp { host: "localhost".to_owned(), port })
}
