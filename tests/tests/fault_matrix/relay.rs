//! Stands between the two ends, knows where messages end, and does harm at one of these places.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use multifd_tests::peer::{Messages, Stage};
use multifd_tests::{Failure, Outcome};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_linger;

use crate::cell::{End, Kind, Place};

/// How long a hold-up is that both ends must bear.
const HOLD_UP: Duration = Duration::from_millis(120);

/// Longest wait for the rest of a migration to come to a halt.
const ALL_QUIET: Duration = Duration::from_secs(2);

/// How often a thread of the relay looks whether all is over.
const LOOK: Duration = Duration::from_millis(40);

/// How long one end may take to read what the other sent.
const WRITE: Duration = Duration::from_secs(10);

/// What is done to a process.
pub(crate) type Act = Box<dyn Fn() + Send>;

pub(crate) struct Relay {
    uri: String,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

/// What went through.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Messages of each end on each lane.
    pub(crate) messages: BTreeMap<(End, u8), usize>,
    /// The fault was reached.
    pub(crate) struck: bool,
    /// How far the source's main had come, in all that it sent.
    pub(crate) stage: Stage,
    /// The first message of main behind EOF, or a few before it: they come in pieces.
    pub(crate) behind_eof: Option<usize>,
}

struct Shared {
    fault: Option<(Kind, Place)>,
    encrypted: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    seen: Seen,
    act: Option<Act>,
    connections: u8,
    moved: u64,
    over: bool,
}

impl Relay {
    /// Passes on to `uri`. The fault is done once.
    pub(crate) fn to(uri: &str, fault: Option<(Kind, Place)>, encrypted: bool) -> Outcome<Self> {
        let there = uri.strip_prefix("tcp:").ok_or_else(|| Failure::new(format!("{uri} is not tcp")))?;
        let there = there.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let uri = format!("tcp:{}", listener.local_addr()?);
        let shared = Arc::new(Shared { fault, encrypted, state: Mutex::default(), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        let accept = move || accept(&listener, &there, &accepting);
        let accepting = Some(Builder::new().name("relay".to_owned()).spawn(accept)?);
        Ok(Self { uri, shared, accepting })
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// What the fault is to do, if it is done to a process.
    pub(crate) fn act(&self, act: Act) {
        self.shared.lock().act = Some(act);
        self.shared.changed.notify_all();
    }

    /// Does nothing more to a process.
    pub(crate) fn disarm(&self) {
        self.act(Box::new(|| ()));
    }

    /// Ends all connections.
    pub(crate) fn end(mut self) -> Seen {
        self.close();
        self.shared.lock().seen.clone()
    }

    fn close(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.accepting.take() {
            // A panic of its own has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.close();
    }
}

fn accept(listener: &TcpListener, there: &str, shared: &Arc<Shared>) {
    let mut carriers = Vec::new();
    while !shared.lock().over {
        if !readable(listener) {
            continue;
        }
        let Ok((source, _)) = listener.accept() else { break };
        // The other end is not there any more: the source sees its connection end.
        let Ok(destination) = TcpStream::connect(there) else { continue };
        let shared = Arc::clone(shared);
        let carry = move || Connection::new(source, destination, &shared).carry(&shared);
        carriers.extend(Builder::new().name("carrier".to_owned()).spawn(carry));
    }
    carriers.into_iter().for_each(|carrier| drop(carrier.join()));
}

fn readable(socket: &impl std::os::fd::AsFd) -> bool {
    let Ok(look) = Timespec::try_from(LOOK) else { return false };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&look)).is_ok_and(|ready| ready > 0)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end, at most this long.
    fn wait(&self, time: Duration) -> bool {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, time, |state| !state.over);
        waited.map_or(true, |(state, _)| state.over)
    }

    /// Waits until nothing else has moved for a while.
    fn wait_quiet(&self) {
        let deadline = Instant::now() + ALL_QUIET;
        let mut moved = None;
        while Instant::now() < deadline && !self.wait(HOLD_UP) {
            let now = Some(self.lock().moved);
            if std::mem::replace(&mut moved, now) == now {
                break;
            }
        }
    }

    fn strike_process(&self) {
        let state = self.lock();
        let unknown = |state: &mut State| state.act.is_none() && !state.over;
        let waited = self.changed.wait_timeout_while(state, WRITE, unknown);
        if let Ok((mut state, _)) = waited
            && let Some(act) = state.act.take()
        {
            act();
        }
    }
}

/// What becomes of a connection.
#[derive(PartialEq)]
enum Then {
    GoOn,
    End,
    /// No more of this direction.
    Swallow,
}

struct Connection {
    /// From the source, from the destination.
    sockets: [TcpStream; 2],
    messages: [Messages; 2],
    lane: Option<u8>,
    open: [bool; 2],
    swallowed: [bool; 2],
}

impl Connection {
    fn new(source: TcpStream, destination: TcpStream, shared: &Shared) -> Self {
        let messages = match shared.encrypted {
            true => [Messages::encrypted(), Messages::encrypted()],
            false => [Messages::of_source(), Messages::of_destination()],
        };
        let mut state = shared.lock();
        // Which lane it is cannot be seen under TLS: the order of arrival counts.
        let lane = shared.encrypted.then_some(state.connections);
        state.connections += u8::from(shared.encrypted);
        drop(state);
        let sockets = [source, destination];
        for socket in &sockets {
            let _ = socket.set_nodelay(true).and_then(|()| socket.set_write_timeout(Some(WRITE)));
        }
        Self { sockets, messages, lane, open: [true; 2], swallowed: [false; 2] }
    }

    fn carry(mut self, shared: &Shared) {
        while !shared.lock().over && self.open.contains(&true) {
            let ready = self.ready();
            for from in [0, 1] {
                if ready[from] && self.open[from] && self.pass(from, shared).is_err() {
                    self.note_rest(shared);
                    return;
                }
            }
        }
        self.note_rest(shared);
    }

    /// Which ends have something to be read. One that has ended is not asked: it always has.
    fn ready(&self) -> [bool; 2] {
        let mut ready = [false; 2];
        let open: Vec<usize> = (0..2).filter(|from| self.open[*from]).collect();
        let mut polled: Vec<_> =
            open.iter().map(|from| PollFd::new(&self.sockets[*from], PollFlags::IN)).collect();
        if Timespec::try_from(LOOK).is_ok_and(|look| poll(&mut polled, Some(&look)).is_ok()) {
            let events = polled.iter().map(|polled| !polled.revents().is_empty());
            open.iter().zip(events).for_each(|(from, event)| ready[*from] = event);
        }
        ready
    }

    /// One read of an end, and what is in it. An error is the connection's end.
    fn pass(&mut self, from: usize, shared: &Shared) -> io::Result<()> {
        let mut piece = [0; 16 << 10];
        let read = self.sockets[from].read(&mut piece)?;
        if read == 0 {
            self.open[from] = false;
            let _ = self.sockets[1 - from].shutdown(Shutdown::Write);
            return Ok(());
        }
        for message in self.messages[from].push(&piece[..read]) {
            if self.swallowed[from] {
                continue;
            }
            match self.message(from, message, shared)? {
                Then::GoOn => {}
                Then::Swallow => self.swallowed[from] = true,
                Then::End => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        Ok(())
    }

    fn message(&mut self, from: usize, mut message: Vec<u8>, shared: &Shared) -> io::Result<Then> {
        let end = if from == 0 { End::Source } else { End::Destination };
        let mut state = shared.lock();
        let lane = *self.lane.get_or_insert_with(|| match self.messages[0].is_main() {
            Some(false) => {
                state.connections += 1;
                state.connections
            }
            _ => 0,
        });
        let count = state.seen.messages.entry((end, lane)).or_default();
        let index = *count;
        *count += 1;
        state.moved += 1;
        if from == 0 && lane == 0 && self.messages[0].stage() >= Stage::Finished {
            state.seen.behind_eof.get_or_insert(index);
        }
        let here = Place { end, lane, message: index };
        let fault = shared.fault.filter(|(_, place)| *place == here && !state.seen.struck);
        state.seen.struck |= fault.is_some();
        drop(state);
        let then = match fault {
            Some((kind, _)) => self.strike(kind, from, &mut message, shared)?,
            None => Then::GoOn,
        };
        if then == Then::GoOn {
            self.sockets[1 - from].write_all(&message)?;
        }
        Ok(then)
    }

    fn strike(&self, kind: Kind, from: usize, message: &mut Vec<u8>, shared: &Shared) -> io::Result<Then> {
        match kind {
            // The other direction ends when the sockets are closed. With `Both`, reading what has
            // come would not open the window again, and an end that waits for it would hear of
            // the end when the kernel's probes do, after minutes.
            Kind::Cut => self.sockets.iter().try_for_each(|socket| socket.shutdown(Shutdown::Write))?,
            Kind::Reset => {
                for socket in &self.sockets {
                    set_socket_linger(socket, Some(Duration::ZERO))?;
                }
            }
            Kind::HalfClose => {
                self.sockets[1 - from].shutdown(Shutdown::Write)?;
                return Ok(Then::Swallow);
            }
            Kind::Stall => drop(shared.wait(Duration::from_secs(3600))),
            Kind::StallAndGoOn => drop(shared.wait(HOLD_UP)),
            Kind::Reorder => shared.wait_quiet(),
            Kind::Corrupt => message.iter_mut().take(1).for_each(|byte| *byte ^= 0x10),
            Kind::Duplicate => message.extend_from_within(..),
            Kind::Kill | Kind::Stop | Kind::Cancel => shared.strike_process(),
            Kind::DiskFull | Kind::NoDescriptors => {}
        }
        Ok(match kind {
            Kind::Cut | Kind::Reset | Kind::Stall => Then::End,
            _ => Then::GoOn,
        })
    }

    /// How far the source had come, in what was not passed on any more, too.
    fn note_rest(&mut self, shared: &Shared) {
        let mut piece = [0; 16 << 10];
        if self.sockets[0].set_nonblocking(true).is_ok() {
            while let Ok(read @ 1..) = self.sockets[0].read(&mut piece) {
                self.messages[0].push(&piece[..read]);
            }
        }
        let mut state = shared.lock();
        state.seen.stage = state.seen.stage.max(self.messages[0].stage());
    }
}
