//! Post-copy between two of our own ends with parallel channels: they carry the background stream,
//! and pages that are asked for have channels of their own.
#![allow(
    clippy::cast_possible_truncation,
    clippy::explicit_write,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

#[path = "../live/credentials.rs"]
mod credentials;
mod cuts;
mod guest;
#[path = "../dirty/huge_pages.rs"]
mod huge_pages;
mod matrix;
#[path = "../postcopy/ram.rs"]
mod ram;
mod relay;
#[path = "../dirty/skip.rs"]
mod skip;
mod stalls;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use multifd_codecs::{Codec, Uncompressed};
use multifd_engine::transports::{Endpoint, Listener, TlsClient, TlsServer};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Control, Destination, DeviceState, DirtyMarker, Incoming, PAGE, Postcopy, PostcopyGuest, Progress,
    ProgressReader, RamBlock, SoftwareLog, Source, UserfaultLog,
};
use tempfile::TempDir;

use guest::Order;
use ram::{huge_memory, memory, write};

const SOON: Duration = Duration::from_secs(60);

/// How a guest moves.
#[derive(Clone)]
struct Move {
    channels: usize,
    /// Connections for pages that are asked for.
    urgent: usize,
    codec: Arc<dyn Codec>,
    tls: bool,
    /// Its memory is shared with a file, at both ends.
    memfd: bool,
    /// The same in huge pages, for which there must be a pool.
    huge: bool,
    order: Order,
}

impl Default for Move {
    fn default() -> Self {
        let codec = Arc::new(Uncompressed);
        Self { channels: 2, urgent: 1, codec, tls: false, memfd: false, huge: false, order: Order::Many }
    }
}

/// Both ends before they have met.
struct Ends {
    here: Vec<RamBlock>,
    there: Vec<RamBlock>,
    source: Source,
    marker: DirtyMarker,
    destination: Destination,
    /// Nothing that is not asked for goes before this says so.
    control: Control,
    sent: ProgressReader,
    credentials: Option<TempDir>,
}

impl Ends {
    fn new(how: &Move) -> Self {
        let memory = || if how.huge { huge_memory() } else { memory(how.memfd) };
        let (here, there) = (memory(), memory());
        for block in &here {
            (0..block.pages()).filter(|page| page % 4 != 0).for_each(|page| write(block, page, 1));
        }
        let log = SoftwareLog::new(&here);
        let marker = log.marker();
        let credentials = how.tls.then(|| credentials::credentials("CA"));
        let any: Endpoint = "tcp:127.0.0.1:0".parse().unwrap();
        let mut destination = Destination::builder(there.clone()).postcopy(true).timeout(SOON);
        let mut source = Source::builder(here.clone(), Configuration::new("test-10.0"))
            .dirty_log(log)
            .channels(how.channels)
            .codec(Arc::clone(&how.codec))
            .postcopy(true)
            .postcopy_urgent_channels(how.urgent)
            .max_postcopy_bandwidth(NonZeroU64::new(1))
            .timeout(SOON);
        if let Some(dir) = &credentials {
            destination = destination.tls(TlsServer::from_directory(dir.path()).unwrap());
            source = source.tls(TlsClient::from_directory(dir.path()).unwrap());
        }
        let (destination, source) = (destination.listen(&any).unwrap(), source.build().unwrap());
        let (control, sent) = (source.control(), source.progress());
        Self { here, there, source, marker, destination, control, sent, credentials }
    }
}

/// A guest in its rounds: writes here and there until it is stopped.
fn run_before(blocks: &[RamBlock], marker: &DirtyMarker, stopped: &AtomicBool) {
    for turn in 1.. {
        for (number, block) in blocks.iter().enumerate() {
            let page = turn * 7 % block.pages();
            write(block, page, turn);
            marker.mark(number, (page * PAGE) as u64, PAGE as u64);
        }
        if stopped.load(Ordering::Acquire) {
            return;
        }
        thread::yield_now();
    }
}

/// Some rounds, while the guest writes; then a third of its pages are stale, and it switches.
fn switch(source: Source, here: &[RamBlock], marker: &DirtyMarker, to: &Endpoint, rounds: usize) -> Postcopy {
    let mut precopy = source.connect(to).unwrap();
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| run_before(here, marker, &stopped));
        let rounds: Vec<_> = (0..rounds).map(|_| precopy.round().map(drop)).collect();
        stopped.store(true, Ordering::Release);
        guest.join().unwrap();
        rounds.into_iter().for_each(Result::unwrap);
    });
    for (number, block) in here.iter().enumerate() {
        for page in (0..block.pages()).step_by(3) {
            write(block, page, 0xabc);
            marker.mark(number, (page * PAGE) as u64, PAGE as u64);
        }
    }
    precopy.switch_to_postcopy(&DeviceState::opaque("devices", 1, b"state")).unwrap()
}

/// The guest, once it may run at the destination.
fn arrived(destination: Destination) -> PostcopyGuest {
    let Incoming::Postcopy(guest) = destination.receive_live().unwrap() else { panic!("no switch") };
    assert_eq!(guest.opaque_state("devices"), Some((1, &b"state"[..])));
    guest.loaded().unwrap();
    guest
}

/// Waits until the counters are as they must become.
fn until(progress: &ProgressReader, what: &str, ready: impl Fn(&Progress) -> bool) {
    let begun = Instant::now();
    while !ready(&progress.now()) {
        assert!(begun.elapsed() < SOON, "{what}: {:?}", progress.now());
        thread::yield_now();
    }
}

/// Pages that went on the channels of this name.
fn pages_on(progress: &Progress, name: &str) -> u64 {
    let on = progress.per_channel.iter().filter(|channel| channel.name.starts_with(name));
    on.map(|channel| channel.pages_normal + channel.pages_zero).sum()
}

fn listen() -> (Listener, Endpoint) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let at = listener.endpoint();
    (listener, at)
}

/// Says why there is no post-copy here, if so.
fn missing() -> bool {
    let missing = UserfaultLog::new().err();
    if let Some(error) = &missing {
        skip::skipped(&format!("userfaultfd: {error}"));
    }
    missing.is_some()
}
