//! When zero-copy send pays: packets of 128 pages, copied by the kernel or sent from where they
//! are, over loopback and over a virtual cable between two network namespaces (root only).
//!
//! It says how many of the sends the kernel has copied nevertheless. Where that is all of them, as
//! on every network without a card, only the costs are measured. For a real card, compare `multifd
//! send` with and without `--zero-copy-send`.

use std::io::{Read, copy, sink};
use std::net::{TcpListener, TcpStream};
use std::thread::Builder;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use multifd_benches::content::{PAGE, pages};
use multifd_tests::{Host, Network};
use multifd_transports::Channel;
use rustix::net::{SendFlags, send};

/// Bytes in a full packet.
const PACKET: usize = 128 * PAGE;

/// Pages between two sync points: 64 MiB, more than any cache.
const ROUND: usize = 16 << 10;

/// MSG_ZEROCOPY.
const ZERO_COPY: SendFlags = SendFlags::from_bits_retain(0x0400_0000);

fn loopback() -> (Channel, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let one = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    (Channel::try_from(one).expect("a channel"), listener.accept().expect("the other end").0)
}

/// Each end is made on a thread that is in its namespace.
fn cable(network: &Network) -> (Channel, TcpStream) {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            network.enter(Host::Right).expect("a namespace");
            TcpListener::bind((Host::Right.address(), 0)).expect("a port")
        });
        let listener = there.join().expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        let here = scope.spawn(move || {
            network.enter(Host::Left).expect("a namespace");
            TcpStream::connect((Host::Right.address(), port)).expect("a connection")
        });
        let one = here.join().expect("a connection");
        (Channel::try_from(one).expect("a channel"), listener.accept().expect("the other end").0)
    })
}

fn measure(c: &mut Criterion, name: &str, (channel, mut peer): (Channel, TcpStream)) {
    let reading = Builder::new().spawn(move || copy(&mut peer.by_ref(), &mut sink())).expect("a thread");
    let memory = pages("random", ROUND);
    let mut group = c.benchmark_group(format!("send over {name}"));
    group.throughput(Throughput::Bytes(memory.len() as u64));
    group.sample_size(10).measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(500));
    group.bench_function("copied", |b| {
        b.iter(|| memory.chunks(PACKET).for_each(|packet| channel.send_all(packet).expect("sent")));
    });
    let mut account = channel.zero_copy().expect("zero-copy");
    group.bench_function("zero-copy", |b| {
        b.iter(|| {
            for mut packet in memory.chunks(PACKET) {
                while !packet.is_empty() {
                    let socket = channel.direct().expect("a socket");
                    let sent = send(socket, packet, ZERO_COPY).expect("sent");
                    account.note_send();
                    packet = packet.get(sent..).unwrap_or_default();
                }
                account.reap(&channel).expect("notices");
            }
            account.wait(&channel).expect("all done");
        });
    });
    group.finish();
    println!("{name}: the kernel copied {} of {} zero-copy sends", account.copied(), account.sends());
    drop(channel);
    drop(reading.join());
}

fn zero_copy(c: &mut Criterion) {
    measure(c, "loopback", loopback());
    match Network::missing() {
        Some(why) => println!("no virtual cable: {why}"),
        None => {
            let network = Network::new().expect("namespaces");
            measure(c, "a virtual cable", cable(&network));
        }
    }
}

criterion_group!(benches, zero_copy);
criterion_main!(benches);
