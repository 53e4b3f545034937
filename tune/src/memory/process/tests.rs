//! Live processes: this test program, started once more.

mod gaps;
mod guest;

use std::ops::Range;
use std::time::{Duration, Instant};

use super::super::{BATCH_PAGES, Batch, Memory, PAGE};
use super::{Process, maps, open};
use gaps::Gaps;
use guest::{Guest, PAGES, page_of};

/// Ends of batches, neighbours, a run over several batches, and the last page.
const TOUCHED: [Range<u64>; 5] = [0..1, 5..9, 127..129, 1000..1300, PAGES - 1..PAGES];

fn write(guest: &mut Guest, pages: Range<u64>, value: u64) {
    guest.order(&format!("write {} {} {value}", pages.start, pages.end - pages.start));
}

fn pages(value: u64, ranges: &[Range<u64>]) -> Vec<Vec<u8>> {
    ranges.iter().cloned().flatten().map(|page| page_of(value, page)).collect()
}

fn held(process: &Process) -> u64 {
    process.extent().batches.iter().map(|batch| batch.held).sum()
}

/// All pages of the process, as it says where they are.
fn read(process: &mut Process) -> Vec<Vec<u8>> {
    let wanted = process.extent().batches.clone();
    let read = process.read(&wanted, &|_| {}).unwrap();
    read.iter().flat_map(|bytes| bytes.chunks(PAGE)).map(<[u8]>::to_vec).collect()
}

#[test]
fn held_pages_of_private_memory_are_found_and_read_and_none_is_made() {
    let mut guest = Guest::start("private");
    TOUCHED.into_iter().for_each(|pages| write(&mut guest, pages, 7));
    // Pages that were only read are pages of zeros, and those given back are none.
    guest.order("look 9 3");
    write(&mut guest, 2000..2010, 7);
    guest.order("drop 2000 10");
    let resident = guest.resident();
    let mut process = open(guest.pid()).unwrap();
    let expected = pages(7, &TOUCHED);
    assert_eq!(process.extent().blocks, [PAGES * PAGE as u64]);
    assert_eq!(held(&process), expected.len() as u64);
    let first = Batch { block: 0, number: 0, held: 1 + 4 + 1 };
    assert_eq!(process.extent().batches.first(), Some(&first));
    assert!(read(&mut process) == expected);
    process.rewrites().unwrap();
    assert_eq!(guest.resident(), resident);
}

#[test]
fn without_the_request_for_held_pages_the_page_table_is_read() {
    let mut guest = Guest::start("private");
    TOUCHED.into_iter().for_each(|pages| write(&mut guest, pages, 7));
    let mut process = open(guest.pid()).unwrap();
    process.content.forget_requests();
    assert_eq!(process.content.extent().unwrap().batches, process.extent().batches);
    assert!(read(&mut process) == pages(7, &TOUCHED));
}

#[test]
fn pages_of_shared_memory_are_found_in_its_file_and_none_is_made() {
    let mut guest = Guest::start("shared");
    TOUCHED.into_iter().for_each(|pages| write(&mut guest, pages, 7));
    // As another process would.
    guest.order("store 300 20 7");
    let blocks = guest.order("blocks");
    let mut process = open(guest.pid()).unwrap();
    let mut expected = TOUCHED.to_vec();
    // Without permission to open the file they are not found.
    if process.content.files() > 0 {
        expected.insert(3, 300..320);
    }
    assert_eq!(held(&process), pages(7, &expected).len() as u64);
    assert!(read(&mut process) == pages(7, &expected));
    process.rewrites().unwrap();
    assert_eq!(guest.order("blocks"), blocks);
}

#[test]
fn pages_that_come_and_go_meanwhile_are_read_or_not() {
    let mut guest = Guest::start("private");
    write(&mut guest, 100..110, 7);
    let mut process = open(guest.pid()).unwrap();
    guest.order("drop 100 3");
    write(&mut guest, 120..122, 8);
    let resident = guest.resident();
    let expected = [pages(7, &[103..105, 105..110]), pages(8, &[120..121, 121..122])].concat();
    assert!(read(&mut process) == expected);
    assert_eq!(guest.resident(), resident);
}

#[test]
fn progress_is_what_has_been_read_so_far() {
    let mut guest = Guest::start("private");
    write(&mut guest, 0..3 * BATCH_PAGES, 7);
    let mut process = open(guest.pid()).unwrap();
    let wanted = process.extent().batches.clone();
    let heard = std::cell::RefCell::new(Vec::new());
    process.read(&wanted, &|bytes| heard.borrow_mut().push(bytes)).unwrap();
    assert_eq!(heard.into_inner(), [1, 2, 3].map(|batches| batches * BATCH_PAGES * PAGE as u64));
}

#[test]
fn pages_that_are_written_meanwhile_are_found_and_paired() {
    for kind in ["private", "shared"] {
        let mut guest = Guest::start(kind);
        write(&mut guest, 0..1000, 7);
        let mut process = open(guest.pid()).unwrap();
        // The guest writes after the first look, and not again.
        let rewrites = std::thread::scope(|scope| {
            let rewrites = scope.spawn(|| process.rewrites().unwrap().unwrap());
            let begin = Instant::now();
            while !rewrites.is_finished() {
                write(&mut guest, 200..300, u64::from(begin.elapsed().subsec_nanos() | 8));
            }
            rewrites.join().unwrap()
        });
        let (times, changed): (Vec<_>, Vec<_>) = rewrites.changed.iter().copied().unzip();
        assert_eq!(changed.last(), Some(&(100 * PAGE as u64)), "{:?}", rewrites.changed);
        assert!(times.is_sorted() && changed.is_sorted(), "{:?}", rewrites.changed);
        assert_eq!(rewrites.pairs.len(), 100);
        for [before, after] in &rewrites.pairs {
            assert!(before != after);
            let page = |bytes: &[u8; PAGE]| u64::from_ne_bytes(bytes[..8].try_into().unwrap()) & 0xffff;
            assert!(page(before) == page(after) && (200..300).contains(&page(after)));
        }
    }
}

#[test]
fn pages_that_are_not_written_do_not_change() {
    let mut guest = Guest::start("private");
    write(&mut guest, 0..1000, 7);
    let rewrites = open(guest.pid()).unwrap().rewrites().unwrap().unwrap();
    assert!(rewrites.pairs.is_empty() && !rewrites.changed.is_empty());
    assert!(rewrites.changed.iter().all(|(_, bytes)| *bytes == 0), "{:?}", rewrites.changed);
}

/// `R`, `S`, `T`, `Z`: as the kernel has it.
fn state(pid: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().unwrap()[..1].to_owned()
}

#[test]
fn a_process_that_is_not_there_or_has_no_memory_is_named() {
    // Linux has no more than 2^22.
    assert_eq!(open(5_000_000).unwrap_err().to_string(), "process 5000000: there is no such process");
    // A process that has ended, and whose parent has not asked yet.
    let mut ended = std::process::Command::new("true").spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline && state(ended.id()) != "Z" {
        std::thread::yield_now();
    }
    let error = open(ended.id()).unwrap_err().to_string();
    assert!(error.contains("(true): no memory that could be a guest's RAM"), "{error}");
    ended.wait().unwrap();
}

#[test]
fn a_process_that_ends_meanwhile_is_an_error_of_its_own() {
    let mut guest = Guest::start("private");
    write(&mut guest, 0..1000, 7);
    let mut process = open(guest.pid()).unwrap();
    let wanted = process.extent().batches.clone();
    guest.end();
    let name = process.name();
    for error in [process.read(&wanted, &|_| {}).unwrap_err(), process.rewrites().unwrap_err()] {
        assert_eq!(error.to_string(), format!("{name}: it has ended, or runs another program now"));
    }
}

#[test]
fn a_process_of_another_user_is_refused_with_the_capability_it_takes() {
    // The first process belongs to root.
    let error = std::thread::scope(|scope| {
        let become_nobody_and_look = || {
            become_nobody();
            open(1).unwrap_err().to_string()
        };
        scope.spawn(become_nobody_and_look).join().unwrap()
    });
    assert!(error.starts_with("process 1 (") && error.contains("CAP_SYS_PTRACE"), "{error}");
}

/// Drops the privileges of this thread alone: the library's function is for all threads, the system
/// call for one.
#[expect(unsafe_code, reason = "the safe call is for all threads")]
fn become_nobody() {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: takes no pointer. Without privileges it does nothing, and none are left to give up.
    unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
}

#[test]
fn the_name_is_the_process_and_its_program() {
    let guest = Guest::start("private");
    let process = open(guest.pid()).unwrap();
    assert!(process.name().starts_with(&format!("process {} (", guest.pid())), "{}", process.name());
    assert!(!maps::parse(&std::fs::read_to_string("/proc/self/maps").unwrap()).is_empty());
}

/// Reads everything again and again, beside a guest that takes page faults and locks all the time.
///
/// A reader that blocks the guest, by a lock or by stopping it, does so each time; other load on
/// the machine does not. So one time in many without a pause is enough.
#[test]
fn a_guest_that_is_read_has_no_pause_of_a_millisecond() {
    for kind in ["private", "shared"] {
        let mut guest = Guest::start(kind);
        write(&mut guest, 0..PAGES, 7);
        guest.order("race");
        let mut lap = || {
            guest.order("lap");
            let mut process = open(guest.pid()).unwrap();
            let wanted = process.extent().batches.clone();
            process.read(&wanted, &|_| {}).unwrap();
            process.rewrites().unwrap();
            guest.order("lap").parse::<Gaps>().unwrap()
        };
        let mut laps = (0..20).map(|_| lap()).inspect(|lap| println!("{kind}: {lap:?}"));
        assert!(
            laps.any(|lap| lap.asleep < Duration::from_millis(1) && lap.steps > 1000),
            "{kind}: each time"
        );
    }
}

/// The guest's thread may be without a core when it is stopped, and not have reported yet when
/// asked.
#[test]
fn a_pause_would_be_noticed() {
    let mut guest = Guest::start("private");
    guest.order("race");
    let pid = rustix::process::Pid::from_raw(guest.pid().cast_signed()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut longest = Duration::ZERO;
    while longest < Duration::from_millis(1) && Instant::now() < deadline {
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let stopped = Instant::now();
        while state(guest.pid()) != "T" || stopped.elapsed() < Duration::from_millis(5) {
            std::thread::yield_now();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        longest = longest.max(guest.order("lap").parse::<Gaps>().unwrap().asleep);
    }
    assert!(longest >= Duration::from_millis(1), "{longest:?}");
}
