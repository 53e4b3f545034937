//! What an embedder is told, at both ends, and when.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use multifd_engine::wire::BlockEntry;
use multifd_engine::{
    Arrived, Configuration, Control, Destination, Endpoint, Error, ErrorKind, HostMemory, IncomingRam,
    Limits, MigrationState, PAGE, Phase, Precopy, RamBlock, Report, Source, SourceBuilder,
};

use crate::guest::Guest;
use crate::{LOAD, PAGES, SOON, There, no_devices, source};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Blocks of 16 pages each that hold something.
fn blocks(names: &[&str]) -> Vec<RamBlock> {
    let block = |name: &&str| {
        let block = RamBlock::new((*name).try_into().unwrap(), HostMemory::anonymous(16 * PAGE).unwrap());
        block.memory().slice(0, 16 * PAGE).unwrap().copy_from(&[7_u8; 16 * PAGE]);
        block
    };
    names.iter().map(block).collect()
}

fn still(names: &[&str]) -> SourceBuilder {
    Source::builder(blocks(names), Configuration::new("my-vmm-1.0")).paused_guest().timeout(SOON)
}

fn send(builder: SourceBuilder, to: &Endpoint) -> Result<Report, Error> {
    let mut precopy = builder.build().unwrap().connect(to)?;
    precopy.round()?;
    precopy.stop_copy()?.commit(&no_devices())
}

/// How a destination ended; `None`: the test let the guest go.
type Received = Result<Report, Option<Error>>;

fn accept(arrived: Arrived) -> Received {
    arrived.accept().map_err(Some)
}

/// A destination with memory from `ram`; `end` decides about the guest.
fn receive(
    ram: impl IncomingRam + 'static,
    timeout: Duration,
    end: impl FnOnce(Arrived) -> Received + Send + 'static,
) -> (Endpoint, JoinHandle<Received>) {
    let destination = Destination::builder(ram).timeout(timeout);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = destination.endpoint();
    let thread =
        std::thread::Builder::new().spawn(move || end(destination.receive().map_err(Some)?)).unwrap();
    (endpoint, thread)
}

/// Nothing happens on this thread for that long.
fn idle(time: Duration) {
    let (_sender, never) = mpsc::channel::<()>();
    let _ = never.recv_timeout(time);
}

/// Memory that a VMM has no room for.
struct Full;

impl IncomingRam for Full {
    fn open(&mut self, _: &Configuration, _: &[BlockEntry]) -> Result<Vec<RamBlock>, BoxError> {
        Err("3 of 4 hugepages \u{1b}[31m are taken".into())
    }
}

/// A source with and without channels reads this of a destination with such memory.
fn fails<R: IncomingRam + 'static>(ram: impl Fn() -> R, phase: Phase, says: &str) {
    for channels in [0, 2] {
        let (to, there) = receive(ram(), SOON, accept);
        let error = send(still(&["ram"]).channels(channels), &to).unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::PeerAborted(1), phase), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(error.source_may_resume() && there.join().unwrap().is_err());
    }
}

#[test]
fn the_source_reads_why_and_where_the_destination_failed() {
    fails(|| blocks(&["rom"]), Phase::Setup, "the destination failed: main (tcp:127.0.0.1:");
    fails(|| blocks(&["rom"]), Phase::Setup, "RAM block ram is unknown here");
    // What a terminal takes for a command is none.
    fails(|| Full, Phase::Setup, "no memory for the source's RAM blocks: 3 of 4 hugepages  [31m are taken");
}

#[test]
fn the_source_reads_why_its_guest_was_refused_after_the_hand_over() {
    type End = fn(Arrived) -> Received;
    let ends: [(End, &str); 2] = [
        (
            |arrived| {
                arrived.refuse("the device state is of my-vmm 3.0");
                Err(None)
            },
            "the destination failed: the device state is of my-vmm 3.0",
        ),
        (
            |arrived| {
                drop(arrived);
                Err(None)
            },
            "the destination failed: the guest was dropped without having been taken over",
        ),
    ];
    for (end, says) in ends {
        let (to, there) = receive(blocks(&["ram"]), SOON, end);
        let error = send(still(&["ram"]), &to).unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::PeerAborted(1), Phase::Device), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(error.source_may_resume() && there.join().unwrap().is_err());
    }
}

#[test]
fn the_source_reads_that_the_destination_was_cancelled() {
    let there = There::listen();
    let guest = Guest::new("guest.ram", PAGES);
    let mut precopy = source(&guest).build().unwrap().connect(&there.uri).unwrap();
    precopy.round().unwrap();
    there.canceller.cancel();
    let error = loop {
        if let Err(error) = precopy.round() {
            break error;
        }
    };
    assert!(error.to_string().contains("the destination failed: cancelled by the caller"), "{error}");
    assert!(there.end().1.is_err());
}

/// Timeout of both ends where one of them is held for longer.
const SHORT: Duration = Duration::from_secs(3);
const HELD: Duration = Duration::from_secs(8);

/// A guest that is held somewhere for longer than both timeouts moves all the same.
fn held(
    builder: impl FnOnce(SourceBuilder) -> SourceBuilder,
    between_rounds: Duration,
    with_state: Duration,
    loading: Duration,
    watch: impl FnOnce(Control) + Send + 'static,
) -> Report {
    let (to, there) = receive(blocks(&["ram"]), SHORT, move |arrived| {
        idle(loading);
        accept(arrived)
    });
    let source = builder(still(&["ram"]).timeout(SHORT)).build().unwrap();
    let control = source.control();
    let watching = std::thread::Builder::new().spawn(move || watch(control)).unwrap();
    let mut precopy = source.connect(&to).unwrap();
    precopy.round().unwrap();
    idle(between_rounds);
    precopy.round().unwrap();
    let stopped = precopy.stop_copy().unwrap();
    idle(with_state);
    let report = stopped.commit(&no_devices()).unwrap();
    watching.join().unwrap();
    there.join().unwrap().unwrap();
    report
}

const NO: Duration = Duration::ZERO;

#[test]
fn a_guest_may_be_held_between_rounds_for_longer_than_any_timeout() {
    held(|source| source.channels(2), HELD, NO, NO, |_| {});
}

#[test]
fn a_guest_may_be_held_between_rounds_without_a_return_path() {
    held(|source| source.return_path(false), HELD, NO, NO, |_| {});
}

#[test]
fn a_hold_that_is_shorter_than_the_timeout_is_refused() {
    let builder = Destination::builder(blocks(&["ram"])).timeout(SHORT).hold_timeout(SHORT / 2);
    let error = builder.listen(&"tcp:127.0.0.1:0".parse().unwrap()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
    assert!(error.to_string().contains("hold timeout 1.5s, expected at least the timeout, 3s"), "{error}");
}

#[test]
fn device_state_may_take_longer_to_save_than_any_timeout() {
    held(|source| source, NO, HELD, NO, |_| {});
}

#[test]
fn device_state_may_take_longer_to_load_than_any_timeout() {
    let report = held(|source| source, NO, NO, HELD, |_| {});
    assert!(report.ledger.load_us >= 8_000_000, "{}", report.ledger);
}

#[test]
fn a_pause_before_the_switchover_may_be_longer_than_any_timeout() {
    let report = held(
        |source| source.pause_before_switchover(true),
        NO,
        NO,
        NO,
        |control| {
            while control.state() != MigrationState::PreSwitchover {
                std::thread::yield_now();
            }
            idle(HELD);
            control.proceed();
        },
    );
    assert!(report.ledger.hold_us >= 8_000_000 && report.downtime >= HELD, "{}", report.ledger);
}

#[test]
fn the_downtime_counts_from_the_pause_and_every_part_of_it_is_in_the_ledger() {
    const PART: Duration = Duration::from_millis(60);
    let (to, there) = receive(blocks(&["ram"]), SOON, |arrived| {
        idle(PART);
        accept(arrived)
    });
    let mut precopy = still(&["ram"]).build().unwrap().connect(&to).unwrap();
    precopy.round().unwrap();
    precopy.guest_paused_at(Instant::now());
    idle(PART);
    let stopped = precopy.stop_copy().unwrap();
    idle(PART);
    let report = stopped.commit(&no_devices()).unwrap();
    let ledger = report.ledger;
    for part in [ledger.pause_us, ledger.state_save_us, ledger.load_us] {
        assert!(part >= 60_000, "{ledger}");
    }
    assert!(report.downtime == ledger.total() && ledger.beyond_ram() >= 3 * PART, "{ledger}");
    assert!(report.over_limit(NO).unwrap().contains(" took "));
    assert!(there.join().unwrap().unwrap().ledger.load_us >= 60_000);
    // What was learned counts for the next one.
    let limits = Limits { device_downtime: ledger.beyond_ram(), ..Limits::default() };
    let (to, there) = receive(blocks(&["ram"]), SOON, accept);
    let mut precopy = still(&["ram"]).limits(limits).build().unwrap().connect(&to).unwrap();
    let expected = Duration::from_micros(precopy.round().unwrap().expected_downtime_us);
    assert!(expected >= 3 * PART, "{expected:?}");
    drop(precopy);
    assert!(there.join().unwrap().is_err());
}

#[test]
fn the_limit_for_rounds_does_not_hold_back_the_switch_over() {
    // At this rate it would take minutes.
    let rate = NonZeroU64::new(256);
    let (to, there) = receive(blocks(&["ram"]), SOON, accept);
    let precopy = still(&["ram"]).max_bandwidth(rate).build().unwrap().connect(&to).unwrap();
    let control = precopy.control();
    let stopped = precopy.stop_copy().unwrap();
    control.set_max_bandwidth(rate);
    stopped.commit(&no_devices()).unwrap();
    there.join().unwrap().unwrap();
}

#[test]
fn the_switch_over_has_a_limit_of_its_own() {
    let (to, there) = receive(blocks(&["ram"]), SOON, accept);
    let limits = Limits { max_switchover_bandwidth: NonZeroU64::new(64 << 10), ..Limits::default() };
    let precopy = still(&["ram"]).limits(limits).build().unwrap().connect(&to).unwrap();
    let report = precopy.stop_copy().unwrap().commit(&no_devices()).unwrap();
    // 64 KiB of pages; the last packet and the credit of an idle pacer go at once.
    assert!(report.ledger.last_ram_us >= 300_000, "{}", report.ledger);
    there.join().unwrap().unwrap();
}

#[test]
fn progress_tells_what_is_left_and_how_long_the_guest_would_stand() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let mut precopy = source(&guest).build().unwrap().connect(&there.uri).unwrap();
    let progress = precopy.progress();
    assert_eq!(progress.now().remaining_bytes, (PAGES * PAGE) as u64);
    for _ in 0..3 {
        guest.wait_for_writes();
        let record = precopy.round().unwrap().clone();
        let now = progress.now();
        assert_eq!(now.remaining_bytes, record.remaining_bytes);
        assert_eq!(now.expected_downtime_us, record.expected_downtime_us);
        assert_eq!(now.bandwidth_bytes_per_s, record.bandwidth_bytes_per_s);
        assert!(now.remaining_bytes > 0);
    }
    drop(precopy);
    assert!(there.end().1.is_err());
}

#[test]
fn a_migration_that_is_dropped_ends_as_cancelled() {
    let drops: [fn(Precopy); 2] = [drop, |precopy| drop(precopy.stop_copy().unwrap())];
    for end in drops {
        let (to, there) = receive(blocks(&["ram"]), SOON, accept);
        let precopy = still(&["ram"]).channels(2).build().unwrap().connect(&to).unwrap();
        let control = precopy.control();
        assert_eq!(control.state(), MigrationState::Active);
        end(precopy);
        assert_eq!(control.state(), MigrationState::Cancelled);
        assert!(there.join().unwrap().is_err());
    }
}

/// Memory for a VM whose state comes first.
struct Described {
    seen: Arc<Mutex<Vec<String>>>,
}

impl IncomingRam for Described {
    fn configure(&mut self, name: &str, version: u32, state: &[u8]) -> Result<(), BoxError> {
        self.seen.lock().unwrap().push(format!("{name} {version} {state:02x?}"));
        Ok(())
    }

    fn open(&mut self, _: &Configuration, announced: &[BlockEntry]) -> Result<Vec<RamBlock>, BoxError> {
        self.seen.lock().unwrap().push(format!("{} blocks", announced.len()));
        Ok(blocks(&["ram"]))
    }
}

#[test]
fn the_state_of_the_vm_is_there_before_its_ram_whatever_it_holds() {
    for channels in [0, 2] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (to, there) = receive(Described { seen: seen.clone() }, SOON, accept);
        // The footer of its own section, and of RAM's.
        let state = [0x7e, 0x6d, 0x66, 0, 1, 0x7e, 0, 0, 0, 1, 0x7d];
        send(still(&["ram"]).channels(channels).vm_state("my-vmm", 3, &state), &to).unwrap();
        there.join().unwrap().unwrap();
        let expected = [format!("my-vmm 3 {state:02x?}"), "1 blocks".to_owned()];
        assert_eq!(*seen.lock().unwrap(), expected);
    }
}

#[test]
fn the_state_of_a_vm_that_is_not_expected_is_refused_before_anything_moves() {
    let (to, there) = receive(blocks(&["ram"]), SOON, accept);
    let error = send(still(&["ram"]).vm_state("my-vmm", 3, b"{}"), &to).unwrap_err();
    assert_eq!(error.phase(), Phase::Setup);
    let says = "the state of the source's VM, my-vmm version 3: it is not expected here";
    assert!(error.to_string().contains(says), "{error}");
    assert!(there.join().unwrap().is_err());
    let nameless = still(&["ram"]).vm_state("", 3, b"{}").build().err().unwrap();
    assert_eq!(nameless.kind(), ErrorKind::ApiMisuse);
}

#[test]
fn an_error_alone_says_its_cause() {
    let error = still(&["ram"]).timeout(Duration::from_millis(50)).build().unwrap();
    let error = error.connect(&"unix:/nowhere/at/all".parse().unwrap()).err().unwrap();
    assert!(error.to_string().contains("No such file or directory"), "{error}");
}
