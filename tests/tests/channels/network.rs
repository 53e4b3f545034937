//! Between two hosts: a peer that vanishes, addresses to choose from, and a cable of a given rate.

use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::{
    Destination, DeviceState, Error, ErrorKind, ProgressReader, Report, Source, SourceBuilder,
};
use multifd_tests::peer::{Memory, devices};
use multifd_tests::{Failure, Host, Network, Outcome, skip};
use multifd_transports::{Endpoint, Keepalive, SocketOptions};
use multifd_wire::Configuration;

use crate::SOON;
use crate::wire::says;

const SECOND: Duration = Duration::from_secs(1);

/// A peer that has vanished is found within 3 s, the timeout is a minute.
fn attentive() -> SocketOptions {
    let keepalive = Some(Keepalive { time: SECOND, interval: SECOND, retries: 2 });
    SocketOptions { keepalive, user_timeout: Some(2 * SECOND), ..SocketOptions::default() }
}

fn memory(pages: usize) -> Memory {
    let mut memory = Memory::zero(&[("pc.ram", pages)]);
    memory.refill(&memory.all(), 5);
    memory
}

fn source(pages: usize) -> Outcome<SourceBuilder> {
    let machine = "pc-q35-10.0".to_owned();
    let configuration = Configuration::new(machine);
    Ok(Source::builder(memory(pages).provide_content()?, configuration).paused_guest().timeout(SOON))
}

fn state() -> Outcome<DeviceState> {
    Ok(DeviceState::from_tail([devices::padding(100), devices::tail()].concat())?)
}

/// What both ends are told and tell.
struct Meeting {
    endpoint: (Sender<Endpoint>, Receiver<Endpoint>),
    progress: (Sender<ProgressReader>, Receiver<ProgressReader>),
}

/// A destination at the right end.
fn receive(network: &Network, endpoint: &Sender<Endpoint>, pages: usize) -> Outcome<Result<Report, Error>> {
    network.enter(Host::Right)?;
    let ram = memory(pages).provide(0)?;
    let builder = Destination::builder(ram.clone()).timeout(SOON).socket_options(attentive());
    let destination = builder.listen(&"tcp:0.0.0.0:0".parse()?)?;
    endpoint.send(destination.endpoint())?;
    Ok(destination.receive().and_then(|arrived| {
        memory(pages).check(&ram).expect("equal RAM");
        arrived.accept()
    }))
}

fn at(address: &str, endpoint: &Endpoint) -> Endpoint {
    let Endpoint::Tcp { port, .. } = endpoint else { panic!("{endpoint}") };
    Endpoint::Tcp { host: address.to_owned(), port: *port }
}

/// Runs both ends, and cuts the cable when `when` says so of the source's progress; gives both
/// errors.
fn vanish(channels: usize, rounds: bool, when: impl Fn(&ProgressReader) -> bool) -> Outcome<[Error; 2]> {
    let (network, meeting) = (Network::new()?, Meeting { endpoint: channel(), progress: channel() });
    let (cut, is_cut) = channel::<Instant>();
    let (network, (told, there), (watched, watching)) = (&network, meeting.endpoint, meeting.progress);
    thread::scope(|scope| {
        let destination = scope.spawn(move || receive(network, &told, 2000));
        let source = scope.spawn(move || {
            network.enter(Host::Left)?;
            let there = at(Host::Right.address(), &there.recv()?);
            let rate = std::num::NonZeroU64::new(2 << 20);
            let source =
                source(2000)?.channels(channels).max_bandwidth(rate).socket_options(attentive()).build()?;
            let progress = source.progress();
            let mut precopy = source.connect(&there)?;
            watched.send(progress)?;
            if !rounds {
                // Until the cable is cut and the destination has found out, nothing is sent.
                let _ = is_cut.recv_timeout(SOON)?;
            }
            let error = precopy.round().map(drop).err();
            error.ok_or_else(|| Failure::new("the round came through"))
        });
        let progress = watching.recv()?;
        let begun = Instant::now();
        while !when(&progress) {
            assert!(begun.elapsed() < SOON, "{:?}", progress.now());
            thread::yield_now();
        }
        network.cut()?;
        let begun = Instant::now();
        let theirs = destination.join().map_err(|_| Failure::new("the destination panicked"))??;
        let _ = cut.send(begun);
        let ours = source.join().map_err(|_| Failure::new("the source panicked"))??;
        // By the user timeout and not by ours, which the words show, too.
        assert!(begun.elapsed() < SOON, "{:?} to find out", begun.elapsed());
        Ok([ours, theirs.err().ok_or_else(|| Failure::new("the guest arrived"))?])
    })
}

#[test]
fn a_peer_that_vanishes_while_pages_move_is_found() -> Outcome {
    if let Some(why) = Network::missing() {
        skip!("{why}");
    }
    for channels in [0, 2] {
        let moving = |progress: &ProgressReader| progress.now().wire_bytes > 1_000_000;
        let [source, destination] = vanish(channels, true, moving)?;
        for (error, peer) in [(source, "(tcp:10.77.0.2:"), (destination, "(tcp:10.77.0.1:")] {
            assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
            says(&error, &["active, ", peer, "the peer has vanished"]);
        }
    }
    Ok(())
}

#[test]
fn a_peer_that_vanishes_in_a_silence_is_found() -> Outcome {
    if let Some(why) = Network::missing() {
        skip!("{why}");
    }
    let [source, destination] = vanish(0, false, |_| true)?;
    for (error, peer) in [(source, "(tcp:10.77.0.2:"), (destination, "(tcp:10.77.0.1:")] {
        assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
        says(&error, &["active, ", peer, "the peer has vanished"]);
    }
    Ok(())
}

#[test]
fn channels_take_the_addresses_in_turn_from_the_one_that_is_bound() -> Outcome {
    if let Some(why) = Network::missing() {
        skip!("{why}");
    }
    let network = Network::new()?;
    network.add_address(Host::Right, "10.77.0.12")?;
    network.add_address(Host::Right, "10.77.0.22")?;
    network.add_address(Host::Left, "10.77.0.11")?;
    let (told, there) = channel();
    let network = &network;
    thread::scope(|scope| {
        let destination = scope.spawn(move || receive(network, &told, 200));
        let source = scope.spawn(move || {
            network.enter(Host::Left)?;
            let there = there.recv()?;
            let options = SocketOptions { bind: Some("10.77.0.11".parse()?), ..attentive() };
            let others = ["10.77.0.12", "10.77.0.22"].map(|address| at(address, &there)).to_vec();
            let source =
                source(200)?.channels(3).socket_options(options).channel_endpoints(others).build()?;
            let mut precopy = source.connect(&at(Host::Right.address(), &there))?;
            let connections = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
            precopy.round()?;
            precopy.stop_copy()?.commit(&state()?)?;
            Ok::<_, Failure>(connections)
        });
        let connections = source.join().map_err(|_| Failure::new("the source panicked"))??;
        destination.join().map_err(|_| Failure::new("the destination panicked"))???;
        // Local address 10.77.0.11, remote 10.77.0.x, in the byte order of this machine,
        // established.
        let of = |last: u8| {
            let hex = |last: u8| format!("{:08X}", u32::from_ne_bytes([10, 77, 0, last]));
            let established = connections.lines().filter(|line| line.contains(" 01 "));
            established.filter(|line| line.contains(&hex(11)) && line.contains(&hex(last))).count()
        };
        assert_eq!([of(2), of(12), of(22)], [1, 2, 1], "{connections}");
        Ok(())
    })
}

#[test]
fn a_cable_takes_what_it_was_given_last_in_both_directions() -> Outcome {
    if let Some(why) = Network::missing() {
        skip!("{why}");
    }
    let network = Network::new()?;
    if let Err(why) = network.shape(1000) {
        skip!("no shaping: {why}");
    }
    network.shape(100)?;
    for host in [Host::Left, Host::Right] {
        let [program, arguments @ ..] = network.inside(host);
        let output =
            Command::new(program).args(arguments).args(["tc", "qdisc", "show", "dev", "wire"]).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("tbf") && said.contains("rate 100Mbit"), "{host:?}: {said}");
    }
    Ok(())
}
