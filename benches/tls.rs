//! What TLS costs: the provider's cipher alone, the records around it in memory, one channel over
//! loopback; all in turns, so that a busy machine is one for all. A second argument of the form
//! `long` sends 16 GiB through one channel, across new keys.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use multifd_tests::{Authority, Member};
use multifd_transports::{Arrival, Channel, DialOptions, Listener, TlsClient, TlsProvider, TlsServer};
use multifd_transports_tls::measure::{MAX_BATCH_TEXT, Open, Seal};

/// Plaintext of a record, and of one call of a cipher.
const RECORD: usize = 16 << 10;
/// How long each is measured at a time.
const TURN: Duration = Duration::from_millis(150);
const TURNS: usize = 15;

fn main() {
    let dir = tempfile::tempdir().expect("a directory");
    let authority = Authority::new("bench").expect("a CA");
    authority.issue(dir.path(), Some(&Member::server()), Some(&Member::client())).expect("credentials");
    if std::env::args().any(|argument| argument == "long") {
        return long(dir.path());
    }
    println!(
        "{:10} {:>8} {:>14} {:>14} {:>14} {:>8} {:>20}",
        "", "cipher", "seal", "copy+seal", "open", "plain", "TLS"
    );
    for provider in TlsProvider::ALL {
        compare(*provider, dir.path());
    }
    println!(
        "GB/s, AES-256-GCM, medians of {TURNS}; in brackets the share of the cipher, and of plain, on {} cores",
        cores()
    );
}

fn compare(provider: TlsProvider, dir: &Path) {
    let mut cipher = cipher(provider);
    let mut seal = Seal::new(provider);
    // Each opener wants all records of its sealer, in order.
    let (mut encrypted, mut open) = (Seal::new(provider), Open::new(provider));
    let (mut rates, text) = ([(); 6].map(|()| Vec::new()), vec![0x5a; RECORD]);
    let plain = pair(None);
    let tls = pair(Some((dir, provider)));
    for _ in 0..TURNS {
        let [of_cipher, of_seal, of_copy, of_open, of_plain, of_tls] = &mut rates;
        of_cipher.push(rate(RECORD, &mut cipher));
        of_seal.push(rate(MAX_BATCH_TEXT, &mut || {
            black_box(seal.batch(MAX_BATCH_TEXT, &mut |into| {
                black_box(into);
            }));
        }));
        // What a channel does for guest RAM: the only copy there is goes into the record.
        of_copy.push(rate(MAX_BATCH_TEXT, &mut || {
            black_box(seal.batch(MAX_BATCH_TEXT, &mut |into| into.copy_from_slice(&text)));
        }));
        of_open.push(opening(&mut encrypted, &mut open, &text));
        of_plain.push(loopback(&plain));
        of_tls.push(loopback(&tls));
    }
    let [cipher, seal, copy, open, plain, tls] = rates.map(median);
    let share = |rate: f64, of: f64| format!("{rate:.2} ({:.0} %)", 100.0 * rate / of);
    println!(
        "{:10} {cipher:8.2} {:>14} {:>14} {:>14} {plain:8.2} {tls:8.2} ({:.0} %, {:.0} %)",
        format!("{provider:?}"),
        share(seal, cipher),
        share(copy, cipher),
        share(open, cipher),
        100.0 * tls / cipher,
        100.0 * tls / plain,
    );
}

/// Seals a record in place.
fn cipher(provider: TlsProvider) -> Box<dyn FnMut()> {
    macro_rules! sealing {
        ($library:ident) => {{
            use $library::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
            let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).expect("a key"));
            let (mut text, mut number) = (vec![0x5a; RECORD], 0_u64);
            Box::new(move || {
                let mut nonce = [0; 12];
                nonce[4..].copy_from_slice(&number.to_be_bytes());
                number += 1;
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from([0; 5]), black_box(&mut text));
                assert!(black_box(tag).is_ok());
            })
        }};
    }
    match provider {
        TlsProvider::AwsLc => sealing!(aws_lc_rs),
        TlsProvider::Ring => sealing!(ring),
    }
}

/// Bytes of `len` a call, in GB/s.
fn rate(len: usize, call: &mut dyn FnMut()) -> f64 {
    let (begun, mut done) = (Instant::now(), 0_u64);
    while begun.elapsed() < TURN {
        (0..16).for_each(|_| call());
        done += 16 * len as u64;
    }
    giga(done, begun.elapsed())
}

/// Only the opening is timed; what is opened was encrypted just before, and is in the cache as from
/// a socket.
fn opening(seal: &mut Seal, open: &mut Open, text: &[u8]) -> f64 {
    let (mut spent, mut done) = (Duration::ZERO, 0_u64);
    while spent < TURN {
        // As much as one read of a channel takes.
        let len = MAX_BATCH_TEXT - RECORD;
        let encrypted = seal.batch(len, &mut |into| into.copy_from_slice(text)).to_vec();
        let mut begun = Instant::now();
        let opened = open.batch(&mut |room| {
            room[..encrypted.len()].copy_from_slice(&encrypted);
            begun = Instant::now();
            encrypted.len()
        });
        spent += begun.elapsed();
        assert_eq!(opened, len);
        done += len as u64;
    }
    giga(done, spent)
}

/// Two ends of a connection over loopback.
fn pair(tls: Option<(&Path, TlsProvider)>) -> (Channel, Channel) {
    let server = tls.map(|(dir, provider)| TlsServer::with_provider(dir, provider).expect("made for it"));
    let client = tls.map(|(dir, provider)| TlsClient::with_provider(dir, provider).expect("made for it"));
    connect(server, client)
}

fn connect(server: Option<TlsServer>, client: Option<TlsClient>) -> (Channel, Channel) {
    let uri = "tcp:localhost:0".parse().expect("a URI");
    let listener = Listener::bind(&uri).expect("a free port").tls(server);
    let endpoint = listener.endpoint();
    std::thread::scope(|scope| {
        let dialled = scope.spawn(move || {
            let options = DialOptions { tls: client, ..DialOptions::default() };
            let channel = multifd_transports::dial(&endpoint, &options).expect("the listener is bound");
            channel.send_all(b"QEVM").expect("sent");
            channel
        });
        let (stopper, mut accepted) = (listener.stopper(), None);
        let served = listener.serve(4, Duration::from_secs(20), &mut |arrival| {
            if let Arrival::Identified { channel, .. } = arrival {
                channel.recv_exact(&mut [0; 4]).expect("the hello");
                accepted = Some(channel);
                stopper.stop();
            }
        });
        served.expect("served");
        (dialled.join().expect("dialled"), accepted.expect("accepted"))
    })
}

/// One thread sends a buffer again and again, another takes it as a destination takes pages.
fn loopback((one, other): &(Channel, Channel)) -> f64 {
    let (buffer, total) = (vec![0x5a_u8; 512 << 10], 512_u64 << 20);
    std::thread::scope(|scope| {
        let begun = Instant::now();
        scope.spawn(|| send(one, &buffer, total));
        receive(other, total);
        giga(total, begun.elapsed())
    })
}

fn send(channel: &Channel, buffer: &[u8], total: u64) {
    for _ in 0..total / buffer.len() as u64 {
        if channel.direct().is_some() {
            channel.send_all(buffer).expect("sent");
        } else {
            let mut left = buffer;
            let fill = &mut |into: &mut [u8]| {
                let (now, later) = left.split_at(into.len());
                into.copy_from_slice(now);
                left = later;
            };
            channel.send_filled(buffer.len(), fill).expect("sent");
        }
    }
}

fn receive(channel: &Channel, total: u64) {
    let mut page = vec![0; 512 << 10];
    let len = page.len();
    for _ in 0..total / len as u64 {
        if channel.direct().is_some() {
            channel.recv_exact(&mut page).expect("received");
        } else {
            let mut at = 0;
            let take = &mut |from: &[u8]| {
                page[at..at + from.len()].copy_from_slice(from);
                at += from.len();
            };
            channel.recv_each(len, take).expect("received");
        }
    }
}

/// 16 GiB with a new key at least after every 5 GiB.
fn long(dir: &Path) {
    let (total, refresh) = (16_u64 << 30, (5_u64 << 30).try_into().expect("more than none"));
    let server = TlsServer::from_directory(dir).expect("made for it").refresh_keys_after(refresh);
    let client = TlsClient::from_directory(dir).expect("made for it").refresh_keys_after(refresh);
    let (one, other) = connect(Some(server), Some(client));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| send(&one, &vec![0x5a; 512 << 10], total));
        receive(&other, total);
    });
    println!(
        "{} bytes, {} keys, {:.2} GB/s",
        other.bytes_received(),
        1 + one.keys_refreshed(),
        giga(total, begun.elapsed())
    );
    assert!(one.keys_refreshed() >= 2);
}

fn giga(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}
