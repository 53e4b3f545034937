use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};

use socket2::SockRef;
use tempfile::TempDir;

use super::*;
use crate::testing::{LONG, Spawned, spawn};
use crate::{Channel, DialOptions};

/// A listener with a thread that serves it.
struct Serving {
    listener: Arc<Listener>,
    arrivals: mpsc::Receiver<Arrival>,
    thread: Spawned<Result<(), TransportError>>,
}

impl Serving {
    fn new(uri: &str, first_bytes: usize, silence: Duration) -> Self {
        Self::over(Listener::bind(&uri.parse().unwrap()).unwrap(), first_bytes, silence)
    }

    fn over(listener: Listener, first_bytes: usize, silence: Duration) -> Self {
        let listener = Arc::new(listener);
        let (sender, arrivals) = mpsc::channel();
        let served = Arc::clone(&listener);
        let thread = spawn("serving", move || {
            served.serve(first_bytes, silence, &mut |arrival| sender.send(arrival).unwrap())
        });
        Self { listener, arrivals, thread }
    }

    fn dial(&self) -> Channel {
        let options = DialOptions { deadline: LONG, ..DialOptions::default() };
        crate::dial(&self.listener.endpoint(), &options).unwrap()
    }

    fn next(&self) -> Arrival {
        self.arrivals.recv_timeout(LONG).unwrap()
    }

    /// The next one, which must be of a client that connected; gives its number and name.
    fn opened(&self) -> (u64, String) {
        match self.next() {
            Arrival::Opened { number, peer } => (number, peer),
            other => panic!("{other:?}"),
        }
    }

    fn identified(&self) -> (u64, Channel, [u8; 4]) {
        match self.next() {
            Arrival::Identified { number, channel, first } => (number, channel, first),
            other => panic!("{other:?}"),
        }
    }

    fn stop(self) {
        self.listener.stopper().stop();
        self.thread.join().unwrap();
    }
}

fn unix_uri(dir: &TempDir) -> String {
    format!("unix:{}", dir.path().join("x.sock").display())
}

fn bind_error(endpoint: &Endpoint) -> io::Error {
    match Listener::bind(endpoint).unwrap_err() {
        TransportError::Io { action: "listen on", source, .. } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn port_0_is_resolved_and_a_taken_port_is_refused() {
    for uri in ["tcp:127.0.0.1:0", "tcp:localhost:0", "tcp:[::1]:0", "tcp::0", "tcp:0:0", "tcp:[::]:0"] {
        let listener = Listener::bind(&uri.parse().unwrap()).unwrap();
        let bound = listener.endpoint().to_string();
        let port = bound.rsplit_once(':').unwrap().1;
        assert_ne!(port, "0");
        assert_eq!(bound, format!("{}:{port}", uri.rsplit_once(':').unwrap().0));
        assert_eq!(bind_error(&listener.endpoint()).kind(), ErrorKind::AddrInUse);
    }
}

#[test]
fn any_address_takes_v4_and_v6_clients() {
    for (uri, hosts) in [
        ("tcp::0", ["127.0.0.1", "[::1]"].as_slice()),
        ("tcp:[::]:0", ["127.0.0.1", "[::1]"].as_slice()),
        ("tcp:0.0.0.0:0", ["127.0.0.1"].as_slice()),
        ("tcp:0:0", ["127.0.0.1"].as_slice()),
    ] {
        let serving = Serving::new(uri, 4, LONG);
        let uri = serving.listener.endpoint().to_string();
        let mut clients = Vec::new();
        for host in hosts {
            let client = TcpStream::connect(format!("{host}:{}", uri.rsplit_once(':').unwrap().1)).unwrap();
            assert_eq!(serving.opened().1, format!("tcp:{}", client.local_addr().unwrap()));
            clients.push(client);
        }
        serving.stop();
    }
}

#[test]
fn a_stale_socket_file_is_replaced_and_ours_is_removed() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_live_socket_is_not_replaced_and_hears_nothing_of_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.sock");
    let live = UnixListener::bind(&path).unwrap();
    let error = bind_error(&Endpoint::Unix(path.clone()));
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    live.set_nonblocking(true).unwrap();
    assert_eq!(live.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(path.exists());
}

#[test]
fn what_is_no_socket_is_never_replaced() {
    let dir = TempDir::new().unwrap();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    std::fs::write(&file, "mine").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [file.clone(), link.clone(), dir.path().to_owned()] {
        assert!(bind_error(&Endpoint::Unix(path)).to_string().contains("not by a socket"));
    }
    assert_eq!(std::fs::read_to_string(link).unwrap(), "mine");
}

#[test]
fn a_file_that_took_the_place_of_ours_stays() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.sock");
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
    // Renamed and not removed, so that its inode number is not given to the next file.
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn a_path_that_is_too_long_is_told_with_the_limit() {
    let dir = TempDir::new().unwrap();
    let room = 107 - dir.path().as_os_str().len() - 1;
    Listener::bind(&Endpoint::Unix(dir.path().join("x".repeat(room)))).unwrap();
    let error = bind_error(&Endpoint::Unix(dir.path().join("x".repeat(room + 1))));
    assert_eq!(error.to_string(), "socket path of 108 bytes, limit is 107");
}

#[test]
fn clients_are_identified_in_the_order_in_which_they_speak() {
    let dir = TempDir::new().unwrap();
    for uri in ["tcp:127.0.0.1:0".to_owned(), unix_uri(&dir)] {
        let serving = Serving::new(&uri, 4, LONG);
        let clients: Vec<_> = (0..3).map(|_| serving.dial()).collect();
        let numbers: Vec<_> = (0..3).map(|_| serving.opened().0).collect();
        assert_eq!(numbers, [1, 2, 3]);
        for index in [2, 0, 1] {
            // In two parts, and with more behind: only four bytes are taken.
            clients[index].send_all(b"Q").unwrap();
            clients[index].send_all(b"EVM and the rest").unwrap();
            let (number, channel, first) = serving.identified();
            assert_eq!((number, &first), (numbers[index], b"QEVM"));
            assert!(channel.direct().is_none());
            let mut bytes = [0; 16];
            channel.recv_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"QEVM and the res");
            channel.send_all(b"!").unwrap();
            clients[index].recv_exact(&mut bytes[..1]).unwrap();
        }
        serving.stop();
    }
}

#[test]
fn silent_and_leaving_clients_are_told_and_delay_no_other() {
    let serving = Serving::new("tcp:127.0.0.1:0", 4, Duration::from_millis(300));
    let begun = Instant::now();
    let _silent = serving.dial();
    let (silent, silent_peer) = serving.opened();
    let leaving = serving.dial();
    let (left, _) = serving.opened();
    leaving.send_all(b"QEV").unwrap();
    drop(leaving);
    assert!(matches!(serving.next(), Arrival::Closed { number, received: 3, .. } if number == left));

    let reset = serving.dial();
    let (failed, _) = serving.opened();
    SockRef::from(&reset.direct().unwrap()).set_linger(Some(Duration::ZERO)).unwrap();
    drop(reset);
    assert!(matches!(serving.next(), Arrival::Failed { number, .. } if number == failed));

    let speaking = serving.dial();
    serving.opened();
    speaking.send_all(b"QEVM").unwrap();
    serving.identified();
    let Arrival::TimedOut { number, peer, waited } = serving.next() else { panic!("not silent") };
    assert_eq!((number, peer), (silent, silent_peer));
    assert!(waited >= Duration::from_millis(300) && waited <= begun.elapsed(), "{waited:?}");
    serving.stop();
}

#[test]
fn a_crowd_of_silent_clients_leaves_room_for_one_that_speaks() {
    let dir = TempDir::new().unwrap();
    let serving = Serving::new(&unix_uri(&dir), 4, LONG);
    let mut crowd = Vec::new();
    for number in 1..=300 {
        crowd.push(UnixStream::connect(dir.path().join("x.sock")).unwrap());
        if number > 256 {
            let Arrival::TimedOut { number: evicted, .. } = serving.next() else { panic!("not silent") };
            assert_eq!(evicted, number - 256);
        }
        assert_eq!(serving.opened().0, number);
    }
    crowd[299].write_all(b"QEVM").unwrap();
    assert_eq!(serving.identified().0, 300);
    serving.stop();
}

#[test]
fn a_stop_in_the_callback_ends_serving_for_good() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Endpoint::Tcp { port, .. } = listener.endpoint() else { panic!("{:?}", listener.endpoint()) };
    let _clients = [(); 3].map(|()| TcpStream::connect(("127.0.0.1", port)).unwrap());
    spawn("stop-callback", move || {
        let stopper = listener.stopper();
        let mut arrivals = 0;
        listener
            .serve(4, LONG, &mut |_| {
                arrivals += 1;
                stopper.stop();
            })
            .unwrap();
        assert_eq!(arrivals, 1);
        assert!(stopper.is_stopped());
        listener.serve(4, LONG, &mut |arrival| panic!("{arrival:?}")).unwrap();
    })
    .join();
}

#[test]
fn no_first_bytes_identify_at_once_and_five_are_refused() {
    let serving = Serving::new("tcp:127.0.0.1:0", 0, LONG);
    let _client = serving.dial();
    serving.opened();
    let (_, channel, first) = serving.identified();
    assert!(first == [0; 4] && channel.direct().is_some());
    serving.stop();

    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let error = listener.serve(5, LONG, &mut |_| {}).unwrap_err();
    assert!(matches!(error, TransportError::Io { action: "accept on", .. }), "{error:?}");
}

#[test]
fn whoever_is_in_the_queue_is_announced_before_another_is_identified() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&unix_uri(&dir).parse().unwrap()).unwrap();
    let mut first = UnixStream::connect(dir.path().join("x.sock")).unwrap();
    let others: Vec<_> = (0..40).map(|_| UnixStream::connect(dir.path().join("x.sock")).unwrap()).collect();
    first.write_all(b"main").unwrap();
    let (stopper, mut opened) = (listener.stopper(), 0);
    let served = listener.serve(4, LONG, &mut |arrival| match arrival {
        Arrival::Opened { .. } => opened += 1,
        _ => stopper.stop(),
    });
    served.unwrap();
    assert_eq!(opened, 1 + others.len());
}

#[test]
fn a_closed_listener_refuses_clients_and_hears_out_those_inside() {
    let serving = Serving::new("tcp:127.0.0.1:0", 4, LONG);
    let Endpoint::Tcp { port, .. } = serving.listener.endpoint() else { panic!("not TCP") };
    let inside = serving.dial();
    serving.opened();
    serving.listener.close();
    assert!(serving.listener.wait_closed(LONG));
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "it still listens");
    inside.send_all(b"QEVM").unwrap();
    serving.identified();
    // Nothing can come any more.
    serving.thread.join().unwrap();
    serving.listener.serve(4, LONG, &mut |arrival| panic!("{arrival:?}")).unwrap();
}

#[test]
fn a_whole_opening_message_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let opening = |first| if first == *b"long" { 8 } else { 0 };
    let listener = Listener::bind(&unix_uri(&dir).parse().unwrap()).unwrap().opening_len(opening);
    let serving = Serving::over(listener, 4, LONG);
    let (long, short) = (serving.dial(), serving.dial());
    serving.opened();
    serving.opened();
    long.send_all(b"longest").unwrap();
    short.send_all(b"shor").unwrap();
    assert_eq!(serving.identified().2, *b"shor");
    long.send_all(b"!?").unwrap();
    let (_, channel, first) = serving.identified();
    assert_eq!(first, *b"long");
    let mut all = [0; 9];
    channel.recv_exact(&mut all).unwrap();
    assert_eq!(all, *b"longest!?");
    let cut = serving.dial();
    serving.opened();
    cut.send_all(b"longer").unwrap();
    drop(cut);
    assert!(matches!(serving.next(), Arrival::Closed { received: 6, .. }));
    serving.stop();
}

#[test]
fn connections_that_are_there_already_are_heard_side_by_side() {
    let pairs = (0..3).map(|_| UnixStream::pair().unwrap());
    let (mut clients, ends): (Vec<_>, Vec<_>) = pairs.unzip();
    let ends = ends.into_iter().map(|end| end.try_into().unwrap()).collect();
    let listener = Listener::of_connections(ends, Endpoint::Fd(7)).opening_len(|_| 6);
    assert!(listener.takes_several() && !listener.takes_strangers());
    let serving = Serving::over(listener, 4, LONG);
    for number in 1..=3 {
        assert_eq!(serving.opened().0, number);
    }
    // The first has not said all of its opening message, which holds up no other.
    clients[0].write_all(b"abcd").unwrap();
    clients[2].write_all(b"ABCDEF").unwrap();
    let (number, channel, first) = serving.identified();
    assert_eq!((number, first), (3, *b"ABCD"));
    let mut opening = [0; 6];
    channel.recv_exact(&mut opening).unwrap();
    assert_eq!(&opening, b"ABCDEF");
    drop(clients.remove(1));
    assert!(matches!(serving.next(), Arrival::Closed { number: 2, received: 0, .. }));
    serving.stop();
}
