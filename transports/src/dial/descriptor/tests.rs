use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::net::UnixListener;
use std::thread;

use rustix::fs::{CWD, Mode, mknodat};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::pipe;
use tempfile::TempDir;

use super::*;
use crate::testing::{LONG, spawn};
use crate::{Arrival, DialOptions, Listener, TransportError};

/// What a descriptor looks like that came from the parent process: nothing owns it, and it would
/// outlive an exec.
fn inherited(descriptor: impl Into<OwnedFd>) -> Endpoint {
    let descriptor = descriptor.into();
    fcntl_setfd(&descriptor, FdFlags::empty()).unwrap();
    Endpoint::Fd(descriptor.into_raw_fd())
}

fn dial(endpoint: &Endpoint) -> Result<Channel, TransportError> {
    crate::dial(endpoint, &DialOptions { deadline: LONG, ..DialOptions::default() })
}

/// Serves what is at `endpoint` until the first arrival of which something is known.
fn first_arrival(endpoint: &Endpoint) -> Arrival {
    let listener = Listener::bind(endpoint).unwrap();
    spawn("first-arrival", move || {
        let (stopper, mut last) = (listener.stopper(), None);
        let mut on_arrival = |arrival| {
            if !matches!(arrival, Arrival::Opened { .. }) {
                stopper.stop();
                last = Some(arrival);
            }
        };
        listener.serve(4, LONG, &mut on_arrival).unwrap();
        last.unwrap()
    })
    .join()
}

fn hand_over(socket: &UnixStream, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(socket, &[io::IoSlice::new(b"!")], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn a_connected_socket_is_a_channel_of_its_own() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let channel = dial(&inherited(ours)).unwrap();
    assert!(channel.is_two_way() && channel.direct().is_some());
    assert!(channel.peer().starts_with("fd:") && channel.peer().contains("unix:"), "{}", channel.peer());
    channel.send_all(b"there").unwrap();
    (&theirs).write_all(b"back").unwrap();
    let mut back = [0; 4];
    channel.recv_exact(&mut back).unwrap();
    assert_eq!(&back, b"back");
    // Nothing else has it: the other side sees its end.
    drop(channel);
    let theirs = Channel::try_from(theirs).unwrap();
    theirs.recv_exact(&mut [0; 5]).unwrap();
    assert_eq!(theirs.recv(&mut [0]).unwrap(), 0);
}

#[test]
fn a_tcp_connection_is_tuned_like_our_own() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let channel = dial(&inherited(stream)).unwrap();
    let socket = Socket::from(channel.direct().unwrap().try_clone_to_owned().unwrap());
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert!(
        channel.peer().ends_with(&format!("tcp:{}", listener.local_addr().unwrap())),
        "{}",
        channel.peer()
    );
}

#[test]
fn a_pipe_leads_from_source_to_destination() {
    let (reading, writing) = pipe().unwrap();
    let source = dial(&inherited(writing)).unwrap();
    source.send_all(b"QEVMrest").unwrap();
    source.finish_sending().unwrap();
    let Arrival::Identified { number: 1, channel, first } = first_arrival(&inherited(reading)) else {
        panic!()
    };
    assert_eq!(&first, b"QEVM");
    let mut all = [0; 8];
    channel.recv_exact(&mut all).unwrap();
    assert_eq!((&all, channel.recv(&mut [0]).unwrap()), (b"QEVMrest", 0));
    assert_eq!(channel.bytes_received(), 8);
}

#[test]
fn first_bytes_may_come_one_by_one_and_the_end_before_them() {
    let (reading, writing) = pipe().unwrap();
    let mut writing = File::from(writing);
    let arriving = spawn("byte-by-byte", || first_arrival(&inherited(reading)));
    for byte in b"QEVM" {
        writing.write_all(&[*byte]).unwrap();
        thread::yield_now();
    }
    assert!(matches!(arriving.join(), Arrival::Identified { first: [b'Q', b'E', b'V', b'M'], .. }));

    for (sent, expected) in [(b"".as_slice(), 0), (b"QEV", 3)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(sent).unwrap();
        drop(theirs);
        let arrival = first_arrival(&inherited(ours));
        assert!(matches!(arrival, Arrival::Closed { received, .. } if received == expected), "{arrival:?}");
    }
}

#[test]
fn a_command_that_fails_at_once_is_an_arrival_that_failed() {
    let Arrival::Failed { error, .. } = first_arrival(&Endpoint::Exec("exit 6".to_owned())) else { panic!() };
    assert!(error.to_string().contains("exit status: 6"), "{error}");
}

#[test]
fn more_first_bytes_than_there_can_be_are_refused() {
    let listener = Listener::bind(&Endpoint::Exec("cat".to_owned())).unwrap();
    let error = spawn("five-bytes", move || listener.serve(5, LONG, &mut |_| ()).unwrap_err()).join();
    assert!(format!("{error:?}").contains("5 first bytes, limit is 4"), "{error:?}");
}

#[test]
fn a_silent_one_is_dropped_and_a_stop_comes_through() {
    let listener = Listener::bind(&Endpoint::Exec("exec sleep 1000".to_owned())).unwrap();
    let stopper = listener.stopper();
    let serving = spawn("silent-command", move || {
        let mut seen = Vec::new();
        let mut on_arrival = |arrival| {
            seen.push(matches!(arrival, Arrival::TimedOut { .. }));
            if seen.len() == 2 {
                stopper.stop();
            }
        };
        listener.serve(4, Duration::from_millis(20), &mut on_arrival).unwrap();
        seen
    });
    assert_eq!(serving.join(), [false, true]);

    let listener = Listener::bind(&Endpoint::Exec("exec sleep 1000".to_owned())).unwrap();
    let stopper = listener.stopper();
    let serving = spawn("stop-command", move || listener.serve(4, LONG, &mut |_| ()).unwrap());
    serving.until_asleep();
    stopper.stop();
    serving.join();
}

#[test]
fn a_listening_socket_is_listened_on() {
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listening.local_addr().unwrap();
    let arriving = spawn("inherited-door", || first_arrival(&inherited(listening)));
    TcpStream::connect(address).unwrap().write_all(b"QEVM").unwrap();
    assert!(matches!(arriving.join(), Arrival::Identified { number: 1, .. }));
}

#[test]
fn a_file_is_written_and_read_from_where_its_opener_left_off() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"a header, ").unwrap();
    let channel = dial(&inherited(file)).unwrap();
    assert!(!channel.is_two_way() && channel.peer().ends_with(", file"), "{}", channel.peer());
    channel.send_all(b"QEVM and more").unwrap();
    channel.finish_sending().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"a header, QEVM and more");

    let mut file = File::open(&path).unwrap();
    file.read_exact(&mut [0; 10]).unwrap();
    let Arrival::Identified { channel, first, .. } = first_arrival(&inherited(file)) else { panic!() };
    assert_eq!(&first, b"QEVM");
    let mut all = [0; 13];
    channel.recv_exact(&mut all).unwrap();
    assert_eq!(&all, b"QEVM and more");
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = TempDir::new().unwrap();
    let (reading, writing) = pipe().unwrap();
    let unconnected = Socket::new(socket2::Domain::UNIX, Type::STREAM, None).unwrap();
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let both = File::options().read(true).write(true).open(&fifo).unwrap();
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let unowned = File::open("/dev/null").unwrap();
    let file = dir.path().join("file");
    File::create(&file).unwrap();
    for (endpoint, said) in [
        (inherited(reading), "the reading end of a pipe, a source needs the writing end"),
        (inherited(File::open(&file).unwrap()), "open for reading only"),
        (inherited(File::open("/dev/null").unwrap()), "CharacterDevice, expected a stream socket"),
        (inherited(UdpSocket::bind("127.0.0.1:0").unwrap()), "expected a stream socket"),
        (inherited(unconnected), "neither connected nor listening"),
        (inherited(both), "a FIFO open for reading and writing"),
        (inherited(listening), "a listening socket"),
        (Endpoint::Fd(unowned.as_raw_fd()), "was not inherited"),
        (Endpoint::Fd(987_654), "no such descriptor is open"),
        (Endpoint::Fd(1), "standard output"),
    ] {
        let TransportError::Io { source, .. } = dial(&endpoint).unwrap_err() else { panic!("{endpoint}") };
        assert!(source.to_string().contains(said), "{endpoint}: {source}");
    }
    let refused = Listener::bind(&inherited(writing)).unwrap_err();
    assert!(format!("{refused:?}").contains("the writing end of a pipe"), "{refused:?}");
}

#[test]
fn a_descriptor_is_taken_once() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let endpoint = inherited(ours);
    let _channel = dial(&endpoint).unwrap();
    let TransportError::Io { source, .. } = dial(&endpoint).unwrap_err() else { panic!() };
    assert!(source.to_string().contains("in use already"), "{source}");
}

#[test]
fn a_descriptor_is_handed_over_on_a_socket() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("giver");
    let giver = UnixListener::bind(&path).unwrap();
    let (first, first_peer) = UnixStream::pair().unwrap();
    let (second, second_peer) = UnixStream::pair().unwrap();
    let giving = spawn("giver", move || {
        for descriptor in [&first, &second] {
            hand_over(&giver.accept().unwrap().0, &[descriptor.as_fd()]);
        }
    });
    let endpoint = Endpoint::FdFrom(path);
    dial(&endpoint).unwrap().send_all(b"x").unwrap();
    (&second_peer).write_all(b"QEVM").unwrap();
    assert!(matches!(first_arrival(&endpoint), Arrival::Identified { .. }));
    giving.join();
    Channel::try_from(first_peer).unwrap().recv_exact(&mut [0]).unwrap();
}

#[test]
fn exactly_one_descriptor_is_taken_from_a_message() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for (count, said) in [(0, "0 descriptors were handed over"), (2, "2 descriptors were handed over")] {
        hand_over(&theirs, &vec![theirs.as_fd(); count]);
        let error = receive_descriptor(&ours).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    drop(theirs);
    assert_eq!(receive_descriptor(&ours).unwrap_err().kind(), ErrorKind::UnexpectedEof);
}
