//! Encrypted migrations from and to the real QEMU: a running guest comes in, is stored on disk, and
//! goes out; and an end that may not take part in it is told why.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "test code may panic")]

mod fixture;
mod init;
mod refusals;
mod relay;

use fixture::{Credentials, SOON, Vm, encrypted};
use multifd_tests::{
    CommandReport, Compression, Failure, Multifd, Outcome, Receive, Settings, Side, guest, ram,
    skip_without_qemu,
};
use relay::Relay;

/// How both ends reach each other, and what the parameters of QEMU's credentials are.
#[derive(Clone, Copy, Debug)]
struct Way {
    unix: bool,
    /// GnuTLS's words for it.
    priority: Option<&'static str>,
}

const TCP: Way = Way { unix: false, priority: None };
const UNIX: Way = Way { unix: true, priority: None };
const TCP_1_2: Way = Way { unix: false, priority: Some("NORMAL:-VERS-TLS1.3") };
const TCP_CHACHA: Way = Way { unix: false, priority: Some("NORMAL:-AES-256-GCM:-AES-128-GCM:-AES-128-CCM") };

/// In and out; RAM is equal at each place, and the guest counts on.
fn journey(way: Way, settings: &Settings) -> Outcome {
    let vm = Vm::new()?;
    let credentials = Credentials::new(&vm.scratch)?;
    let settings = &encrypted(settings, way.unix);
    let uri = |name: &str| if way.unix { vm.scratch.unix_uri(name) } else { "tcp:127.0.0.1:0".to_owned() };

    let mut source = vm.source(Some(&credentials.object("client", way.priority)))?;
    let out = vm.scratch.path("checkpoint");
    let mut receive = Receive::listen_with(&uri("in"), &out, &["--tls-dir", credentials.text()])?;
    source.set_up(settings, Side::Source)?;
    source.migrate(receive.uri())?;
    let ended = source.settle(settings, SOON)?;
    if let Err(failure) = ended.check_completed() {
        return Err(receive.process().explain(source.explain(failure)));
    }
    let report = receive.wait_success(SOON)?;
    assert_eq!(report.number("channels")?, u64::from(settings.channels.unwrap_or(0)));
    let checkpoint = multifd_tests::CheckpointFiles::open(&out)?;
    ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;

    let mut destination = vm.destination(&[&credentials.object("server", way.priority)])?;
    destination.set_up(settings, Side::Destination)?;
    let uri = destination.listen(&uri("out"))?;
    let mut flags = vec!["--tls-dir", credentials.text()];
    if way.unix {
        flags.extend(["--tls-hostname", "localhost"]);
    }
    let mut send = Multifd::send_with(checkpoint.directory(), &uri, settings, &flags)?;
    send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    assert_eq!(CommandReport::by(&send)?.text("status")?, "completed");
    ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
    destination.resume()?;
    destination.serial().wait_lines(3, 0, SOON)?;
    let lines = guest::check_sequence(&(source.quit()? + &destination.quit()?))?;
    assert!(lines > 3, "{lines} lines");
    Ok(())
}

fn every_codec(way: Way, channels: Option<u8>) -> Outcome {
    skip_without_qemu!();
    let codecs = [Compression::None, Compression::Zstd(1)];
    for compression in &codecs[..if channels.is_some() { 2 } else { 1 }] {
        for return_path in [false, true] {
            let settings = Settings {
                channels,
                compression: *compression,
                return_path,
                min_rounds: 2,
                ..Settings::default()
            };
            journey(way, &settings).unwrap_or_else(|failure| panic!("{way:?} {settings:?}: {failure}"));
        }
    }
    Ok(())
}

macro_rules! ways {
    ($($name:ident: $way:expr, $channels:expr;)*) => {
        $(#[test] fn $name() -> Outcome { every_codec($way, $channels) })*
    };
}

ways! {
    tcp_single: TCP, None;
    tcp_1_channel: TCP, Some(1);
    tcp_4_channels: TCP, Some(4);
    unix_single: UNIX, None;
    unix_4_channels: UNIX, Some(4);
}

/// The other version, and the other cipher.
#[test]
fn tls_1_2_and_chacha20() -> Outcome {
    skip_without_qemu!();
    for way in [TCP_1_2, TCP_CHACHA] {
        for channels in [None, Some(2)] {
            let settings = Settings { channels, return_path: true, min_rounds: 2, ..Settings::default() };
            journey(way, &settings).unwrap_or_else(|failure| panic!("{way:?} {settings:?}: {failure}"));
        }
    }
    Ok(())
}

/// A recording relay has seen TLS records from the first byte on, and nothing of the guest or of
/// the stream.
#[test]
fn nothing_is_in_the_clear() -> Outcome {
    skip_without_qemu!();
    let vm = Vm::new()?;
    let credentials = Credentials::new(&vm.scratch)?;
    let settings =
        encrypted(&Settings { channels: Some(2), return_path: true, ..Settings::default() }, false);
    let mut source = vm.source(Some(&credentials.object("client", None)))?;
    let out = vm.scratch.path("checkpoint");
    let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &out, &["--tls-dir", credentials.text()])?;
    let incoming = Relay::to(receive.uri())?;
    source.set_up(&settings, Side::Source)?;
    source.migrate(incoming.uri())?;
    source.wait_completed(SOON)?;
    receive.wait_success(SOON)?;
    let mut destination = vm.destination(&[&credentials.object("server", None)])?;
    destination.set_up(&settings, Side::Destination)?;
    let outgoing = Relay::to(&destination.listen("tcp:127.0.0.1:0")?)?;
    let mut send = Multifd::send_with(&out, outgoing.uri(), &settings, &["--tls-dir", credentials.text()])?;
    send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    ram::check_equal(source.ram(), destination.ram())?;
    for seen in [incoming, outgoing].map(|relay| relay.seen()) {
        assert_eq!(seen.len(), 6, "main and two channels, two directions each");
        let total: usize = seen.iter().map(Vec::len).sum();
        assert!(total > 16 << 20, "{total}");
        for direction in seen {
            check_records(&direction)?;
        }
    }
    Ok(())
}

/// From the first byte to the last, records of TLS; none with a word of ours in it.
fn check_records(bytes: &[u8]) -> Outcome {
    for word in [&b"QEVM"[..], b"pc.ram", &[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1], &[0; 64]] {
        if bytes.windows(word.len()).any(|window| window == word) {
            return Err(Failure::new(format!("{word:02x?} is in the clear")));
        }
    }
    let mut rest = bytes;
    while let [kind, 3, _, high, low, tail @ ..] = rest {
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        if !(20..=23).contains(kind) || tail.len() < len {
            return Err(Failure::new(format!("no record: {:02x?}", rest.get(..8))));
        }
        rest = tail.split_at(len).1;
    }
    if rest.is_empty() { Ok(()) } else { Err(Failure::new(format!("{} bytes of no record", rest.len()))) }
}
