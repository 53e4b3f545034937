//! Costs of the parts of a move on this machine: sockets, and memory not yet populated.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use multifd_codecs::MAX_BATCH_LEN;
use multifd_engine::HostMemory;
use rustix::fs::{MemfdFlags, memfd_create};

use super::error::{Error, Result};
use super::findings::Machine;
use super::measure::core_time;
use super::memory::PAGE;
use super::sample::Sample;

/// Bytes that each lane moves for a measurement: some 25 ms, and more than a core's caches hold.
const LANE_BYTES: usize = 32 << 20;

/// Most pairs of a sender and a receiver. All cores are to be busy, as in a move; more lanes would
/// add little, and take more than 256 MiB of memory at once from a host that may have none to
/// spare.
const MOST_LANES: usize = 4;

/// Repetitions of each measurement, whose median counts.
const TIMES: usize = 3;

/// Measures with pages of the sample, on all cores at once: they share caches and memory in a move,
/// too.
pub(super) fn measure(sample: &Sample, cores: usize) -> Result<Machine> {
    let pages = Pages::of(sample);
    let lanes = (cores / 2).clamp(1, MOST_LANES);
    let moved = (lanes * LANE_BYTES) as f64;
    let socket = times(|| sockets(&pages, lanes));
    let socket = socket.map_err(|source| Error::Machine { part: "sockets", source })?;
    let memory = |part, work: Work| -> Result<f64> {
        let found = times(|| side_by_side(2 * lanes, || work(&pages)));
        let found = found.map_err(|source| Error::Machine { part, source })?;
        Ok(median(found).as_secs_f64() / (2.0 * moved))
    };
    Ok(Machine {
        cores,
        send_byte_s: median(socket.map(|(send, _)| send)).as_secs_f64() / moved,
        receive_byte_s: median(socket.map(|(_, receive)| receive)).as_secs_f64() / moved,
        look_byte_s: memory("reads of mapped memory", look)?,
        land_byte_s: memory("writes to a file in memory", land)?,
        fault_byte_s: memory("page faults", fault)?,
        touch_byte_s: memory("reads of new memory", touch)?,
    })
}

fn times<T>(mut measure: impl FnMut() -> std::io::Result<T>) -> std::io::Result<[T; TIMES]> {
    Ok([measure()?, measure()?, measure()?])
}

fn median([a, b, c]: [Duration; TIMES]) -> Duration {
    a.min(b).max(a.max(b).min(c))
}

/// Batches of the sample, repeated up to [`LANE_BYTES`].
struct Pages<'s>(Vec<&'s [u8]>);

/// A measurement in memory of its own, which gives the time on a core.
type Work = fn(&Pages<'_>) -> std::io::Result<Duration>;

impl<'s> Pages<'s> {
    fn of(sample: &'s Sample) -> Self {
        let batches = sample.runs.iter().flat_map(|run| &run.batches);
        let mut left = LANE_BYTES;
        let take = |batch: &'s Vec<u8>| {
            let part = batch.get(..batch.len().min(left)).filter(|part| !part.is_empty());
            left -= part.map_or(0, <[u8]>::len);
            part
        };
        Self(batches.cycle().map_while(take).collect())
    }

    /// The batches, each with its offset.
    fn placed(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let place = |at: &mut usize, batch: &&'s [u8]| {
            let start = *at;
            *at += batch.len();
            Some((start, *batch))
        };
        self.0.iter().scan(0, place)
    }
}

/// Time on cores to send and to receive, over all lanes.
fn sockets(pages: &Pages<'_>, lanes: usize) -> std::io::Result<(Duration, Duration)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let pair = || -> std::io::Result<(TcpStream, TcpStream)> {
        let near = TcpStream::connect(listener.local_addr()?)?;
        // Another process on this machine may connect first.
        loop {
            let (far, peer) = listener.accept()?;
            if peer == near.local_addr()? {
                return Ok((near, far));
            }
        }
    };
    let pairs = (0..lanes).map(|_| pair()).collect::<std::io::Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let mut ends = Vec::new();
        for (near, far) in pairs {
            ends.push((scope.spawn(|| send(pages, near)), scope.spawn(|| receive(pages, far))));
        }
        let mut sums = (Duration::ZERO, Duration::ZERO);
        for (near, far) in ends {
            sums.0 += joined(near)?;
            sums.1 += joined(far)?;
        }
        Ok(sums)
    })
}

fn send(pages: &Pages<'_>, mut socket: TcpStream) -> std::io::Result<Duration> {
    let begin = core_time();
    pages.0.iter().try_for_each(|batch| socket.write_all(batch))?;
    Ok(core_time().saturating_sub(begin))
}

fn receive(pages: &Pages<'_>, mut socket: TcpStream) -> std::io::Result<Duration> {
    let mut buffer = vec![0; MAX_BATCH_LEN];
    let begin = core_time();
    for batch in &pages.0 {
        if let Some(room) = buffer.get_mut(..batch.len()) {
            socket.read_exact(room)?;
        }
    }
    Ok(core_time().saturating_sub(begin))
}

/// Writes of whole pages to an empty file in memory, as multifd's destination does.
fn land(pages: &Pages<'_>) -> std::io::Result<Duration> {
    let file = new_memory()?;
    let begin = core_time();
    pages.placed().try_for_each(|(at, batch)| file.write_all_at(batch, at as u64))?;
    Ok(core_time().saturating_sub(begin))
}

/// The same stores through a mapping.
fn fault(pages: &Pages<'_>) -> std::io::Result<Duration> {
    let memory = HostMemory::map_file(new_memory()?, LANE_BYTES)?;
    let begin = core_time();
    for (at, batch) in pages.placed() {
        if let Some(room) = memory.slice(at, batch.len()) {
            room.copy_from(batch);
        }
    }
    Ok(core_time().saturating_sub(begin))
}

/// The first bytes of each page, of a populated file that is not yet in this process's page table.
fn look(pages: &Pages<'_>) -> std::io::Result<Duration> {
    let file = new_memory()?;
    pages.placed().try_for_each(|(at, batch)| file.write_all_at(batch, at as u64))?;
    // The first bytes tell most pages from zero pages.
    look_at::<64>(file)
}

/// All bytes of each page of an empty file: each read allocates a page.
fn touch(_: &Pages<'_>) -> std::io::Result<Duration> {
    look_at::<PAGE>(new_memory()?)
}

fn look_at<const LEN: usize>(file: File) -> std::io::Result<Duration> {
    let memory = HostMemory::map_file(file, LANE_BYTES)?;
    let mut look = [0; LEN];
    let begin = core_time();
    for at in (0..LANE_BYTES).step_by(PAGE) {
        if let Some(page) = memory.slice(at, look.len()) {
            page.copy_to(&mut look);
        }
    }
    Ok(core_time().saturating_sub(begin))
}

fn new_memory() -> std::io::Result<File> {
    let file = File::from(memfd_create("multifd-tune", MemfdFlags::CLOEXEC)?);
    file.set_len(LANE_BYTES as u64)?;
    Ok(file)
}

/// The sum of the times of `threads` threads that do the same work at once.
fn side_by_side(
    threads: usize,
    work: impl Fn() -> std::io::Result<Duration> + Sync,
) -> std::io::Result<Duration> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(joined).sum()
    })
}

fn joined(thread: thread::ScopedJoinHandle<'_, std::io::Result<Duration>>) -> std::io::Result<Duration> {
    thread.join().map_err(|_| std::io::Error::other("a measuring thread panicked"))?
}
