//! A source that switches to post-copy, against a scripted destination: every page once, nothing
//! lost whatever breaks.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

mod faults;
#[path = "../postcopy/open_files.rs"]
mod open_files;
mod peer;

use std::num::NonZeroU64;
use std::thread::JoinHandle;
use std::time::Duration;

use multifd_engine::transports::Channel;
use multifd_engine::vm_memory::Bytes;
use multifd_engine::wire::{Command, Configuration};
use multifd_engine::{
    Decision, DeviceState, HostMemory, Limits, MigrationState, OnStall, PAGE, Postcopy, Precopy, RamBlock,
    Report, Served, SoftwareLog, Source, SourceBuilder,
};

use peer::{LinkEnd, Peer, Script};

const SOON: Duration = Duration::from_secs(60);

/// Two blocks of 96 and 40 pages: every fourth page is zero, the others are not.
fn guest() -> Vec<RamBlock> {
    [("pc.ram", 96), ("vga.vram", 40)]
        .map(|(name, pages)| {
            let block = RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap());
            (0..pages).filter(|page| page % 4 != 0).for_each(|page| write(&block, page, page as u8));
            block
        })
        .to_vec()
}

fn write(block: &RamBlock, page: usize, value: u8) {
    block.memory().slice(page * PAGE, PAGE).unwrap().write_slice(&[value | 0x80; PAGE], 0).unwrap();
}

fn source(blocks: &[RamBlock]) -> SourceBuilder {
    Source::builder(blocks.to_vec(), Configuration::new("test-10.0")).postcopy(true).timeout(SOON)
}

fn devices() -> DeviceState {
    DeviceState::opaque("devices", 1, b"state")
}

/// A destination that reads one link on a thread of its own.
struct There(JoinHandle<(Peer, LinkEnd)>);

impl There {
    fn start(peer: Peer, script: Script, resumed: bool) -> (Channel, Self) {
        let (ours, theirs) = Channel::pair().unwrap();
        (ours, Self::over(theirs, peer, script, resumed))
    }

    fn over(theirs: Channel, mut peer: Peer, script: Script, resumed: bool) -> Self {
        let thread = std::thread::Builder::new();
        let thread = thread.spawn(move || {
            let end = peer.link(&theirs, &script, resumed);
            (peer, end)
        });
        Self(thread.unwrap())
    }

    fn end(self) -> (Peer, LinkEnd) {
        self.0.join().unwrap()
    }
}

fn paused(blocks: &[RamBlock], script: Script) -> (Precopy, There) {
    let (main, there) = There::start(Peer::new(blocks), script, false);
    let precopy = source(blocks).paused_guest().build().unwrap().connect_over(main, Vec::new()).unwrap();
    (precopy, there)
}

fn completed(served: Served) -> Report {
    match served {
        Served::Completed(report) => *report,
        Served::Paused(error) => panic!("paused: {error}"),
    }
}

fn request(block: &str, first: usize, pages: usize) -> (String, usize, usize) {
    (block.to_owned(), first, pages)
}

/// How often a command came that `fits`.
fn count(peer: &Peer, fits: impl Fn(&Command) -> bool) -> usize {
    peer.commands.iter().filter(|command| fits(command)).count()
}

#[test]
fn a_switch_before_the_first_round_sends_every_page_once() {
    let blocks = guest();
    let (precopy, there) = paused(&blocks, Script::default());
    let control = precopy.control();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let report = completed(postcopy.serve().unwrap());
    assert_eq!(control.state(), MigrationState::Completed);
    assert_eq!(report.progress.pages_normal + report.progress.pages_zero, 136);
    assert!(report.postcopy.unwrap().run_after.is_some());
    let (peer, end) = there.end();
    assert_eq!(end, LinkEnd::Done);
    peer.check(&blocks);
    assert_eq!(peer.order.len(), 136, "none came before the switch");
    assert_eq!(count(&peer, |command| matches!(command, Command::PostcopyAdvise(Some(_)))), 1);
    assert_eq!(count(&peer, |command| matches!(command, Command::RamDiscard { .. })), 2, "a range a block");
    let tail: Vec<_> = peer.commands.iter().rev().take(6).rev().cloned().collect();
    let [
        Command::Packaged(_),
        Command::PostcopyListen,
        Command::Ping(3),
        Command::Ping(0x42),
        Command::PostcopyRun,
        Command::Ping(4),
    ] = &tail[..]
    else {
        panic!("{tail:?}")
    };
}

#[test]
fn pages_that_are_asked_for_leave_first_and_the_scan_goes_on_behind_them() {
    let blocks = guest();
    let requests = vec![request("vga.vram", 30, 1), request("pc.ram", 50, 1), request("pc.ram", 50, 1)];
    let (main, there) = There::start(Peer::new(&blocks), Script { requests, ..Script::default() }, false);
    // So slow that only what is asked for leaves before it is asked for.
    let source = source(&blocks).paused_guest().max_postcopy_bandwidth(NonZeroU64::new(1)).build().unwrap();
    let progress = source.progress();
    let control = source.control();
    let precopy = source.connect_over(main, Vec::new()).unwrap();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let report = std::thread::scope(|scope| {
        let serving = scope.spawn(|| completed(postcopy.serve().unwrap()));
        // When all three requests were seen, no bytes of the limit are left but those for them.
        while progress.now().requests < 3 {
            std::thread::yield_now();
        }
        control.set_max_postcopy_bandwidth(None);
        serving.join().unwrap()
    });
    let stats = report.postcopy.unwrap();
    assert_eq!((stats.requests, stats.pages_requested), (3, 3));
    let (peer, _) = there.end();
    peer.check(&blocks);
    let at =
        |block: &str, page| peer.order.iter().position(|sent| *sent == (block.to_owned(), page)).unwrap();
    assert!(at("vga.vram", 30) < at("pc.ram", 50), "{:?}", peer.order);
    assert_eq!(at("pc.ram", 50) + 1, at("pc.ram", 51), "{:?}", peer.order);
    assert!(at("pc.ram", 95) < at("pc.ram", 49), "{:?}", peer.order);
}

#[test]
fn what_was_written_since_it_was_sent_is_discarded_and_goes_again() {
    let blocks = guest();
    for rounds in [1, 3] {
        let log = SoftwareLog::new(&blocks);
        let marker = log.marker();
        let (main, there) = There::start(Peer::new(&blocks), Script::default(), false);
        let source = source(&blocks).dirty_log(log).build().unwrap();
        let mut precopy = source.connect_over(main, Vec::new()).unwrap();
        for round in 0..rounds {
            precopy.round().unwrap();
            for page in [3, 4, 5, 60 + round] {
                write(&blocks[0], page, round as u8);
                marker.mark(0, (page * PAGE) as u64, PAGE as u64);
            }
        }
        let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
        completed(postcopy.serve().unwrap());
        let (peer, _) = there.end();
        peer.check(&blocks);
        // A round collects what was written before it when its pages are out: the last two writes
        // are left.
        let last = 60 + rounds;
        let expected = [3, 4, 5].into_iter().chain(last.saturating_sub(2).max(60)..last);
        assert!(expected.eq(peer.order.iter().map(|(_, page)| *page)), "{:?}", peer.order);
        assert_eq!(count(&peer, |command| matches!(command, Command::RamDiscard { .. })), 1);
    }
}

/// Holes are found when a migration begins; no round follows that would send what was written
/// since.
#[test]
fn a_hole_that_was_written_before_the_switch_is_not_taken_for_zero() {
    let memory = HostMemory::anonymous(64 * PAGE).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * PAGE as u64).unwrap();
    let sparse = HostMemory::map_file(file, 64 * PAGE).unwrap();
    let blocks = vec![
        RamBlock::new("anonymous".try_into().unwrap(), memory),
        RamBlock::new("file".try_into().unwrap(), sparse),
    ];
    let log = SoftwareLog::new(&blocks);
    let (main, there) = There::start(Peer::new(&blocks), Script::default(), false);
    let precopy = source(&blocks).dirty_log(log).build().unwrap().connect_over(main, Vec::new()).unwrap();
    blocks.iter().for_each(|block| write(block, 17, 7));
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

#[test]
fn huge_pages_go_whole_in_order_and_their_size_is_listed() {
    let mut blocks = guest();
    blocks[0] = blocks[0].clone().with_host_page_size(8 * PAGE);
    let script = Script {
        requests: vec![request("pc.ram", 40, 8)],
        huge: vec!["pc.ram".to_owned()],
        ..Script::default()
    };
    let (precopy, there) = paused(&blocks, script);
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    completed(postcopy.serve().unwrap());
    let (peer, _) = there.end();
    peer.check(&blocks);
    assert_eq!(peer.page_sizes.get("pc.ram"), Some(&(8 * PAGE as u64)));
    let advised = peer.commands.iter().find_map(|command| match command {
        Command::PostcopyAdvise(Some(advise)) => Some(advise.page_sizes),
        _ => None,
    });
    assert_eq!(advised, Some(9 * PAGE as u64));
    let ram: Vec<_> =
        peer.order.iter().filter(|(block, _)| block == "pc.ram").map(|(_, page)| *page).collect();
    assert!(
        ram.chunks(8).all(|host| host[0] % 8 == 0 && host.iter().copied().eq(host[0]..host[0] + 8)),
        "{ram:?}"
    );
}

/// Serves a post-copy whose preempt channel is read on a thread of its own, `cut` after so many
/// pages.
fn preempted(cut: Option<usize>) -> (Vec<RamBlock>, Served, Postcopy, Peer, Peer) {
    let blocks = guest();
    let requests = vec![request("pc.ram", 30, 2), request("vga.vram", 3, 1)];
    let (main, there) = There::start(Peer::new(&blocks), Script { requests, ..Script::default() }, false);
    let (urgent, theirs) = Channel::pair().unwrap();
    let mut asked = Peer::new(&blocks);
    let reading = std::thread::Builder::new();
    let reading = reading.spawn(move || {
        asked.urgent(&theirs, cut);
        asked
    });
    let source =
        source(&blocks).paused_guest().postcopy_preempt(true).max_postcopy_bandwidth(NonZeroU64::new(1));
    let source = source.build().unwrap();
    let (progress, control) = (source.progress(), source.control());
    let precopy = source.connect_over(main, Vec::new()).unwrap().with_urgent_channel(urgent).unwrap();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let served = std::thread::scope(|scope| {
        let serving = scope.spawn(|| postcopy.serve().unwrap());
        let urgent = || {
            progress
                .now()
                .per_channel
                .iter()
                .filter(|one| one.name == "urgent")
                .map(|one| one.pages_normal + one.pages_zero)
                .sum::<u64>()
        };
        while urgent() < 3 && !serving.is_finished() {
            std::thread::yield_now();
        }
        if cut.is_none() {
            control.set_max_postcopy_bandwidth(None);
        }
        serving.join().unwrap()
    });
    (blocks, served, postcopy, there.end().0, reading.unwrap().join().unwrap())
}

#[test]
fn pages_that_are_asked_for_have_a_channel_of_their_own() {
    let (blocks, served, _, mut peer, asked) = preempted(None);
    completed(served);
    for (name, pages) in asked.pages {
        let there = peer.pages.get_mut(&name).unwrap();
        for (page, content) in pages.into_iter().enumerate().filter(|(_, content)| content.is_some()) {
            assert!(there[page].is_none(), "page {page} of {name} came over both");
            assert!([("pc.ram", 30), ("pc.ram", 31), ("vga.vram", 3)].contains(&(&name[..], page)));
            there[page] = content;
        }
    }
    peer.check(&blocks);
}

/// A guest that has these pages dirty after each round.
fn stalls(limits: Limits, rounds: usize) {
    let blocks = guest();
    let log = SoftwareLog::new(&blocks);
    let marker = log.marker();
    let (main, there) = There::start(Peer::new(&blocks), Script::default(), false);
    let source = source(&blocks).dirty_log(log).limits(limits).build().unwrap();
    let mut precopy = source.connect_over(main, Vec::new()).unwrap();
    while !precopy.wants_postcopy() {
        for page in 20..30 {
            write(&blocks[0], page, precopy.decisions().len() as u8);
            marker.mark(0, (page * PAGE) as u64, PAGE as u64);
        }
        precopy.round().unwrap();
        assert!(!precopy.converged(), "{:?}", precopy.decisions());
    }
    assert_eq!(precopy.decisions().len(), rounds, "{:?}", precopy.decisions());
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let report = completed(postcopy.serve().unwrap());
    assert_eq!(report.decisions.last().map(|last| last.decision), Some(Decision::Postcopy));
    let (peer, _) = there.end();
    peer.check(&blocks);
    let stale: Vec<_> = peer.order.iter().map(|(_, page)| *page).collect();
    assert_eq!(stale, (20..30).collect::<Vec<_>>(), "what was stale went again, and nothing else");
}

#[test]
fn rounds_that_stall_end_in_postcopy() {
    let at_stall =
        Limits { downtime_limit: Duration::ZERO, on_stall: OnStall::Postcopy, ..Limits::default() };
    stalls(at_stall, 4);
    // Not given up when that has lasted for too long.
    stalls(Limits { stall_deadline: Some(Duration::ZERO), ..at_stall }, 4);
}

#[test]
fn a_deadline_that_has_passed_ends_in_postcopy() {
    let on_stall = OnStall::Postcopy;
    let deadline = Some(Duration::ZERO);
    stalls(Limits { downtime_limit: Duration::ZERO, on_stall, deadline, ..Limits::default() }, 1);
}
