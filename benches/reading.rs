//! Ways to read guest memory once in which a fault is an error and not a signal, against a plain
//! copy: batches of 128 pages of a memfd that is populated and mapped, and larger than the caches.
#![expect(unsafe_code, reason = "the system calls that are compared have no safe wrapper")]

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use multifd_benches::content::PAGE;
use multifd_engine::HostMemory;
use multifd_engine::unstable::{PageQuery, PageRun};

const BATCH: usize = 128 * PAGE;
const LEN: usize = 256 << 20;

struct Guest {
    memory: HostMemory,
    file: File,
    pagemap: File,
    maps: File,
    own_memory: File,
    next: usize,
    into: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor that nothing else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(LEN as u64).expect("a length");
        let memory = HostMemory::map_file(file.try_clone().expect("a descriptor"), LEN).expect("a mapping");
        for at in (0..LEN).step_by(PAGE) {
            memory.slice(at, PAGE).expect("inside").copy_from(&[at as u8 | 1; PAGE]);
        }
        let open = |path| File::open(path).expect("/proc");
        Self {
            memory,
            file,
            pagemap: open("/proc/self/pagemap"),
            maps: open("/proc/self/maps"),
            own_memory: open("/proc/self/mem"),
            next: 0,
            into: vec![0; BATCH],
        }
    }

    /// Offset and address of the next batch.
    fn batch(&mut self) -> (usize, *mut u8) {
        let at = self.next;
        self.next = (at + BATCH) % LEN;
        (at, self.memory.slice(at, BATCH).expect("inside").ptr_guard_mut().as_ptr())
    }

    fn copy(&mut self, from: *const u8) {
        // SAFETY: a batch of the mapping, which nothing writes to, and a buffer of that length.
        unsafe { std::ptr::copy_nonoverlapping(from, self.into.as_mut_ptr(), BATCH) };
        black_box(&self.into);
    }

    /// By the kernel, in `ranges` pieces.
    fn process_vm_readv(&mut self, ranges: usize) {
        let (_, from) = self.batch();
        let len = BATCH / ranges;
        let remote: Vec<_> = (0..ranges)
            .map(|piece| libc::iovec { iov_base: from.wrapping_add(piece * len).cast(), iov_len: len })
            .collect();
        let local = libc::iovec { iov_base: self.into.as_mut_ptr().cast(), iov_len: BATCH };
        // SAFETY: takes no pointer.
        let process = unsafe { libc::getpid() };
        // SAFETY: `local` is a buffer of ours; a fault in what is read is an error.
        let read = unsafe {
            libc::process_vm_readv(process, &raw const local, 1, remote.as_ptr(), ranges as u64, 0)
        };
        assert_eq!(read, BATCH as isize);
    }

    /// What the engine asks the page table, and how the mapping is protected.
    fn look(&self, from: *const u8) {
        let held = PageQuery {
            all: PageQuery::ZERO,
            any: PageQuery::PRESENT | PageQuery::SWAPPED,
            inverted: PageQuery::ZERO,
            told: PageQuery::PRESENT,
        };
        let start = from as u64;
        let mut runs = [PageRun::default(); 32];
        held.scan(&self.pagemap, start..start + BATCH as u64, &mut runs).expect("Linux 6.7");
        // struct procmap_query: its size, which mappings, the address.
        let mut query = [0_u64; 13];
        [query[0], query[1], query[2]] = [size_of::<[u64; 13]>() as u64, 1, start];
        // SAFETY: the request reads and writes a structure of the size given.
        let done = unsafe { libc::ioctl(self.maps.as_raw_fd(), 0xc068_6611, query.as_mut_ptr()) };
        assert!(done == 0, "{}: Linux 6.11 is needed", io::Error::last_os_error());
    }
}

fn reading(c: &mut Criterion) {
    let mut guest = Guest::new();
    let mut group = c.benchmark_group("reading");
    group.throughput(Throughput::Bytes(BATCH as u64)).sample_size(50);
    group.bench_function("plain copy", |b| {
        b.iter(|| {
            let (_, from) = guest.batch();
            guest.copy(from);
        });
    });
    group.bench_function("look at the page table, then copy", |b| {
        b.iter(|| {
            let (_, from) = guest.batch();
            guest.look(from);
            guest.copy(from);
        });
    });
    group.bench_function("MADV_POPULATE_READ, then copy", |b| {
        b.iter(|| {
            let (_, from) = guest.batch();
            // SAFETY: the range is mapped; its content stays as it is.
            let done = unsafe { libc::madvise(from.cast(), BATCH, libc::MADV_POPULATE_READ) };
            assert_eq!(done, 0);
            guest.copy(from);
        });
    });
    for ranges in [1, 128] {
        group.bench_function(format!("process_vm_readv, {ranges} ranges"), |b| {
            b.iter(|| guest.process_vm_readv(ranges));
        });
    }
    group.bench_function("read of /proc/self/mem", |b| {
        b.iter(|| {
            let (_, from) = guest.batch();
            guest.own_memory.read_exact_at(&mut guest.into, from as u64).expect("memory");
        });
    });
    group.bench_function("read of the file", |b| {
        b.iter(|| {
            let (at, _) = guest.batch();
            guest.file.read_exact_at(&mut guest.into, at as u64).expect("the file");
        });
    });
    group.finish();
}

criterion_group!(benches, reading);
criterion_main!(benches);
