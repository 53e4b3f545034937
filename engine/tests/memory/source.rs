//! Memory that faults where the guest is.

use std::os::unix::fs::FileExt;

use multifd_engine::{DeviceState, Error, ErrorKind, PAGE, Precopy, SoftwareLog, UserfaultLog};

use crate::kinds::{PRIVATE, READ_WRITE, advise, anonymous, block, file, map, memfd, populated, protect};
use crate::skip::skipped;
use crate::{PAGES, WAYS, Way, fill, go, go_by, page};

pub(crate) fn check_error(error: &Error, way: Way, pages: &str) {
    let text = error.chain();
    assert_eq!(error.kind(), ErrorKind::GuestMemory, "{way:?}: {text}");
    assert!(error.source_may_resume(), "{way:?}: {text}");
    assert!(text.contains("RAM block ram@0x0") && text.contains(pages), "{way:?}: {text}");
}

/// virtio-mem: what is not plugged is protected, so that nothing touches it by mistake.
#[test]
fn an_unplugged_part_goes_as_zero_and_is_not_touched() {
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 0..PAGES);
        fill(&there, 0..PAGES);
        advise(&here, 16..32, libc::MADV_DONTNEED);
        protect(&here, 16..32, libc::PROT_NONE);
        go(way, &here, &there, || ()).success(&way);
        assert_eq!(populated(&here), PAGES - 16, "{way:?}");
        for number in 0..PAGES {
            let expected = if (16..32).contains(&number) { [0; PAGE] } else { page(&here, number) };
            assert_eq!(page(&there, number), expected, "{way:?} {number}");
        }
    }
}

#[test]
fn a_protected_part_that_holds_data_is_an_error_that_names_it() {
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 0..PAGES);
        protect(&here, 16..32, libc::PROT_NONE);
        let outcome = go(way, &here, &there, || ());
        check_error(&outcome.source.unwrap_err(), way, "pages 16..32");
        assert!(outcome.destination.is_err());
        protect(&here, 16..32, READ_WRITE);
        go(way, &here, &anonymous(), || ()).success(&way);
    }
}

#[test]
fn a_part_that_is_protected_after_the_start_is_an_error_too() {
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 0..PAGES);
        let outcome = go(way, &here, &there, || protect(&here, 63..64, libc::PROT_NONE));
        check_error(&outcome.source.unwrap_err(), way, "page 63");
    }
}

#[test]
fn a_file_that_is_cut_is_an_error() {
    for way in WAYS {
        let behind = file();
        let here =
            block(map(READ_WRITE, libc::MAP_SHARED, Some(behind.try_clone().unwrap()), PAGES).unwrap());
        fill(&here, 0..PAGES);
        let outcome = go(way, &here, &anonymous(), || behind.set_len(40 * PAGE as u64).unwrap());
        check_error(&outcome.source.unwrap_err(), way, "page 40");
        // Cut before the start.
        let outcome = go(way, &here, &anonymous(), || ());
        check_error(&outcome.source.unwrap_err(), way, "ends at byte");
    }
}

#[test]
fn huge_pages_that_nothing_has_touched_need_no_pool() {
    const HUGE: usize = (2 << 20) / PAGE;
    let flags = PRIVATE | libc::MAP_HUGETLB;
    let mut ways = WAYS.to_vec();
    ways.extend(UserfaultLog::new().is_ok().then_some(Way::Logged));
    for way in &ways {
        let here = block(map(READ_WRITE, flags, None, 2 * HUGE).unwrap());
        let there = block(map(READ_WRITE, PRIVATE, None, 2 * HUGE).unwrap());
        go(*way, &here, &there, || ()).success(&way);
        assert_eq!(populated(&here), 0, "{way:?}");
    }
    for way in &ways {
        let Ok(behind) = memfd(libc::MFD_HUGETLB, 2 * HUGE * PAGE) else {
            return skipped("no hugetlbfs here");
        };
        let shared = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let here = block(map(READ_WRITE, shared, Some(behind), 2 * HUGE).unwrap());
        let there = block(map(READ_WRITE, PRIVATE, None, 2 * HUGE).unwrap());
        go(*way, &here, &there, || ()).success(&way);
        assert_eq!(populated(&here), 0, "{way:?}");
    }
}

/// A page of one makes all of it present: what the guest has not used of it has to be read.
#[test]
fn transparent_huge_pages_arrive_and_untouched_ones_stay_so() {
    const HUGE: usize = (2 << 20) / PAGE;
    for way in WAYS {
        let huge = || {
            let block = block(map(READ_WRITE, PRIVATE, None, 6 * HUGE).unwrap());
            advise(&block, 0..6 * HUGE, libc::MADV_HUGEPAGE);
            block
        };
        let (here, there) = (huge(), huge());
        fill(&here, 2 * HUGE + 5..2 * HUGE + 40);
        let before = populated(&here);
        go(way, &here, &there, || ()).success(&way);
        assert_eq!(populated(&here), before, "{way:?}");
        for number in [0, 2 * HUGE + 4, 2 * HUGE + 5, 2 * HUGE + 39, 2 * HUGE + 40, 6 * HUGE - 1] {
            assert_eq!(page(&there, number), page(&here, number), "{way:?} {number}");
        }
    }
}

#[test]
fn untouched_memory_stays_so() {
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 3..5);
        go(way, &here, &there, || ()).success(&way);
        assert_eq!(populated(&here), 2, "{way:?}");
        let behind = file();
        let here =
            block(map(READ_WRITE, libc::MAP_SHARED, Some(behind.try_clone().unwrap()), PAGES).unwrap());
        fill(&here, 3..5);
        go(way, &here, &there, || ()).success(&way);
        let stored = std::os::unix::fs::MetadataExt::blocks(&behind.metadata().unwrap()) * 512;
        assert_eq!(stored, 2 * PAGE as u64, "{way:?}");
    }
}

/// No round comes between the look for holes and the last pass.
#[test]
fn what_a_guest_writes_between_the_start_and_its_pause_arrives_without_a_round() {
    for way in WAYS {
        let shared = || block(map(READ_WRITE, libc::MAP_SHARED, Some(file()), PAGES).unwrap());
        for here in [anonymous(), shared()] {
            let there = anonymous();
            let log = SoftwareLog::new(std::slice::from_ref(&here));
            let marker = log.marker();
            let write_and_stop = |precopy: Precopy| {
                fill(&here, 7..9);
                marker.mark(0, 7 * PAGE as u64, 2 * PAGE as u64);
                precopy.stop_copy()?.commit(&DeviceState::none())
            };
            go_by(|source| way.set(source).dirty_log(log), &here, &there, write_and_stop).success(&way);
            assert_eq!((page(&there, 7), page(&there, 8)), (page(&here, 7), page(&here, 8)), "{way:?}");
        }
    }
}

/// A page that this process has not mapped is not zero for that.
#[test]
fn what_another_mapping_wrote_to_a_file_arrives() {
    for way in WAYS {
        for (flags, own) in [(libc::MAP_SHARED, 0..0), (libc::MAP_PRIVATE, 30..34)] {
            let (behind, there) = (file(), anonymous());
            behind.write_all_at(&[7; 4 * PAGE], 20 * PAGE as u64).unwrap();
            let here = block(map(READ_WRITE, flags, Some(behind.try_clone().unwrap()), PAGES).unwrap());
            fill(&here, own.clone());
            go(way, &here, &there, || ()).success(&way);
            assert_eq!(page(&there, 23), [7; PAGE], "{way:?}");
            for number in 0..PAGES {
                assert_eq!(page(&there, number), page(&here, number), "{way:?} {own:?} {number}");
            }
        }
        // Shared memory without a file that is known: what is absent may be elsewhere.
        let here = block(map(READ_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None, PAGES).unwrap());
        fill(&here, 8..9);
        advise(&here, 0..PAGES, libc::MADV_DONTNEED);
        let there = anonymous();
        go(way, &here, &there, || ()).success(&way);
        assert_eq!(page(&there, 8), page(&here, 8), "{way:?}");
    }
}
