//! A guest that is written while it moves, from our source to our destination: nothing may be lost.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

mod audit;
mod credentials;
mod faults;
mod file;
mod freed;
mod guest;
mod mixed;
mod own;
mod proof;
mod relay;
mod resume;
mod state;
mod tls;
mod told;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use guest::{Guest, Load};
use multifd_codecs::{Codec, Uncompressed, Zlib, Zstd};
use multifd_engine::{
    Arrived, Canceller, Destination, DeviceState, Error, ErrorKind, HostMemory, Limits, MigrationState,
    OnStall, PAGE, Precopy, RamBlock, Report, SoftwareLog, Source, SourceBuilder, ZeroCopySend,
};
use multifd_transports::{Endpoint, TlsServer};
use multifd_wire::Configuration;
use vm_memory::MmapRegion;

const SOON: Duration = Duration::from_secs(20);
const PAGES: usize = 4096;
const LOAD: Load = Load { threads: 2, hot_pages: 1000, bytes: 64 };

/// A destination on a thread of its own, with memory that held something.
struct There {
    uri: Endpoint,
    canceller: Canceller,
    block: RamBlock,
    thread: JoinHandle<Result<Report, Error>>,
}

impl There {
    fn listen() -> Self {
        Self::listen_with(Arrived::accept)
    }

    /// `end` decides about the guest that has arrived.
    fn listen_with(end: impl FnOnce(Arrived) -> Result<Report, Error> + Send + 'static) -> Self {
        Self::listen_as(None, end)
    }

    fn listen_as(
        tls: Option<TlsServer>,
        end: impl FnOnce(Arrived) -> Result<Report, Error> + Send + 'static,
    ) -> Self {
        let memory = HostMemory::anonymous(PAGES * PAGE).unwrap();
        let block = RamBlock::new("guest.ram".try_into().unwrap(), memory);
        let garbage = Guest::new("garbage", PAGES);
        copy(&garbage.block, &block);
        let mut builder = Destination::builder(vec![block.clone()]).timeout(SOON);
        if let Some(tls) = tls {
            builder = builder.tls(tls);
        }
        let destination = builder.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let (uri, canceller) = (destination.endpoint(), destination.canceller());
        let thread = std::thread::Builder::new().spawn(move || end(destination.receive()?)).unwrap();
        Self { uri, canceller, block, thread }
    }

    fn end(self) -> (RamBlock, Result<Report, Error>) {
        (self.block, self.thread.join().unwrap())
    }
}

fn copy(from: &RamBlock, to: &RamBlock) {
    let (from, to) =
        (from.memory().slice(0, PAGES * PAGE).unwrap(), to.memory().slice(0, PAGES * PAGE).unwrap());
    from.copy_to_volatile_slice(to);
}

fn assert_equal(left: &RamBlock, right: &RamBlock) {
    let (mut a, mut b) = ([0; PAGE], [1; PAGE]);
    for page in 0..PAGES {
        assert!(left.read_page(page, &mut a) && right.read_page(page, &mut b));
        assert!(a == b, "page {page} differs");
    }
}

fn source(guest: &Guest) -> SourceBuilder {
    let configuration = Configuration::new("test-10.0");
    Source::builder(vec![guest.block.clone()], configuration).dirty_log(guest.log()).timeout(SOON)
}

fn no_devices() -> DeviceState {
    let json = br#"{"page_size": 4096, "devices": []}"#;
    let mut tail = vec![0x00, 0x06];
    tail.extend_from_slice(&(json.len() as u32).to_be_bytes());
    tail.extend_from_slice(json);
    DeviceState::from_tail(tail).unwrap()
}

/// At least `rounds`, and on until it has converged; then the guest stands still and goes over.
fn move_over(guest: &Guest, mut precopy: Precopy, rounds: usize) -> Result<Report, Error> {
    while precopy.decisions().len() < rounds || !precopy.converged() {
        guest.wait_for_writes();
        precopy.round()?;
    }
    guest.pause();
    precopy.stop_copy()?.commit(&no_devices())
}

/// After a migration that failed: the guest still writes, and goes over whole.
fn a_second_attempt_succeeds(guest: &Guest) {
    guest.wait_for_writes();
    let there = There::listen();
    let precopy = source(guest).channels(2).build().unwrap().connect(&there.uri).unwrap();
    move_over(guest, precopy, 3).unwrap();
    let (block, result) = there.end();
    result.unwrap();
    assert_equal(&guest.block, &block);
}

fn moves(builder: impl FnOnce(SourceBuilder) -> SourceBuilder, rounds: usize) -> Report {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let precopy = builder(source(&guest)).build().unwrap().connect(&there.uri).unwrap();
    let report = move_over(&guest, precopy, rounds).unwrap();
    let (block, result) = there.end();
    result.unwrap();
    assert_equal(&guest.block, &block);
    assert!(report.ledger.total() == report.downtime && report.decisions.len() >= rounds);
    report
}

fn codecs() -> [Arc<dyn Codec>; 3] {
    [Arc::new(Uncompressed), Arc::new(Zlib::default()), Arc::new(Zstd::default())]
}

#[test]
fn single_channel() {
    let report = moves(|source| source, 4);
    assert_eq!(report.progress.channels, 0);
}

#[test]
fn parallel_channels_with_every_codec() {
    for codec in codecs() {
        moves(|source| source.channels(4).codec(codec), 5);
    }
}

#[test]
fn each_channel_has_counted_at_one_end_what_it_has_at_the_other() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let precopy = source(&guest).channels(3).build().unwrap().connect(&there.uri).unwrap();
    let sent = move_over(&guest, precopy, 2).unwrap().progress;
    let received = there.end().1.unwrap().progress;
    assert_eq!((sent.channels, sent.per_channel.len()), (3, 4));
    for channel in &sent.per_channel {
        let other = received.per_channel.iter().find(|other| other.name == channel.name).unwrap();
        assert_eq!(
            (channel.bytes_sent, channel.packets),
            (other.bytes_received, other.packets),
            "{channel:?}"
        );
        assert_eq!(
            (channel.pages_normal, channel.pages_zero),
            (other.pages_normal, other.pages_zero),
            "{channel:?}"
        );
    }
    let bytes = sent.per_channel.iter().map(|channel| channel.bytes_sent + channel.bytes_received);
    assert_eq!(bytes.sum::<u64>(), sent.wire_bytes);
    assert!(sent.packets > 0 && sent.pages_normal > PAGES as u64 / 2, "{sent:?}");
}

#[test]
fn differences_on_the_main_channel() {
    let report = moves(|source| source.xbzrle(64 << 20), 6);
    let stats = report.xbzrle.unwrap();
    assert!(report.progress.pages_xbzrle > 0 && stats.deltas == report.progress.pages_xbzrle, "{stats:?}");
}

#[test]
fn differences_on_parallel_channels_save_ten_times_the_bytes() {
    for codec in codecs() {
        let late = |report: &Report| {
            let rounds = report.decisions.iter().filter(|round| round.round >= 4);
            let (wire, dirty) =
                rounds.fold((0, 0), |sum, round| (sum.0 + round.wire_bytes, sum.1 + round.dirty_bytes));
            wire as f64 / dirty as f64
        };
        let with = moves(|source| source.channels(2).codec(codec.clone()).xbzrle(64 << 20), 8);
        assert!(with.progress.pages_xbzrle > 0);
        // Without differences, every dirty byte is on the wire (codec none).
        assert!(late(&with) < 0.1, "{} of the dirty bytes on the wire", late(&with));
    }
}

#[test]
fn a_cancel_leaves_the_guest_running_and_a_second_attempt_succeeds() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let mut precopy = source(&guest).channels(2).build().unwrap().connect(&there.uri).unwrap();
    precopy.round().unwrap();
    let control = precopy.control();
    control.cancel();
    let error = precopy.round().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(error.source_may_resume());
    assert_eq!(control.state(), MigrationState::Cancelled);
    assert!(there.end().1.is_err());

    a_second_attempt_succeeds(&guest);
}

#[test]
fn pause_before_switchover_waits_for_the_word() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let precopy = source(&guest).pause_before_switchover(true).build().unwrap().connect(&there.uri).unwrap();
    let control = precopy.control();
    let waiting = std::thread::Builder::new()
        .spawn(move || {
            while control.state() != MigrationState::PreSwitchover {
                std::thread::yield_now();
            }
            control.proceed();
        })
        .unwrap();
    move_over(&guest, precopy, 2).unwrap();
    waiting.join().unwrap();
    let (block, result) = there.end();
    result.unwrap();
    assert_equal(&guest.block, &block);
}

#[test]
fn a_guest_that_never_converges_follows_the_policy() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let limits =
        Limits { downtime_limit: Duration::from_nanos(1), on_stall: OnStall::Abort, ..Limits::default() };
    let mut precopy = source(&guest).limits(limits).build().unwrap().connect(&there.uri).unwrap();
    let error = loop {
        guest.wait_for_writes();
        if let Err(error) = precopy.round() {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotConverging);
    assert!(error.source_may_resume());
    let last = precopy.decisions().last().unwrap();
    assert!(last.reason.contains("rounds without progress"), "{}", last.reason);
    assert!(there.end().1.is_err());
}

#[test]
fn pages_that_the_kernel_sends_from_where_they_are() {
    for wanted in [ZeroCopySend::WhileItPays, ZeroCopySend::Always] {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let there = There::listen();
        let source = source(&guest).channels(2).zero_copy_send(wanted).build().unwrap();
        let report = move_over(&guest, source.connect(&there.uri).unwrap(), 4).unwrap();
        let (block, result) = there.end();
        result.unwrap();
        assert_equal(&guest.block, &block);
        let stats = report.zero_copy.unwrap();
        assert!(stats.sends > 0 && stats.copied <= stats.sends, "{stats:?}");
    }
}

#[test]
fn memory_in_no_dirty_log_is_refused_unless_nothing_writes_there() {
    let block =
        |name: &str| RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(8 * PAGE).unwrap());
    let ram = [block("ram"), block("rom")];
    let there = Destination::builder(ram.to_vec()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let source = || {
        let machine = "test-10.0".to_owned();
        let configuration = Configuration::new(machine);
        Source::builder(ram.to_vec(), configuration).return_path(false).timeout(SOON)
    };
    let connect = |builder: SourceBuilder| builder.build()?.connect(&there.endpoint()).map(drop);
    let refused = |builder: SourceBuilder, name: &str| {
        let error = connect(builder).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        let text = format!("RAM block {name}: 8 of 8 pages are in no dirty log");
        assert!(error.to_string().contains(&text), "{error}");
    };
    let one = || SoftwareLog::new(&ram[..1]);
    refused(source(), "ram");
    refused(source().dirty_log(one()), "rom");
    refused(source().read_only_block("rom".try_into().unwrap()), "ram");
    connect(source().dirty_log(one()).dirty_log(SoftwareLog::new(&ram[1..]))).unwrap();
    connect(source().dirty_log(one()).read_only_block("rom".try_into().unwrap())).unwrap();
    connect(source().paused_guest()).unwrap();
    let error = source().read_only_block("bios".try_into().unwrap()).build().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
}

#[test]
fn a_block_or_name_that_no_destination_takes_is_refused_at_build() {
    let block = |name: &str, bytes: usize| {
        let region = MmapRegion::<()>::new(bytes).unwrap();
        RamBlock::new(name.try_into().unwrap(), HostMemory::from_region(Arc::new(region)).unwrap())
    };
    let refused = |blocks: &[RamBlock], machine: &str| {
        let builder = Source::builder(blocks.to_vec(), Configuration::new(machine)).paused_guest();
        let error = builder.build().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        error.to_string()
    };
    let ram = block("ram", 16 * PAGE);
    let partial = refused(&[ram.clone(), block("blob", 16 * PAGE + 100)], "my-vmm");
    assert!(
        partial.contains("RAM block blob has 65636 bytes") && partial.contains("the last 100"),
        "{partial}"
    );
    let small = refused(&[block("small", 100), ram.clone()], "my-vmm");
    assert!(small.contains("RAM block small has 100 bytes, expected at least one page"), "{small}");
    let twice = refused(&[ram.clone(), block("ram", PAGE)], "my-vmm");
    assert!(twice.contains("two RAM blocks are called ram"), "{twice}");
    let long = refused(std::slice::from_ref(&ram), &"m".repeat(256));
    assert!(long.contains("the machine's name has 256 bytes, expected 1..=255"), "{long}");
    refused(std::slice::from_ref(&ram), "");
}

#[test]
fn device_state_with_a_name_that_does_not_fit_is_refused_and_the_guest_stays() {
    for name in ["", &"n".repeat(256), &"n".repeat(300)] {
        let guest = Guest::new("guest.ram", PAGES);
        let there = There::listen();
        let precopy = source(&guest).build().unwrap().connect(&there.uri).unwrap();
        let error = precopy.stop_copy().unwrap().commit(&DeviceState::opaque(name, 1, b"state")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        assert!(error.source_may_resume());
        let text = format!("the device state's name has {} bytes, expected 1..=255", name.len());
        assert!(error.to_string().contains(&text), "{error}");
        there.end().1.unwrap_err();
    }
}

/// 300 MiB, of zeros, text and what looks like the end of a stream.
#[test]
fn device_state_of_any_size_arrives() {
    let piece = b"\0\0\0\x06\0\0\0\x10{\"devices\": []}\x7e\0\0\0\x02\0text";
    let mut state = vec![0; 100 << 20];
    while state.len() < 300 << 20 {
        state.extend_from_slice(&piece.repeat(1000));
        state.resize(state.len() + (1 << 20), b'x');
    }
    let guest = Guest::new("guest.ram", PAGES);
    let expected = state.clone();
    let there = There::listen_with(move |arrived| {
        let (version, bytes) = arrived.opaque_state("my-vmm").expect("the state");
        assert!(version == 3 && bytes == expected, "{} bytes", bytes.len());
        arrived.accept()
    });
    let mut precopy = source(&guest).build().unwrap().connect(&there.uri).unwrap();
    precopy.round().unwrap();
    precopy.stop_copy().unwrap().commit(&DeviceState::opaque("my-vmm", 3, &state)).unwrap();
    there.end().1.unwrap();
}

#[test]
fn more_device_state_than_a_destination_wants_is_refused() {
    let guest = Guest::new("guest.ram", PAGES);
    let memory = HostMemory::anonymous(PAGES * PAGE).unwrap();
    let destination = Destination::builder(vec![RamBlock::new("guest.ram".try_into().unwrap(), memory)])
        .max_device_state(1 << 20)
        .listen(&"tcp:127.0.0.1:0".parse().unwrap())
        .unwrap();
    let to = destination.endpoint();
    let receiving = std::thread::Builder::new().spawn(move || destination.receive().map(drop)).unwrap();
    let precopy = source(&guest).build().unwrap().connect(&to).unwrap();
    let state = DeviceState::opaque("my-vmm", 3, &vec![1; 2 << 20]);
    let error = precopy.stop_copy().unwrap().commit(&state).unwrap_err();
    assert!(error.source_may_resume(), "{}", error.chain());
    let error = receiving.join().unwrap().unwrap_err();
    assert!(error.chain().contains("expected at most 1048576"), "{}", error.chain());
}

#[test]
fn zero_copy_is_refused_where_there_can_be_none() {
    let guest = Guest::new("guest.ram", PAGES);
    let wanted = |builder: SourceBuilder| builder.zero_copy_send(ZeroCopySend::WhileItPays);
    let no_channels = wanted(source(&guest)).build().err().unwrap();
    let compressed = wanted(source(&guest)).channels(2).codec(Arc::new(Zlib::level(1).unwrap())).build();
    for error in [no_channels, compressed.err().unwrap()] {
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        assert!(error.to_string().starts_with("setup: zero-copy send "), "{error}");
    }
    let unix = wanted(source(&guest)).channels(2).build().unwrap().connect(&"unix:/nowhere".parse().unwrap());
    let error = unix.err().unwrap();
    assert!(error.to_string().contains("zero-copy send over unix:/nowhere, expected plain TCP"), "{error}");
}
