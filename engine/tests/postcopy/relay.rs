//! Passes connections on, and cuts them.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "test code may panic")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::Builder;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);

/// The answer that says that the devices of a post-copy are loaded: PONG(0x42).
const LOADED: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 0x42];

/// Passes everything on, both ways, until it is told to cut.
pub(crate) struct Relay {
    at: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    links: Mutex<Vec<Link>>,
    changed: Condvar,
    /// Bytes of the source after which each connection is cut by itself; those behind the last are
    /// not.
    limits: Vec<Option<u64>>,
}

/// One connection of the source, in the order in which they came.
struct Link {
    ends: [TcpStream; 2],
    /// Bytes of the source.
    sent: u64,
    /// What the destination has said.
    said: Vec<u8>,
}

impl Relay {
    /// Passes on to a destination at this address.
    pub(crate) fn to(there: SocketAddr, limits: &[Option<u64>]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let (links, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { links, changed, limits: limits.to_vec() });
        let all = Arc::clone(&shared);
        // Ends with the process: a test that is over has no more connections to pass on.
        let accepting = Builder::new().spawn(move || {
            // One that the destination does not take is closed again.
            for source in listener.incoming().flatten() {
                if let Ok(destination) = TcpStream::connect(there) {
                    all.pass(source, destination);
                }
            }
        });
        drop(accepting.unwrap());
        Self { at, shared }
    }

    pub(crate) fn uri(&self) -> String {
        format!("tcp:{}", self.at)
    }

    /// Cuts a connection, in both directions.
    pub(crate) fn cut(&self, number: usize) {
        cut(&self.shared.lock()[number].ends);
    }

    /// Waits until the source has sent so many bytes on this connection.
    pub(crate) fn wait_sent(&self, number: usize, bytes: u64) {
        self.wait(|links| links.get(number).is_some_and(|link| link.sent >= bytes));
    }

    /// Waits until the source was told that the devices are loaded.
    pub(crate) fn wait_loaded(&self) {
        self.wait(|links| {
            links.first().is_some_and(|link| link.said.windows(LOADED.len()).any(|said| said == LOADED))
        });
    }

    fn wait(&self, done: impl Fn(&[Link]) -> bool) {
        let deadline = Instant::now() + SOON;
        let mut links = self.shared.lock();
        while !done(&links) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing came through in {SOON:?}");
            links = self.shared.changed.wait_timeout(links, left).unwrap().0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().unwrap()
    }

    fn pass(self: &Arc<Self>, source: TcpStream, destination: TcpStream) {
        let ends = [&source, &destination].map(|end| end.try_clone().unwrap());
        let number = {
            let mut links = self.lock();
            links.push(Link { ends, sent: 0, said: Vec::new() });
            links.len() - 1
        };
        let limit = self.limits.get(number).copied().flatten().unwrap_or(u64::MAX);
        let pair = [&destination, &source].map(|end| end.try_clone().unwrap());
        let there = Arc::clone(self);
        let back = Arc::clone(self);
        let [to, from] = pair;
        drop(Builder::new().spawn(move || there.there(number, source, to, limit)).unwrap());
        drop(Builder::new().spawn(move || back.back(number, destination, from)).unwrap());
    }

    fn there(&self, number: usize, mut from: TcpStream, mut to: TcpStream, limit: u64) {
        let mut buffer = vec![0; 16 << 10];
        let mut left = limit;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let count = count.min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= count as u64;
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
            self.lock()[number].sent += count as u64;
            self.changed.notify_all();
            if left == 0 {
                cut(&[from, to]);
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    fn back(&self, number: usize, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
            self.lock()[number].said.extend_from_slice(&buffer[..count]);
            self.changed.notify_all();
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}

fn cut(ends: &[TcpStream; 2]) {
    for end in ends {
        // It may have ended by itself.
        let _ = end.shutdown(Shutdown::Both);
    }
}
