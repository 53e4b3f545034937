use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rustix::pipe::pipe;

use super::*;
use crate::testing::{LONG, spawn};
use crate::{Channel, DialOptions, Endpoint};

/// The sending end first.
fn pair() -> (Channel, Channel) {
    let (reading, writing) = pipe().unwrap();
    (writing.try_into().unwrap(), reading.try_into().unwrap())
}

fn through(command: &str) -> Channel {
    crate::dial(&Endpoint::Exec(command.to_owned()), &DialOptions::default()).unwrap()
}

fn read_line(channel: &Channel) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        channel.recv_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap().trim().to_owned()
}

#[test]
fn any_number_of_slices_of_any_size_arrives_in_order() {
    let (one, other) = pair();
    let bytes: Vec<u8> = (0..200_000_u32).map(|i| i.to_le_bytes()[usize::from(i % 3 == 0)]).collect();
    let sizes: Vec<usize> = (0..3000).map(|i| i * 7919 % 60_000 * usize::from(i % 4 != 0)).collect();
    let expected: Vec<u8> = sizes.iter().flat_map(|size| bytes[..*size].to_vec()).collect();
    let total = expected.len();
    let receiver = spawn("pipe-slices", move || {
        let mut received = vec![0; total];
        other.recv_exact(&mut received).unwrap();
        received
    });
    let mut slices: Vec<_> = sizes.iter().map(|size| IoSlice::new(&bytes[..*size])).collect();
    one.send_vectored(&mut slices).unwrap();
    assert!(receiver.join() == expected);
    assert_eq!(one.bytes_sent(), total as u64);
}

#[test]
fn a_pipe_leads_one_way() {
    let (one, other) = pair();
    assert!(!one.is_two_way() && one.direct().is_none());
    assert_eq!(one.recv(&mut [0]).unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(other.send_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn the_end_is_seen_when_sending_is_finished_or_the_channel_dropped() {
    for finish in [true, false] {
        let (one, other) = pair();
        one.send_all(b"last").unwrap();
        if finish {
            one.finish_sending().unwrap();
            assert_eq!(one.send_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        } else {
            drop(one);
        }
        let mut buf = [0; 8];
        assert_eq!(other.recv(&mut buf).unwrap(), 4);
        assert_eq!(other.recv(&mut buf).unwrap(), 0);
    }
}

#[test]
fn close_wakes_whoever_waits_and_the_other_end_sees_it() {
    let (one, other) = pair();
    let (one, closer) = (Arc::new(one), other.closer());
    let blocked = spawn("pipe-recv", move || other.recv(&mut [0; 8]).unwrap_err().kind());
    blocked.until_asleep();
    closer.close();
    assert_eq!(blocked.join(), ErrorKind::ConnectionAborted);
    assert_eq!(one.send_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);

    let (one, other) = pair();
    let closer = one.closer();
    let blocked = spawn("pipe-send", move || one.send_all(&vec![0; 64 << 20]).unwrap_err().kind());
    blocked.until_asleep();
    closer.close();
    assert_eq!(blocked.join(), ErrorKind::ConnectionAborted);
    // What fitted in comes out, then the end.
    while other.recv(&mut [0; 65536]).unwrap() > 0 {}
}

#[test]
fn the_timeout_ends_both_directions() {
    let (one, other) = pair();
    for channel in [&one, &other] {
        channel.set_timeout(Some(Duration::from_millis(20))).unwrap();
    }
    let error = other.recv(&mut [0; 8]).unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("the timeout"), "{error}");
    assert_eq!(one.send_all(&vec![0; 64 << 20]).unwrap_err().kind(), ErrorKind::TimedOut);
}

#[test]
fn others_who_inherited_the_pipe_keep_it_as_it_was() {
    let (reading, writing) = pipe().unwrap();
    let shared = writing.try_clone().unwrap();
    let _one = Channel::try_from(writing).unwrap();
    let _other = Channel::try_from(reading).unwrap();
    assert!(!fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK));
}

#[test]
fn a_command_answers_and_ends_well() {
    let channel = through("cat");
    assert!(channel.is_two_way());
    assert_eq!(channel.peer(), "exec:cat");
    let sent = vec![7; 100_000];
    channel.send_all(&sent).unwrap();
    let mut received = vec![0; sent.len()];
    channel.recv_exact(&mut received).unwrap();
    assert!(received == sent);
    channel.finish_sending().unwrap();
    assert_eq!(channel.recv(&mut [0]).unwrap(), 0);
    channel.settle(LONG).unwrap();
}

#[test]
fn a_bad_end_of_a_command_is_named_wherever_it_shows() {
    let at_end = through("printf abc; exit 3");
    let mut buf = [0; 3];
    at_end.recv_exact(&mut buf).unwrap();
    let error = at_end.recv(&mut buf).unwrap_err().to_string();
    assert_eq!(error, "the command \"printf abc; exit 3\" ended with exit status: 3");

    let killed = through("kill -9 $$");
    assert!(killed.recv(&mut buf).unwrap_err().to_string().contains("signal: 9"));

    let unread = through("exit 4");
    let error = unread.send_all(&vec![0; 64 << 20]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert!(error.to_string().contains("exit status: 4, and not everything was read"), "{error}");

    let late = through("cat > /dev/null; exit 5");
    late.send_all(&vec![0; 1 << 20]).unwrap();
    late.finish_sending().unwrap();
    assert!(late.settle(LONG).unwrap_err().to_string().contains("exit status: 5"));
}

#[test]
fn a_command_that_runs_on_is_not_waited_for_for_ever() {
    let channel = through("exec sleep 1000");
    channel.finish_sending().unwrap();
    let error = channel.settle(Duration::from_millis(20)).unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("sleep 1000"), "{error}");
}

#[test]
fn closing_kills_the_whole_group_and_leaves_no_zombie() {
    // A child in the background keeps both pipes.
    let channel = through("sleep 1000 & echo $!; echo $$; wait");
    let children = [read_line(&channel), read_line(&channel)].map(|pid| format!("/proc/{pid}"));
    assert!(children.iter().all(|child| Path::new(child).exists()));
    let closer = channel.closer();
    let blocked = spawn("exec-recv", move || {
        let kind = channel.recv(&mut [0; 8]).unwrap_err().kind();
        (kind, channel.settle(LONG).unwrap_err().kind())
    });
    blocked.until_asleep();
    closer.close();
    assert_eq!(blocked.join(), (ErrorKind::ConnectionAborted, ErrorKind::ConnectionAborted));
    assert!(!Path::new(&children[1]).exists(), "the shell was not reaped");
    // The one in the background is init's to reap, and may still be about to take its signal.
    let begun = Instant::now();
    let gone = |stat: &str| stat.is_empty() || stat.contains(") Z ");
    while !gone(&std::fs::read_to_string(format!("{}/stat", children[0])).unwrap_or_default()) {
        assert!(begun.elapsed() < LONG, "{} lives on", children[0]);
        std::thread::yield_now();
    }
}

#[test]
fn a_grandchild_that_holds_the_pipe_does_not_hold_up_the_end() {
    let channel = through("cat > /dev/null; sleep 1000 & exit 0");
    channel.send_all(b"all").unwrap();
    channel.finish_sending().unwrap();
    channel.settle(LONG).unwrap();

    let silent = through("sleep 1000 & exit 0");
    silent.set_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(silent.recv(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
}
