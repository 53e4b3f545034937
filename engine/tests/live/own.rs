//! Connections that the embedder has made, and threads that it wants to know of.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use multifd_engine::{ByteStream, Canceller, Channel, DestinationBuilder, Remedy, ThreadHook, TlsClient};

use super::*;
use crate::credentials::credentials;

/// Connections of one migration, main first: what the source has of each, and what the destination.
type Ends = (Vec<Channel>, Vec<Channel>);

fn unix(count: usize) -> Ends {
    (0..count).map(|_| Channel::pair().unwrap()).unzip()
}

/// Descriptors that are inherited by child processes, as a launcher hands them over.
fn tcp(count: usize) -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pairs = (0..count).map(|_| {
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let theirs = listener.accept().unwrap().0;
        let inherited = |socket: TcpStream| {
            let descriptor = OwnedFd::from(socket);
            rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::empty()).unwrap();
            Channel::try_from(descriptor).unwrap()
        };
        (inherited(ours), inherited(theirs))
    });
    pairs.unzip()
}

/// A stream that the engine knows nothing of.
struct Foreign(UnixStream);

impl ByteStream for Foreign {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buf)
    }

    fn write(&self, buf: &[u8]) -> io::Result<usize> {
        (&self.0).write(buf)
    }

    fn finish(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }

    fn close(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn streams(count: usize) -> Ends {
    let end = |socket| Channel::over_stream(Foreign(socket), "foreign".to_owned(), &ThreadHook::default());
    let pairs = (0..count).map(|_| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (end(ours).unwrap(), end(theirs).unwrap())
    });
    pairs.unzip()
}

fn first(mut all: Vec<Channel>) -> (Channel, Vec<Channel>) {
    let channels = all.split_off(1);
    (all.remove(0), channels)
}

fn builder() -> (RamBlock, DestinationBuilder) {
    let memory = HostMemory::anonymous(PAGES * PAGE).unwrap();
    let block = RamBlock::new("guest.ram".try_into().unwrap(), memory);
    (block.clone(), Destination::builder(vec![block]).timeout(SOON))
}

/// A destination on a thread of its own.
struct Receiving {
    block: RamBlock,
    canceller: Canceller,
    thread: JoinHandle<Result<Report, Error>>,
}

impl Receiving {
    fn over(connections: Vec<Channel>) -> Self {
        let (block, builder) = builder();
        Self::with(block, builder, connections)
    }

    fn with(block: RamBlock, builder: DestinationBuilder, connections: Vec<Channel>) -> Self {
        let (main, channels) = first(connections);
        let destination = builder.over(main, channels).unwrap();
        let canceller = destination.canceller();
        let thread = std::thread::Builder::new().spawn(move || destination.receive()?.accept()).unwrap();
        Self { block, canceller, thread }
    }

    fn end(self) -> Result<Report, Error> {
        self.thread.join().unwrap()
    }
}

fn connect(builder: SourceBuilder, connections: Vec<Channel>) -> Result<Precopy, Error> {
    let (main, channels) = first(connections);
    builder.build()?.connect_over(main, channels)
}

fn moves_over((ours, theirs): Ends) {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let channels = ours.len() as u64 - 1;
    let there = Receiving::over(theirs);
    let report = move_over(&guest, connect(source(&guest), ours).unwrap(), 3).unwrap();
    assert!(report.confirmed && report.progress.channels == channels, "{:?}", report.progress);
    let block = there.block.clone();
    there.end().unwrap();
    assert_equal(&guest.block, &block);
}

#[test]
fn a_guest_moves_over_connections_of_the_embedder() {
    for connections in [1, 2, 3] {
        moves_over(unix(connections));
        moves_over(tcp(connections));
        moves_over(streams(connections));
    }
}

#[test]
fn the_destination_takes_its_connections_in_any_order() {
    let (ours, mut theirs) = unix(4);
    theirs.reverse();
    moves_over((ours, theirs));
}

#[test]
fn main_alone_may_be_a_pipe() {
    let (reader, writer) = io::pipe().unwrap();
    let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    let there = Receiving::over(vec![reader.try_into().unwrap()]);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let precopy = connect(source(&guest), vec![writer.try_into().unwrap()]).unwrap();
    let report = move_over(&guest, precopy, 2).unwrap();
    assert!(!report.confirmed, "nothing comes back over a pipe");
    let block = there.block.clone();
    there.end().unwrap();
    assert_equal(&guest.block, &block);
}

#[test]
fn a_cancel_wakes_either_end() {
    for (connections, make) in [(1, unix as fn(usize) -> Ends), (3, unix), (3, streams)] {
        let (ours, theirs) = make(connections);
        let there = Receiving::over(theirs);
        there.canceller.cancel();
        assert_eq!(there.end().unwrap_err().kind(), ErrorKind::Cancelled);
        drop(ours);

        // The peer reads nothing: all of the guest does not fit into the sockets' buffers.
        let (ours, theirs) = make(connections);
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        // Nor does it say what it can do, which a source would wait for.
        let mut precopy = connect(source(&guest).checksums(false).digest(false), ours).unwrap();
        let control = precopy.control();
        let cancelling = std::thread::Builder::new().spawn(move || {
            // Pages are on their way.
            theirs.last().unwrap().recv_exact(&mut [0; 2 * PAGE]).unwrap();
            control.cancel();
            theirs
        });
        let error = precopy.round().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(error.source_may_resume());
        drop(cancelling.unwrap().join().unwrap());
    }
}

#[test]
fn a_channel_that_ends_before_it_says_what_it_is_ends_the_migration() {
    let (mut ours, theirs) = unix(3);
    ours.pop();
    let there = Receiving::over(theirs);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let error = connect(source(&guest), ours).and_then(|precopy| move_over(&guest, precopy, 1));
    assert!(error.unwrap_err().source_may_resume());
    let error = there.end().unwrap_err();
    assert!(error.to_string().contains("ended after 0 bytes"), "{error}");
}

#[test]
fn a_channel_that_says_nothing_ends_the_migration_by_the_timeout() {
    let (mut ours, theirs) = unix(3);
    let silent = ours.pop();
    let (block, builder) = builder();
    let there = Receiving::with(block, builder.timeout(Duration::from_millis(300)), theirs);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let error = connect(source(&guest), ours).and_then(|precopy| move_over(&guest, precopy, 1));
    assert!(error.unwrap_err().source_may_resume());
    let error = there.end().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{}", error.chain());
    drop(silent);
}

#[test]
fn what_does_not_fit_connections_of_the_embedder_is_named() {
    let guest = Guest::new("guest.ram", PAGES);
    let source = || Source::builder(vec![guest.block.clone()], Configuration::new("m")).paused_guest();
    let connect = |builder, connections: usize| connect(builder, unix(connections).0).err().unwrap();
    let refused = |error: Error, text: &str| {
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        assert!(error.to_string().contains(text), "{error}");
    };
    refused(connect(source().channels(2), 2), "2 parallel channels, but 1 connections");
    refused(connect(source().channels(1), 257), "1 parallel channels, but 256 connections");
    refused(connect(source(), 257), "multifd-channels 256, expected 1..=255");
    refused(connect(source().codec(Arc::new(Zlib::default())).channels(1), 1), "but 0 connections");
    let credentials = credentials("CA");
    let piped = || Channel::try_from(OwnedFd::from(io::pipe().unwrap().1)).unwrap();
    let client = TlsClient::from_directory(credentials.path()).unwrap();
    let error = source().tls(client).build().unwrap().connect_over(piped(), Vec::new()).err().unwrap();
    refused(error, "TLS, and one of the connections is pipe, no socket");
    let elsewhere = vec!["tcp:h:1".parse().unwrap()];
    let addressed = source().channels(1).channel_endpoints(elsewhere);
    refused(connect(addressed, 2), "channel addresses beside connections");

    let over = |builder: DestinationBuilder, connections: Vec<Channel>| {
        let (main, channels) = first(connections);
        builder.over(main, channels).err().unwrap()
    };
    refused(over(builder().1.channels(2), unix(2).1), "2 parallel channels, but 1 connections");
    let server = TlsServer::from_directory(credentials.path()).unwrap();
    refused(
        over(builder().1.tls(server), vec![piped()]),
        "TLS, and one of the connections is pipe, no socket",
    );
    let (reader, _writer) = io::pipe().unwrap();
    let pipe = Channel::try_from(OwnedFd::from(reader)).unwrap();
    let main = Channel::try_from(UnixStream::pair().unwrap().0).unwrap();
    refused(over(builder().1, vec![main, pipe]), "is pipe, no socket");
}

#[test]
fn connections_of_the_embedder_are_encrypted() {
    let credentials = credentials("CA");
    let client = || TlsClient::from_directory(credentials.path()).unwrap().hostname("127.0.0.1").unwrap();
    let server = || TlsServer::from_directory(credentials.path()).unwrap();
    for (count, make) in [(1, unix as fn(usize) -> Ends), (3, unix), (3, tcp)] {
        let (ours, mut theirs) = make(count);
        // Both ends wait for their handshakes side by side, in whatever order they are.
        theirs.reverse();
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let (block, builder) = builder();
        let there = Receiving::with(block.clone(), builder.tls(server()), theirs);
        let precopy = connect(source(&guest).tls(client()), ours).unwrap();
        assert!(move_over(&guest, precopy, 2).unwrap().confirmed);
        there.end().unwrap();
        assert_equal(&guest.block, &block);
    }
}

#[test]
fn a_source_that_shakes_no_hands_gets_no_guest_over() {
    let credentials = credentials("CA");
    let (block, builder) = builder();
    let (ours, theirs) = unix(1);
    let server = TlsServer::from_directory(credentials.path()).unwrap();
    let there = Receiving::with(block, builder.tls(server), theirs);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let error = connect(source(&guest), ours).and_then(|precopy| move_over(&guest, precopy, 1)).unwrap_err();
    assert!(error.source_may_resume());
    assert!(there.end().unwrap_err().chain().contains("does not speak TLS"));

    // The host that a certificate must be for is not known by a connection.
    let client = TlsClient::from_directory(credentials.path()).unwrap();
    let error = connect(source(&guest).tls(client), unix(1).0).err().unwrap();
    assert!(error.chain().contains("no host name to expect"), "{}", error.chain());

    // A peer that says nothing ends it by the timeout; a cancel would, too.
    let client = TlsClient::from_directory(credentials.path()).unwrap().hostname("127.0.0.1").unwrap();
    let (ours, _silent) = unix(1);
    let source = source(&guest).tls(client).timeout(Duration::from_millis(200));
    let error = connect(source, ours).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{}", error.chain());
}

#[test]
fn every_thread_calls_the_hook_with_its_name() {
    let hook = || {
        let names = Arc::new(Mutex::new(BTreeSet::new()));
        let noted = Arc::clone(&names);
        let hook = move |name: &str| {
            assert_eq!(std::thread::current().name(), Some(name));
            noted.lock().unwrap().insert(name.to_owned());
        };
        (names, hook)
    };
    let ((here, at_source), (there, at_destination)) = (hook(), hook());
    let (ours, theirs) = unix(3);
    let (block, builder) = builder();
    let receiving = Receiving::with(block, builder.thread_hook(at_destination), theirs);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let precopy = connect(source(&guest).thread_hook(at_source), ours).unwrap();
    move_over(&guest, precopy, 1).unwrap();
    receiving.end().unwrap();
    assert!(here.lock().unwrap().iter().eq(["mig-alive", "mig-return", "mig-send-0", "mig-send-1"]));
    assert!(there.lock().unwrap().iter().eq(["mig-accept", "mig-alive", "mig-recv"]));
}

/// As a runtime polls a future, on one of its threads.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
}

#[test]
fn calls_from_within_a_future_block_and_work() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    block_on(async {
        // A name, which is looked up on a thread of its own.
        let Endpoint::Tcp { port, .. } = there.uri else { panic!("{}", there.uri) };
        let uri = Endpoint::Tcp { host: "localhost".to_owned(), port };
        let precopy = source(&guest).channels(2).build().unwrap().connect(&uri).unwrap();
        move_over(&guest, precopy, 1).unwrap();
    });
    let (block, result) = there.end();
    result.unwrap();
    assert_equal(&guest.block, &block);

    let (ours, theirs) = unix(2);
    let sending = std::thread::Builder::new().spawn(move || {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        move_over(&guest, connect(source(&guest), ours).unwrap(), 1)
    });
    block_on(async {
        let (main, channels) = first(theirs);
        builder().1.over(main, channels).unwrap().receive().unwrap().accept().unwrap();
    });
    sending.unwrap().join().unwrap().unwrap();
}

#[test]
fn a_peer_that_speaks_tls_is_an_error_with_a_remedy() {
    let tls = |error: Error| {
        assert_eq!((error.kind(), error.remedy()), (ErrorKind::Incompatible, Some(Remedy::SetUpTls)));
        assert!(
            error.chain().ends_with("speaks TLS, and this side is not set up for it"),
            "{}",
            error.chain()
        );
    };
    let (ours, theirs) = unix(1);
    // The beginning of a ClientHello.
    ours[0].send_all(&[0x16, 3, 1, 2, 0]).unwrap();
    tls(Receiving::over(theirs).end().unwrap_err());

    let (ours, theirs) = unix(1);
    // An alert in the clear.
    theirs[0].send_all(&[21, 3, 3, 0, 2]).unwrap();
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    tls(connect(source(&guest), ours).and_then(|precopy| move_over(&guest, precopy, 1)).unwrap_err());
}
