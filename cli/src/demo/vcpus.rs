//! The demo's guest at the destination of a post-copy: threads that use its memory while it comes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use multifd_engine::{PAGE, RamBlock};

use super::Result;
use super::content::Random;
use super::destination::hash_of;

/// Threads; each has the pages whose number leaves its own as the remainder.
const VCPUS: usize = 2;

/// Threads that run until all of RAM is here.
pub(super) struct Vcpus {
    threads: Vec<JoinHandle<std::result::Result<Pages, String>>>,
    all_here: Arc<AtomicBool>,
    pages: usize,
}

/// What the guest found in its memory.
pub(super) struct Found {
    /// The hash of each page when the guest saw it first.
    pub(super) hashes: Vec<u64>,
    /// Pages that the guest used before all of them were here.
    pub(super) touched: usize,
}

/// The pages of one thread.
struct Pages {
    /// Their hashes before the guest's first write here.
    first: BTreeMap<usize, u64>,
    touched: usize,
}

impl Vcpus {
    pub(super) fn start(block: &RamBlock) -> Result<Self> {
        let all_here = Arc::new(AtomicBool::new(false));
        let start = |number| {
            let (block, all_here) = (block.clone(), Arc::clone(&all_here));
            let name = format!("vcpu-{number}");
            thread::Builder::new().name(name).spawn(move || run(&block, number, &all_here))
        };
        let threads = (0..VCPUS).map(start).collect::<std::io::Result<_>>()?;
        Ok(Self { threads, all_here, pages: block.pages() })
    }

    /// All of RAM is here: the guest stops, and has a look at the pages that it has not used.
    pub(super) fn stop(self) -> Result<Found> {
        self.all_here.store(true, Ordering::Release);
        let mut found = Found { hashes: vec![0; self.pages], touched: 0 };
        for thread in self.threads {
            let pages = thread.join().map_err(|_| "a thread of the guest panicked")??;
            found.touched += pages.touched;
            for (page, hash) in pages.first {
                *found.hashes.get_mut(page).ok_or("a page behind the end of the guest")? = hash;
            }
        }
        Ok(found)
    }
}

/// Loads a page, and waits for it if it is not here.
fn load(block: &RamBlock, page: usize) -> std::result::Result<u64, String> {
    let mut content = [0; PAGE];
    let slice = block.memory().slice(page * PAGE, PAGE).ok_or("a page behind the end of the guest")?;
    slice.copy_to(&mut content[..]);
    Ok(hash_of(&content))
}

/// Reads and writes one page after the other. What it has written must still be there later: a page
/// that came after it would have undone that.
fn run(block: &RamBlock, number: usize, all_here: &AtomicBool) -> std::result::Result<Pages, String> {
    let own = block.pages().saturating_sub(number).div_ceil(VCPUS);
    let mut random = Random::new(number as u64 + 7);
    let (mut first, mut written) = (BTreeMap::new(), BTreeMap::new());
    let check = |page, now, written: &BTreeMap<usize, u64>| match written.get(&page) {
        Some(before) if *before != now => {
            Err(format!("page {page} has lost what the guest wrote at the destination"))
        }
        _ => Ok(()),
    };
    while own > 0 && !all_here.load(Ordering::Acquire) {
        let page = random.below(own) * VCPUS + number;
        let now = load(block, page)?;
        check(page, now, &written)?;
        first.entry(page).or_insert(now);
        let value = random.next().to_le_bytes();
        let slice =
            block.memory().slice(page * PAGE, value.len()).ok_or("a page behind the end of the guest")?;
        slice.copy_from(&value[..]);
        written.insert(page, load(block, page)?);
    }
    let touched = first.len();
    for page in (number..block.pages()).step_by(VCPUS) {
        let now = load(block, page)?;
        check(page, now, &written)?;
        first.entry(page).or_insert(now);
    }
    Ok(Pages { first, touched })
}
