//! Another process with memory, which follows orders: this test program, started once more.
#![expect(clippy::cast_possible_truncation, reason = "the pages of a test are few")]

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use multifd_engine::HostMemory;
use multifd_engine::vm_memory::mmap::MmapRegionBuilder;
use multifd_engine::vm_memory::{Bytes, MmapRegion};
use rustix::fs::MemfdFlags;

use super::super::super::PAGE;
use super::gaps;

/// 64 MiB, more than eight times the other memory of a test program.
pub(super) const PAGES: u64 = 16 << 10;

/// Environment variable with the kind of memory of the started program.
const KIND: &str = "MULTIFD_TEST_PLAYS_GUEST";

/// Prefix of the guest's answers, which follow output of the test runner.
const ANSWER: &str = "guest:";

pub(super) struct Guest {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    /// `private`: anonymous memory; `shared`: a memfd.
    pub(super) fn start(kind: &str) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "--quiet", "memory::process::tests::guest::plays"]);
        command.env(KIND, kind).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut guest = Self { child, orders, answers: BufReader::new(answers) };
        guest.answer();
        guest
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends an order, and waits for the answer.
    pub(super) fn order(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.answer()
    }

    /// Kills it and waits for it.
    pub(super) fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Resident kilobytes, from another file of the kernel.
    pub(super) fn resident(&self) -> u64 {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).unwrap();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the guest has ended");
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().to_owned();
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Content of a page written with `value`.
pub(super) fn page_of(value: u64, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    bytes[..8].copy_from_slice(&(value << 32 | page).to_ne_bytes());
    bytes[2048..2056].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// Not a test: the other process.
#[test]
fn plays() {
    let Ok(kind) = env::var(KIND) else { return };
    // So that a touched page is one page.
    rustix::thread::disable_transparent_huge_pages(true).unwrap();
    let len = PAGES as usize * PAGE;
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len as u64).unwrap();
    // The kernel lays mappings side by side, downwards, and makes one of those that are alike:
    // these are not.
    let fence =
        || MmapRegionBuilder::<()>::new(len).with_mmap_prot(libc::PROT_NONE).with_mmap_flags(PRIVATE).build();
    let above = fence().unwrap();
    let memory = match kind.as_str() {
        "private" => HostMemory::anonymous(len).unwrap(),
        _ => HostMemory::map_file(file.try_clone().unwrap(), len).unwrap(),
    };
    let below = fence().unwrap();
    let mut player = Player { memory, file, racer: None, _fences: [above, below] };
    println!("{ANSWER} ready");
    for order in std::io::stdin().lines() {
        let answer = player.obey(&order.unwrap());
        println!("{ANSWER} {answer}");
    }
    // The output of the test runner is not read.
    std::process::exit(0);
}

struct Player {
    memory: HostMemory,
    file: File,
    racer: Option<gaps::Racer>,
    _fences: [MmapRegion; 2],
}

const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Player {
    fn obey(&mut self, order: &str) -> String {
        let mut words = order.split(' ');
        let verb = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let pages = || numbers[0]..numbers[0] + numbers[1];
        match verb {
            "write" => pages().for_each(|page| {
                self.memory.slice(page as usize * PAGE, PAGE).unwrap().copy_from(&page_of(numbers[2], page));
            }),
            // Into the file, past the mapping: not in this process's page table.
            "store" => pages().for_each(|page| {
                use std::os::unix::fs::FileExt;
                self.file.write_all_at(&page_of(numbers[2], page), page * PAGE as u64).unwrap();
            }),
            "look" => pages().for_each(|page| {
                _ = self.memory.slice(page as usize * PAGE, 8).unwrap().read_obj::<u64>(0).unwrap();
            }),
            "drop" => discard(&self.memory, numbers[0] as usize * PAGE, numbers[1] as usize * PAGE),
            "race" => self.racer = Some(gaps::Racer::start(self.memory.clone())),
            "lap" => return self.racer.as_ref().unwrap().lap().to_string(),
            "blocks" => {
                use std::os::unix::fs::MetadataExt;
                return self.file.metadata().unwrap().blocks().to_string();
            }
            other => panic!("{other}"),
        }
        "done".to_owned()
    }
}

#[expect(unsafe_code, reason = "there is no safe way to free pages")]
pub(super) fn discard(memory: &HostMemory, offset: usize, len: usize) {
    let slice = memory.slice(offset, len).unwrap();
    // SAFETY: the range lies in memory that is mapped, and that is only read and written by
    // volatile accesses.
    let done = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), len, libc::MADV_DONTNEED) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
