//! The raw pump: as many threads and sockets as a move has channels, from one memory file into a
//! fresh one. No protocol.
//!
//! It is the physical limit here for that number of threads: what is faster does less than move the
//! bytes.

use std::fs::File;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use multifd_tests::{Failure, Outcome};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion, ReadVolatile, VolatileMemory, WriteVolatile};

use crate::scenario::Transport;

/// One write, and what one lane takes at a time: the pages of one packet.
const CHUNK: usize = 512 << 10;

/// How the bytes get into the new memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Landing {
    /// The socket is read into a buffer, the buffer is written to the file: one more copy, but no
    /// page fault.
    File,
    /// The socket is read into the mapping: a page fault for each page.
    Mapping,
}

/// Moves the whole file `from` into a fresh memory file, and compares.
pub(crate) fn run(from: &Path, lanes: usize, transport: Transport, landing: Landing) -> Outcome<Duration> {
    let source = Memory::map(File::options().read(true).write(true).open(from)?)?;
    let fresh = File::from(memfd_create("pump", MemfdFlags::CLOEXEC)?);
    fresh.set_len(source.len as u64)?;
    let fresh = Memory::map(fresh)?;
    let sockets = (0..lanes).map(|_| connect(transport)).collect::<io::Result<Vec<_>>>()?;
    let begun = Instant::now();
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for (lane, (near, far)) in sockets.into_iter().enumerate() {
            let chunks = (lane * CHUNK..source.len).step_by(lanes * CHUNK);
            let (from, into, to_come) = (&source, &fresh, chunks.clone());
            workers.push(scope.spawn(move || from.send(near, chunks)));
            workers.push(scope.spawn(move || match landing {
                Landing::File => into.receive_to_file(far, to_come),
                Landing::Mapping => into.receive_to_mapping(far, to_come),
            }));
        }
        let join =
            |worker: thread::ScopedJoinHandle<'_, io::Result<()>>| worker.join().map_err(|_| PANICKED.into());
        workers.into_iter().try_for_each(|worker| join(worker).and_then(|moved| moved))
    })?;
    let took = begun.elapsed();
    source.check_equal(&fresh)?;
    Ok(took)
}

/// A memory file, mapped.
struct Memory {
    file: File,
    mapping: MmapRegion<()>,
    len: usize,
}

impl Memory {
    fn map(file: File) -> Outcome<Self> {
        let len = usize::try_from(file.metadata()?.len())?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        // Shared, for reading and writing.
        let mapping = MmapRegion::from_file(offset, len).map_err(|error| Failure::new(error.to_string()))?;
        Ok(Self { file, mapping, len })
    }

    fn send(&self, mut socket: File, chunks: impl Iterator<Item = usize>) -> io::Result<()> {
        for start in chunks {
            let slice =
                self.mapping.get_slice(start, CHUNK.min(self.len - start)).map_err(io::Error::other)?;
            socket.write_all_volatile(&slice).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn receive_to_mapping(&self, mut socket: File, chunks: impl Iterator<Item = usize>) -> io::Result<()> {
        for start in chunks {
            let mut slice =
                self.mapping.get_slice(start, CHUNK.min(self.len - start)).map_err(io::Error::other)?;
            socket.read_exact_volatile(&mut slice).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn receive_to_file(&self, mut socket: File, chunks: impl Iterator<Item = usize>) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for start in chunks {
            buffer.truncate(self.len - start);
            socket.read_exact(&mut buffer)?;
            self.file.write_all_at(&buffer, start as u64)?;
        }
        Ok(())
    }

    fn check_equal(&self, other: &Self) -> Outcome {
        let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
        for start in (0..self.len).step_by(CHUNK) {
            let len = CHUNK.min(self.len - start);
            left.truncate(len);
            right.truncate(len);
            self.file.read_exact_at(&mut left, start as u64)?;
            other.file.read_exact_at(&mut right, start as u64)?;
            if left != right {
                return Err(Failure::new(format!(
                    "the pump moved other bytes than there are, near {start:#x}"
                )));
            }
        }
        Ok(())
    }
}

/// A connected pair, as files: reading and writing is all that is done with them.
fn connect(transport: Transport) -> io::Result<(File, File)> {
    match transport {
        Transport::Tcp => {
            let listener = TcpListener::bind(("127.0.0.1", 0))?;
            let near = TcpStream::connect(listener.local_addr()?)?;
            near.set_nodelay(true)?;
            let (far, _) = listener.accept()?;
            Ok((OwnedFd::from(near).into(), OwnedFd::from(far).into()))
        }
        Transport::Unix => {
            let (near, far) = UnixStream::pair()?;
            Ok((OwnedFd::from(near).into(), OwnedFd::from(far).into()))
        }
    }
}

const PANICKED: io::ErrorKind = io::ErrorKind::Other;
