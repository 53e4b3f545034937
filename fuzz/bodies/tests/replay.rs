//! The corpora of the fuzz targets on stable Rust: each file, and some thousand alterations of them
//! by number. It finds what has been found before, and what lies close by; libFuzzer finds the rest
//! (fuzz/README.md).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "test code may panic")]

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use std::{env, fs, process, thread};

use multifd_fuzz::{Body, TARGETS};

/// Nothing takes a thousandth of it on an idle machine.
const HANGS: Duration = Duration::from_secs(60);

/// Memory of the whole process. The largest guest of a target has 8 MiB.
const MAX_MEMORY_KIB: u64 = 512 << 10;

#[test]
fn channels() {
    replay("channels", 400);
}

#[test]
fn destination() {
    replay("destination", 2000);
}

#[test]
fn lz4() {
    replay("lz4", 20_000);
}

#[test]
fn postcopy() {
    replay("postcopy", 400);
}

#[test]
fn recording() {
    replay("recording", 1500);
}

#[test]
fn streams() {
    replay("streams", 1000);
}

#[test]
fn tls() {
    replay("tls", 5000);
}

#[test]
fn vmstate() {
    replay("vmstate", 1000);
}

#[test]
fn wire() {
    replay("wire", 20_000);
}

#[test]
fn xbzrle() {
    replay("xbzrle", 50_000);
}

#[test]
fn zlib() {
    replay("zlib", 10_000);
}

#[test]
fn zstd() {
    replay("zstd", 10_000);
}

/// What alterations begin with gets as far as it can.
#[test]
fn whole_streams_of_the_corpora_are_received() {
    let whole = |target: &str, body: fn(&[u8], Duration) -> bool| {
        corpus(target)
            .into_iter()
            .filter(|(_, bytes)| body(bytes, HANGS))
            .map(|(name, _)| name)
            .collect::<Vec<_>>()
    };
    let [none, zlib, zstd] = ["none", "zlib", "zstd"].map(str::to_owned);
    let there = whole("channels", multifd_fuzz::channels);
    assert!([none, zlib, zstd].iter().all(|name| there.contains(name)), "{there:?}");
    let [plain, mapped, microvm] = ["plain", "mapped-ram", "microvm"].map(str::to_owned);
    let there = whole("destination", multifd_fuzz::destination);
    assert!([&plain, &microvm].iter().all(|name| there.contains(name)), "{there:?}");
    let there = whole("recording", multifd_fuzz::recording);
    assert!([plain, mapped, microvm].iter().all(|name| there.contains(name)), "{there:?}");
}

#[test]
fn corpora_are_small() {
    let mut total = 0;
    for (target, _) in TARGETS {
        for (name, bytes) in corpus(target) {
            assert!(bytes.len() < 64 << 10, "{target}/{name}: {} bytes", bytes.len());
            total += bytes.len();
        }
    }
    assert!(total < 1 << 20, "{total} bytes");
}

/// Runs `alterations` of a target's files, or as many as the environment says.
fn replay(target: &str, alterations: u64) {
    let (_, body) = TARGETS.into_iter().find(|(name, _)| *name == target).unwrap();
    let corpus = corpus(target);
    let more = env::var("MULTIFD_FUZZ_ALTERATIONS").ok().map(|count| count.parse().unwrap());
    thread::scope(|scope| {
        let (begin, begun) = channel::<String>();
        // A hang is no failure that a test could return.
        scope.spawn(move || {
            let mut last = String::new();
            loop {
                match begun.recv_timeout(HANGS) {
                    Ok(name) => last = name,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        eprintln!("{target}, {last}: not done after {HANGS:?}");
                        process::abort();
                    }
                }
            }
        });
        let run = |name: String, bytes: &[u8]| {
            begin.send(name.clone()).unwrap();
            run(body, target, &name, bytes);
        };
        for (name, bytes) in &corpus {
            run(name.clone(), bytes);
        }
        for number in 0..more.unwrap_or(alterations) {
            let (name, bytes) = altered(&corpus, number);
            run(format!("alteration {number} of {name}"), &bytes);
        }
        drop(begin);
    });
    let used = peak_memory_kib();
    assert!(used < MAX_MEMORY_KIB, "{used} KiB of memory");
}

/// What is told of a failure leads to its input.
fn run(body: Body, target: &str, name: &str, bytes: &[u8]) {
    struct Note<'a>(&'a str, &'a str, &'a [u8]);
    impl Drop for Note<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                let Self(target, name, bytes) = *self;
                let path = env::temp_dir().join(format!("multifd-fuzz-{target}"));
                let kept = fs::write(&path, bytes).map(|()| path);
                eprintln!("{target}, {name}: {} bytes, {kept:?}", bytes.len());
            }
        }
    }
    let _note = Note(target, name, bytes);
    body(bytes);
}

/// The files of a target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let read = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
    };
    let mut files: Vec<_> = files.map(read).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no corpus");
    files
}

/// One of the files, altered in one to four places; the same for the same number.
fn altered(corpus: &[(String, Vec<u8>)], number: u64) -> (&str, Vec<u8>) {
    const EXTREMES: [u8; 8] = [0x00, 0xff, 0x7f, 0x80, 0x01, 0x04, 0x06, 0x7e];
    let mut random = Random(number);
    let (name, bytes) = &corpus[random.below(corpus.len())];
    let mut bytes = bytes.clone();
    for _ in 0..=random.below(4) {
        // Half of the places are where the headers are.
        let reach = if random.below(2) == 0 { bytes.len() } else { bytes.len().min(256) };
        let at = random.below(reach);
        let end = bytes.len().min(at + 1 + random.below(8));
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => bytes.extend_from_within(at..end),
            3 => bytes[at..end].fill(EXTREMES[random.below(EXTREMES.len())]),
            4 => bytes.insert(at, EXTREMES[random.below(EXTREMES.len())]),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
        }
    }
    (name, bytes)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit.max(1) as u64).unwrap()
    }
}

/// `VmHWM` of this process.
fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
