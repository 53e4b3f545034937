use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use socket2::{Domain, SockAddr, Type};
use tempfile::TempDir;

use super::*;
use crate::testing::{LONG, spawn};
use crate::{Arrival, Listener};

fn patient() -> DialOptions {
    DialOptions { deadline: LONG, ..DialOptions::default() }
}

fn tcp(port: u16) -> Endpoint {
    Endpoint::Tcp { host: "127.0.0.1".to_owned(), port }
}

/// A port on which nothing listens.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn dial_with(endpoint: &Endpoint, options: DialOptions) -> Result<Channel, TransportError> {
    let endpoint = endpoint.clone();
    spawn("dial-with", move || dial(&endpoint, &options)).join()
}

#[test]
fn both_families_connect() {
    let dir = TempDir::new().unwrap();
    for endpoint in [tcp(0), Endpoint::Unix(dir.path().join("x.sock"))] {
        let listener = Listener::bind(&endpoint).unwrap();
        let channel = dial_with(&listener.endpoint(), patient()).unwrap();
        assert_eq!(channel.peer(), listener.endpoint().to_string());
        let socket = Socket::from(channel.direct().unwrap().try_clone_to_owned().unwrap());
        assert!(!socket.nonblocking().unwrap());
        assert!(matches!(endpoint, Endpoint::Unix(_)) || socket.tcp_nodelay().unwrap());
    }
}

#[test]
fn names_v6_and_the_empty_host_connect() {
    for (listen, hosts) in [
        ("127.0.0.1", ["localhost", ""].as_slice()),
        ("::1", ["::1"].as_slice()),
        ("", ["localhost", "127.0.0.1", "::1", "0"].as_slice()),
    ] {
        let listener = Listener::bind(&Endpoint::Tcp { host: listen.to_owned(), port: 0 }).unwrap();
        let Endpoint::Tcp { port, .. } = listener.endpoint() else { panic!("{:?}", listener.endpoint()) };
        for host in hosts {
            let endpoint = Endpoint::Tcp { host: (*host).to_owned(), port };
            dial_with(&endpoint, patient()).unwrap_or_else(|error| panic!("{error}: {:?}", error));
        }
    }
}

#[test]
fn dialling_goes_on_until_the_listener_appears() {
    let dir = TempDir::new().unwrap();
    for endpoint in [tcp(free_port()), Endpoint::Unix(dir.path().join("late.sock"))] {
        let there = endpoint.clone();
        let dialling = spawn("until-appears", move || dial(&there, &patient()));
        dialling.until_asleep();
        let _listener = Listener::bind(&endpoint).unwrap();
        dialling.join().unwrap();
    }
}

#[test]
fn a_full_queue_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("full.sock");
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    listener.listen(0).unwrap();
    let listener = UnixListener::from(listener);
    let first = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let dialling = spawn("full-queue", move || dial(&Endpoint::Unix(path), &patient()));
    dialling.until_asleep();
    drop((first, listener.accept().unwrap()));
    let _channel = dialling.join().unwrap();
    listener.accept().unwrap();
}

#[test]
fn the_deadline_ends_dialling_and_says_what_was_tried() {
    let options = DialOptions { deadline: Duration::from_millis(50), ..DialOptions::default() };
    let endpoint = tcp(free_port());
    let error = dial_with(&endpoint, options).unwrap_err();
    let TransportError::DeadlinePassed { attempts, elapsed, limit, source, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(*attempts >= 2 && elapsed >= limit, "{error:?}");
    assert_eq!(source.kind(), ErrorKind::ConnectionRefused);
    let text = error.to_string();
    assert!(text.starts_with(&format!("connect to {endpoint}: gave up after ")), "{text}");
    assert!(text.ends_with(" attempts, limit is 50.0ms"), "{text}");
}

#[test]
fn a_stop_ends_dialling_now_and_for_good() {
    let (endpoint, options) = (tcp(free_port()), patient());
    let stopper = options.stopper.clone();
    let (there, clone) = (endpoint.clone(), options.clone());
    let dialling = spawn("stop-dialling", move || dial(&there, &clone));
    dialling.until_asleep();
    stopper.stop();
    let error = dialling.join().unwrap_err();
    assert!(error.is_cancelled() && error.endpoint() == &endpoint, "{error:?}");

    let listener = Listener::bind(&tcp(0)).unwrap();
    assert!(dial_with(&listener.endpoint(), options).unwrap_err().is_cancelled());
}

#[test]
fn what_cannot_pass_is_not_tried_again() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let long = dir.path().join("x".repeat(108));
    for (endpoint, text) in [
        (tcp(0), "port 0 is for listening"),
        (Endpoint::Unix(long), "limit is 107"),
        (Endpoint::Unix(file.join("below")), "Not a directory"),
    ] {
        let error = dial_with(&endpoint, patient()).unwrap_err();
        let TransportError::Io { source, .. } = &error else { panic!("{error:?}") };
        assert!(source.to_string().contains(text), "{source}");
    }
}

#[test]
fn a_silent_address_leaves_time_for_the_others() {
    let (endpoint, options) = (tcp(1), SocketOptions::default());
    let hook = ThreadHook::default();
    let dialling = |limit| Dialling {
        endpoint: &endpoint,
        options: &options,
        tls: None,
        hook: &hook,
        limit,
        begun: Instant::now(),
        attempts: 0,
        last: None,
    };
    let short = dialling(Duration::from_secs(4));
    assert!(
        short.attempt_timeout(4) <= Duration::from_secs(1)
            && short.attempt_timeout(4) > Duration::from_millis(500)
    );
    assert!(short.attempt_timeout(1) > Duration::from_secs(3));
    assert_eq!(dialling(Duration::from_secs(60)).attempt_timeout(2), Duration::from_secs(5));
    assert!(dialling(Duration::MAX).attempt_timeout(1) > Duration::from_secs(60));
}

#[test]
fn a_connection_to_itself_is_told_from_others() {
    let own = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    own.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    own.connect(&own.local_addr().unwrap()).unwrap();
    assert!(socket::is_connected_to_itself(&own).unwrap());

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let other: Socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap().into();
    assert!(!socket::is_connected_to_itself(&other).unwrap());
    let (pair, _) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    assert!(!socket::is_connected_to_itself(&pair).unwrap());
}

#[test]
fn dialling_needs_no_deadline() {
    let listener = Listener::bind(&tcp(0)).unwrap();
    let options = DialOptions { deadline: Duration::MAX, ..DialOptions::default() };
    dial(&listener.endpoint(), &options).unwrap();
}

/// The first that is identified.
fn accepted(listener: Listener) -> Channel {
    let (stopper, mut accepted) = (listener.stopper(), None);
    let mut on_arrival = |arrival| {
        if let Arrival::Identified { channel, .. } = arrival {
            accepted = Some(channel);
            stopper.stop();
        }
    };
    listener.serve(0, LONG, &mut on_arrival).unwrap();
    accepted.unwrap()
}

#[test]
fn a_source_comes_from_the_address_that_it_is_bound_to() {
    let listener = Listener::bind(&tcp(0)).unwrap();
    let bound = |address: &str| {
        let socket = SocketOptions { bind: Some(address.parse().unwrap()), ..SocketOptions::default() };
        DialOptions { socket, ..patient() }
    };
    let endpoint = listener.endpoint();
    let _channel = dial_with(&endpoint, bound("127.0.0.2")).unwrap();
    let peer = spawn("accept-bound", || accepted(listener)).join().peer().to_owned();
    assert!(peer.starts_with("tcp:127.0.0.2:"), "{peer}");

    for (address, said) in
        [("203.0.113.9", "cannot connect from 203.0.113.9"), ("::1", "of the other family")]
    {
        let TransportError::Io { source, .. } = dial_with(&endpoint, bound(address)).unwrap_err() else {
            panic!()
        };
        assert!(source.to_string().contains(said), "{source}");
    }
}

#[test]
fn accepted_sockets_are_tuned_like_dialled_ones() {
    let options = SocketOptions {
        no_delay: false,
        user_timeout: Some(Duration::from_secs(7)),
        receive_buffer: Some(64 << 10),
        ..SocketOptions::default()
    };
    let listener = Listener::bind_with(&tcp(0), &options).unwrap();
    let dialled = dial_with(&listener.endpoint(), DialOptions { socket: options, ..patient() }).unwrap();
    for channel in [dialled, spawn("accept-tuned", || accepted(listener)).join()] {
        let socket = Socket::from(channel.direct().unwrap().try_clone_to_owned().unwrap());
        assert!(!socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(7)));
        assert_eq!(socket.recv_buffer_size().unwrap(), 128 << 10);
    }
}

#[test]
fn multipath_tcp_and_plain_tcp_understand_each_other() {
    for (listens, dials) in [(true, true), (true, false), (false, true)] {
        let options = |mptcp| SocketOptions { mptcp, ..SocketOptions::default() };
        let listener = Listener::bind_with(&tcp(0), &options(listens)).unwrap();
        let socket = options(dials);
        let one = dial_with(&listener.endpoint(), DialOptions { socket, ..patient() }).unwrap();
        let other = spawn("accept-mptcp", || accepted(listener)).join();
        one.send_all(b"there").unwrap();
        other.send_all(b"back").unwrap();
        other.recv_exact(&mut [0; 5]).unwrap();
        one.recv_exact(&mut [0; 4]).unwrap();
        drop(one);
        assert_eq!(other.recv(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn machines_are_dialled_by_number_and_say_who_does_not_answer() {
    let vsock = |cid, port| Endpoint::Vsock { cid, port };
    let listener = match Listener::bind(&vsock(crate::VSOCK_ANY, 0)) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("skipped: no vsock: {error:?}"),
    };
    let Endpoint::Vsock { port, .. } = listener.endpoint() else { panic!("{:?}", listener.endpoint()) };
    assert_ne!(port, 0);
    for endpoint in [vsock(crate::VSOCK_ANY, 7), vsock(1, 0)] {
        let TransportError::Io { source, .. } = dial_with(&endpoint, patient()).unwrap_err() else {
            panic!()
        };
        assert!(source.to_string().contains("are for listening"), "{source}");
    }
    // Where machines reach themselves, it succeeds; else nothing answers.
    let options = DialOptions { deadline: Duration::from_millis(300), ..DialOptions::default() };
    match dial_with(&vsock(1, port), options) {
        Ok(channel) => assert_eq!(channel.peer(), format!("vsock:1:{port}")),
        Err(error) => assert!(error.to_string().contains(&format!("connect to vsock:1:{port}")), "{error}"),
    }
}
