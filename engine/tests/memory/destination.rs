//! Memory that faults where the guest arrives.

use multifd_engine::{ErrorKind, PAGE};

use crate::kinds::{PRIVATE, READ_WRITE, advise, anonymous, block, file, map, memfd, populated, protect};
use crate::{PAGES, WAYS, Way, fill, go, page};

#[test]
fn a_block_for_reading_only_is_refused_before_a_page_is_sent() {
    for way in WAYS {
        let read_only_file = || {
            use std::os::fd::AsRawFd as _;
            let file = file();
            std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
        };
        let memories = [
            map(libc::PROT_READ, PRIVATE, None, PAGES),
            map(libc::PROT_READ, libc::MAP_PRIVATE, Some(file()), PAGES),
            map(libc::PROT_READ, libc::MAP_SHARED, Some(read_only_file()), PAGES),
        ];
        for (kind, memory) in memories.into_iter().enumerate() {
            let here = anonymous();
            fill(&here, 0..PAGES);
            let outcome = go(way, &here, &block(memory.unwrap()), || ());
            let error = outcome.destination.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::GuestMemory, "{way:?} {kind}: {}", error.chain());
            assert!(error.chain().contains("for reading only"), "{way:?} {kind}: {}", error.chain());
            assert!(outcome.source.unwrap_err().source_may_resume(), "{way:?} {kind}");
        }
    }
}

#[test]
fn a_block_for_reading_only_is_written_through_its_file() {
    for way in WAYS {
        let here = anonymous();
        fill(&here, 0..PAGES - 1);
        let there = block(map(libc::PROT_READ, libc::MAP_SHARED, Some(file()), PAGES).unwrap());
        go(way, &here, &there, || ()).success(&way);
        for number in 0..PAGES {
            assert_eq!(page(&there, number), page(&here, number), "{way:?} {number}");
        }
    }
}

#[test]
fn an_unplugged_part_is_left_alone_and_refuses_data() {
    for way in WAYS.into_iter().take(4) {
        let (here, there) = (anonymous(), anonymous());
        fill(&here, 0..PAGES);
        advise(&here, 16..32, libc::MADV_DONTNEED);
        protect(&there, 16..32, libc::PROT_NONE);
        go(way, &here, &there, || ()).success(&way);
        assert_eq!(page(&there, 15), page(&here, 15), "{way:?}");
        protect(&there, 16..32, READ_WRITE);
        assert_eq!(page(&there, 16), [0; PAGE], "{way:?}");

        protect(&there, 16..32, libc::PROT_NONE);
        fill(&here, 20..21);
        let error = go(way, &here, &there, || ()).destination.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::GuestMemory, "{way:?}: {}", error.chain());
        assert!(error.chain().contains("PROT_NONE"), "{way:?}: {}", error.chain());
    }
}

#[test]
fn huge_pages_without_a_pool_are_an_error() {
    const HUGE: usize = (2 << 20) / PAGE;
    for way in WAYS {
        let here = block(map(READ_WRITE, PRIVATE, None, HUGE).unwrap());
        fill(&here, 9..10);
        // More than any pool of a machine for tests has, so that the first touch fails.
        let there = block(map(READ_WRITE, PRIVATE | libc::MAP_HUGETLB, None, HUGE).unwrap());
        if crate::kinds::free_huge_pages() > 0 {
            return crate::skip::skipped("there are huge pages");
        }
        let error = go(way, &here, &there, || ()).destination.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::GuestMemory, "{way:?}: {}", error.chain());
        assert!(error.chain().contains("RAM block ram@0x0"), "{way:?}: {}", error.chain());
    }
}

/// A VMM keeps its blocks from attempt to attempt; they are fresh in the first only.
#[test]
fn memory_is_fresh_for_one_attempt() {
    for way in WAYS {
        let (here, there) = (anonymous(), anonymous().fresh());
        fill(&here, 0..PAGES);
        go(way, &here, &there, || ()).success(&way);
        // The guest has gone on at the source, as after an attempt that failed, and has cleared its
        // memory.
        advise(&here, 0..PAGES, libc::MADV_DONTNEED);
        fill(&here, 5..6);
        go(way, &here, &there, || ()).success(&way);
        for number in 0..PAGES {
            assert_eq!(page(&there, number), page(&here, number), "{way:?} {number}");
        }
    }
}

#[test]
fn huge_pages_arrive_from_and_in_huge_pages() {
    const HUGE: usize = (2 << 20) / PAGE;
    let pool = match crate::huge_pages::HugePages::reserve(64) {
        Ok(pool) => pool,
        Err(why) => return crate::skip::skipped(&why),
    };
    // Reserved, unlike those of a VMM that overcommits: other tests may use the pool, too.
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let huge = || map(READ_WRITE, private, None, 3 * HUGE).map(block);
    let shared = || {
        let file = memfd(libc::MFD_HUGETLB, 3 * HUGE * PAGE)?;
        map(READ_WRITE, libc::MAP_SHARED, Some(file), 3 * HUGE).map(block)
    };
    let small = || map(READ_WRITE, PRIVATE, None, 3 * HUGE).map(block);
    for way in WAYS {
        for kind in ["from", "in", "both"] {
            let pair = match kind {
                "from" => (huge(), small()),
                "in" => (small(), huge()),
                _ => (shared(), shared()),
            };
            let (Ok(here), Ok(there)) = pair else {
                return crate::skip::skipped("other programs use up the pool of huge pages");
            };
            // One huge page is in use, of which a part holds data; the others stay as they are.
            fill(&here, HUGE + 5..HUGE + 40);
            go(way, &here, &there, || ()).success(&way);
            if kind == "both" {
                let content = way == Way::NoZeros || way == Way::SingleNoZeros;
                assert_eq!(
                    populated(&here),
                    HUGE,
                    "{way:?}: what was never touched is not made at the source"
                );
                assert!(content || populated(&there) == HUGE, "{way:?}: nor at the destination");
            }
            for number in [0, HUGE, HUGE + 5, HUGE + 39, HUGE + 40, 3 * HUGE - 1] {
                assert_eq!(page(&there, number), page(&here, number), "{way:?} {kind} {number}");
            }
        }
    }
    drop(pool);
}
