//! Memory that a userfaultfd's handler fills on demand, and pages that it says are lost.
#![expect(unsafe_code, reason = "the requests have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_engine::{DeviceState, PAGE, RamBlock, SoftwareLog, SourceBuilder};

use crate::kinds::{PRIVATE, READ_WRITE, advise, anonymous, block, map, start};
use crate::skip::skipped;
use crate::source::check_error;
use crate::{PAGES, WAYS, Way, fill, go, go_by, go_with, page};

const USER_MODE_ONLY: i32 = 1;
const FEATURE_POISON: u64 = 1 << 14;
const API: libc::Ioctl = 0xc018_aa3f;
const REGISTER: libc::Ioctl = 0xc020_aa00;
const COPY: libc::Ioctl = 0xc028_aa03;
const POISON: libc::Ioctl = 0xc020_aa08;
const MODE_MISSING: u64 = 1;

/// A block whose missing pages a userfaultfd's owner fills, as a VMM that restores on demand does.
struct Pager(File);

impl Pager {
    /// `None`: this process may not, or the kernel is too old.
    fn of(block: &RamBlock, flags: i32, features: u64) -> Option<Self> {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) };
        if fd < 0 {
            return None;
        }
        // SAFETY: a new descriptor that nothing else owns.
        let pager = Self(unsafe { File::from_raw_fd(fd as i32) });
        pager.ask(API, &mut [0xaa_u64, features, 0]).ok()?;
        let from = start(block, &(0..block.pages())) as u64;
        pager.ask(REGISTER, &mut [from, block.used_len(), MODE_MISSING, 0]).unwrap();
        Some(pager)
    }

    fn ask<const WORDS: usize>(&self, request: libc::Ioctl, words: &mut [u64; WORDS]) -> io::Result<()> {
        // SAFETY: each of the requests reads and writes as many words as it is given here.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Fills pages of `block` as they are in `stored` when they are asked for; returns how many.
    fn serve(&self, block: &RamBlock, stored: &RamBlock, end: &AtomicBool) -> usize {
        let base = start(block, &(0..1)) as u64;
        let mut served = 0;
        while !end.load(Ordering::Relaxed) {
            let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure, as said.
            unsafe { libc::poll(&raw mut ready, 1, 20) };
            // struct uffd_msg: an event byte, and from byte 16 on the address of a page fault.
            let mut message = [0_u8; 32];
            if io::Read::read(&mut &self.0, &mut message).is_err() {
                continue;
            }
            let at = u64::from_ne_bytes(message[16..24].try_into().unwrap()) / PAGE as u64 * PAGE as u64;
            let from = start(stored, &(0..1)) as u64 + (at - base);
            match self.ask(COPY, &mut [at, from, PAGE as u64, 0, 0]) {
                Err(error) if error.raw_os_error() != Some(libc::EEXIST) => panic!("{error}"),
                _ => served += 1,
            }
        }
        served
    }
}

#[test]
fn memory_that_is_filled_on_demand_is_refused_by_name() {
    let here = anonymous();
    fill(&here, 0..4);
    let Some(pager) = Pager::of(&here, USER_MODE_ONLY, 0) else { return skipped("no userfaultfd here") };
    let error = go(Way::None, &here, &anonymous(), || ()).source.unwrap_err();
    check_error(&error, Way::None, "filled on demand");
    drop(pager);
    go(Way::None, &here, &anonymous(), || ()).success(&"afterwards");
}

/// A guest that runs, so that a userfaultfd may be registered at any time.
fn live(way: Way, here: &RamBlock) -> impl FnOnce(SourceBuilder) -> SourceBuilder {
    let log = SoftwareLog::new(std::slice::from_ref(here));
    move |source| way.set(source).dirty_log(log)
}

/// An external manager takes the guest's pages over while it moves: what it took away must not go
/// as zero.
#[test]
fn a_pager_that_comes_in_the_first_round_is_refused_by_name() {
    for way in WAYS {
        let here = anonymous();
        fill(&here, 0..PAGES);
        let mut pager = None;
        let outcome = go_with(live(way, &here), &here, &anonymous(), || {
            pager = Pager::of(&here, USER_MODE_ONLY, 0);
            advise(&here, 10..20, libc::MADV_DONTNEED);
        });
        if pager.is_none() {
            return skipped("no userfaultfd here");
        }
        check_error(&outcome.source.unwrap_err(), way, "filled on demand");
        assert!(outcome.destination.is_err(), "{way:?}");
    }
}

#[test]
fn a_pager_that_comes_before_the_last_round_is_refused_by_name() {
    for way in WAYS {
        let here = anonymous();
        fill(&here, 0..PAGES);
        let log = SoftwareLog::new(std::slice::from_ref(&here));
        let marker = log.marker();
        let mut pager = None;
        let outcome = go_by(
            |source| way.set(source).dirty_log(log),
            &here,
            &anonymous(),
            |mut precopy| {
                precopy.round()?;
                fill(&here, 5..6);
                marker.mark(0, 5 * PAGE as u64, PAGE as u64);
                pager = Pager::of(&here, USER_MODE_ONLY, 0);
                advise(&here, 5..6, libc::MADV_DONTNEED);
                precopy.stop_copy()?.commit(&DeviceState::none())
            },
        );
        if pager.is_none() {
            return skipped("no userfaultfd here");
        }
        check_error(&outcome.source.unwrap_err(), way, "filled on demand");
        assert!(outcome.destination.is_err(), "{way:?}");
    }
}

/// A guest that was restored a moment ago: next to nothing of it is in memory.
#[test]
fn memory_that_is_filled_on_demand_is_read_through_its_handler() {
    let stored = anonymous();
    fill(&stored, 0..PAGES - 2);
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 3..4);
        let Some(pager) = Pager::of(&here, 0, 0) else {
            return skipped("no userfaultfd for the kernel's faults");
        };
        let end = AtomicBool::new(false);
        let served = std::thread::scope(|scope| {
            let handler = scope.spawn(|| pager.serve(&here, &stored, &end));
            let name = here.name().clone();
            let outcome =
                go_with(|source| way.set(source).paused_guest().paged_block(name), &here, &there, || ());
            end.store(true, Ordering::Relaxed);
            let served = handler.join().unwrap();
            outcome.success(&way);
            served
        });
        assert_eq!(served, PAGES - 1, "{way:?}: each page that was not there");
        for number in 0..PAGES {
            assert_eq!(page(&there, number), page(&stored, number), "{way:?} {number}");
        }
    }
}

/// A handler that does not serve the kernel's faults cannot serve the engine's.
#[test]
fn memory_whose_handler_serves_no_faults_of_the_kernel_is_an_error() {
    for way in WAYS {
        let here = anonymous();
        let Some(pager) = Pager::of(&here, USER_MODE_ONLY, 0) else { return skipped("no userfaultfd here") };
        let name = here.name().clone();
        let outcome =
            go_with(|source| way.set(source).paused_guest().paged_block(name), &here, &anonymous(), || ());
        check_error(&outcome.source.unwrap_err(), way, "page 0");
        drop(pager);
    }
}

/// UFFDIO_POISON makes what a machine check makes: a page that cannot be read. VMMs do it with
/// pages that were lost before the guest moved to this host.
#[test]
fn a_poisoned_page_is_an_error_that_names_it() {
    for way in WAYS {
        let here = anonymous();
        fill(&here, 0..20);
        let Some(pager) = Pager::of(&here, USER_MODE_ONLY, FEATURE_POISON) else {
            return skipped("no userfaultfd that poisons pages");
        };
        let at = start(&here, &(30..31)) as u64;
        pager.ask(POISON, &mut [at, PAGE as u64, 0, 0]).unwrap();
        drop(pager);
        let outcome = go(way, &here, &anonymous(), || ());
        let error = outcome.source.unwrap_err();
        check_error(&error, way, "page 30");
        assert!(error.to_string().contains("poisoned"), "{way:?}: {error}");
    }
}

/// Also where the page table has nothing but the mark, as for the marks that a log leaves.
#[test]
fn a_poisoned_huge_page_is_an_error_that_names_it() {
    const HUGE: usize = (2 << 20) / PAGE;
    for way in WAYS {
        let here = block(map(READ_WRITE, PRIVATE | libc::MAP_HUGETLB, None, 2 * HUGE).unwrap());
        let there = block(map(READ_WRITE, PRIVATE, None, 2 * HUGE).unwrap());
        let Some(pager) = Pager::of(&here, USER_MODE_ONLY, FEATURE_POISON) else {
            return skipped("no userfaultfd that poisons huge pages");
        };
        let at = start(&here, &(HUGE..HUGE + 1)) as u64;
        pager.ask(POISON, &mut [at, (HUGE * PAGE) as u64, 0, 0]).unwrap();
        drop(pager);
        let error = go(way, &here, &there, || ()).source.unwrap_err();
        // Which of its parts is looked at first is chance where there are several channels.
        check_error(&error, way, "reading page ");
        assert!(error.to_string().contains("poisoned"), "{way:?}: {error}");
    }
}
