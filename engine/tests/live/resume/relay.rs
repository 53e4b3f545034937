//! A relay whose connections break as a test says, and that takes the next ones.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use multifd_transports::Endpoint;

/// What becomes of a connection. Numbers count from 0, over all that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Whole,
    /// Both directions break when so many bytes have gone to the destination.
    Cut(u64),
    /// The destination reads so many bytes; then all that are open break.
    CutAll(u64),
    /// The lowest bit of this byte changes on its way to the destination.
    Flip(u64),
}

/// Passes connections on to a destination.
pub(super) struct Relay {
    pub(super) uri: Endpoint,
    shared: Arc<Shared>,
    gone: Arc<AtomicBool>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    plan: Box<dyn Fn(usize) -> Fate + Send + Sync>,
}

#[derive(Default)]
struct State {
    to: String,
    /// Parallel channels of a link. A destination takes none behind the first sync point on main:
    /// main is held back until it has them.
    channels: usize,
    /// Nothing is passed on.
    down: bool,
    /// Those of the source, and where they go on.
    open: Vec<(TcpStream, TcpStream)>,
    /// What a destination may still read from.
    over: Vec<TcpStream>,
    /// Connections that have begun as main, and as channels.
    mains: Vec<usize>,
    joined: Vec<usize>,
    /// Those that the destination has ended.
    ended: Vec<usize>,
    /// Bytes that the source has sent over each connection, and that were passed on.
    passed: Vec<u64>,
    /// What the destinations have said on their return paths.
    said: Vec<u8>,
}

/// Bytes of a source that introduces itself over a new link, before its stream.
const INTRODUCTION: u64 = 53 + 37;

impl Relay {
    /// Of links with so many parallel `channels`.
    pub(super) fn to(
        destination: &Endpoint,
        channels: usize,
        plan: impl Fn(usize) -> Fate + Send + Sync + 'static,
    ) -> Self {
        let state = Mutex::new(State { to: address(destination), channels, ..State::default() });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), plan: Box::new(plan) });
        Self::over(shared)
    }

    /// Another address of the same.
    pub(super) fn another(&self) -> Self {
        Self::over(Arc::clone(&self.shared))
    }

    fn over(shared: Arc<Shared>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let (taken, gone) = (Arc::clone(&shared), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&gone);
        // Ends with the process: a test that is over has no more connections to pass on.
        thread::Builder::new()
            .spawn(move || {
                for source in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    take(source.unwrap(), &taken);
                }
            })
            .unwrap();
        Self { uri, shared, gone }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// Breaks everything that is open.
    pub(super) fn cut(&self) {
        cut(&mut self.state());
    }

    /// The same, and what comes from now on.
    pub(super) fn go_down(&self) {
        let mut state = self.state();
        state.down = true;
        cut(&mut state);
    }

    /// Breaks everything that is open, and does not listen at this address any more: links have a
    /// channel less from now on.
    pub(super) fn end(&self) {
        self.gone.store(true, Ordering::Relaxed);
        // What waits for the next connection sees it.
        let _ = TcpStream::connect(address(&self.uri));
        let mut state = self.state();
        state.channels -= 1;
        cut(&mut state);
    }

    /// Passes connections on again.
    pub(super) fn come_back(&self) {
        self.state().down = false;
    }

    /// Passes on to another destination.
    pub(super) fn turn_to(&self, destination: &Endpoint) {
        self.state().to = address(destination);
    }

    pub(super) fn passed(&self) -> u64 {
        self.state().passed.iter().sum()
    }

    pub(super) fn passed_on(&self, connection: usize) -> u64 {
        self.state().passed[connection]
    }

    pub(super) fn said(&self) -> Vec<u8> {
        self.state().said.clone()
    }
}

pub(super) fn address(endpoint: &Endpoint) -> String {
    let Endpoint::Tcp { host, port } = endpoint else { panic!("a tcp destination") };
    format!("{host}:{port}")
}

/// What has been passed on arrives: the end comes behind it.
fn cut(state: &mut State) {
    for (source, there) in std::mem::take(&mut state.open) {
        let _ = source.shutdown(Shutdown::Both);
        let _ = there.shutdown(Shutdown::Write);
        state.over.push(there);
    }
}

fn take(source: TcpStream, shared: &Arc<Shared>) {
    let mut state = shared.state.lock().unwrap();
    if state.down {
        return;
    }
    // Where nothing listens, this end has nothing behind it either.
    let Ok(there) = TcpStream::connect(&state.to) else { return };
    let number = state.passed.len();
    let fate = (shared.plan)(number);
    state.passed.push(0);
    state.open.push((source.try_clone().unwrap(), there.try_clone().unwrap()));
    drop(state);
    let back = (there.try_clone().unwrap(), source.try_clone().unwrap());
    let (forth, answers) = (Arc::clone(shared), Arc::clone(shared));
    thread::Builder::new().spawn(move || forward(source, there, (number, fate), &forth)).unwrap();
    thread::Builder::new().spawn(move || backward(back.0, back.1, number, &answers)).unwrap();
}

impl Shared {
    /// Main, connection `number`, is held back until its channels are there, those behind `before`,
    /// or another link has begun.
    fn hold(&self, number: usize, before: Option<usize>) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| {
            let channels = state.joined.iter().filter(|channel| Some(**channel) > before).count();
            state.mains.iter().all(|main| *main <= number) && channels < state.channels
        }));
    }

    /// Connection `number` begins so. Main: behind which connection its channels come.
    fn begin(&self, number: usize, first: u8) -> Option<Option<usize>> {
        let mut state = self.state.lock().unwrap();
        // One that introduces itself is answered before channels are dialled; else each of them may
        // be taken before main.
        let before = match first {
            8 => Some(Some(number)),
            b'Q' => Some(state.mains.iter().copied().filter(|main| *main < number).max()),
            _ => None,
        };
        if before.is_some() { &mut state.mains } else { &mut state.joined }.push(number);
        self.changed.notify_all();
        before
    }

    /// Waits until the destination has read all of a connection, and ends it, too.
    fn wait_until_read(&self, number: usize) {
        let state = self.state.lock().unwrap();
        let limit = std::time::Duration::from_secs(10);
        drop(self.changed.wait_timeout_while(state, limit, |state| !state.ended.contains(&number)));
    }

    fn note_end(&self, number: usize) {
        self.state.lock().unwrap().ended.push(number);
        self.changed.notify_all();
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, (number, fate): (usize, Fate), shared: &Shared) {
    let mut buffer = vec![0; 16 << 10];
    // Of main: bytes that go before it is held back.
    let (mut passed, mut introduction) = (0, None);
    loop {
        let mut most = match fate {
            Fate::Cut(after) | Fate::CutAll(after) => (after - passed).min(buffer.len() as u64),
            Fate::Whole | Fate::Flip(_) => buffer.len() as u64,
        };
        if passed == 0 {
            most = 1;
        } else if let Some((introduction, before)) = introduction {
            match u64::checked_sub(introduction, passed).filter(|left| *left > 0) {
                Some(left) => most = most.min(left),
                None => shared.hold(number, before),
            }
        }
        let count = match from.read(&mut buffer[..most as usize]) {
            Ok(count) if count > 0 => count,
            _ => break,
        };
        if passed == 0 {
            let len = if buffer[0] == 8 { INTRODUCTION } else { 0 };
            introduction = shared.begin(number, buffer[0]).map(|before| (len, before));
        }
        if let Fate::Flip(byte) = fate
            && let Some(at) = byte.checked_sub(passed).filter(|at| *at < count as u64)
        {
            buffer[at as usize] ^= 1;
        }
        passed += count as u64;
        shared.state.lock().unwrap().passed[number] += count as u64;
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        match fate {
            Fate::Cut(after) if passed == after => break,
            Fate::CutAll(after) if passed == after => {
                let _ = to.shutdown(Shutdown::Write);
                shared.wait_until_read(number);
                return cut(&mut shared.state.lock().unwrap());
            }
            _ => {}
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn backward(mut from: TcpStream, mut to: TcpStream, number: usize, shared: &Shared) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        shared.state.lock().unwrap().said.extend(&buffer[..count]);
        if count == 0 || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    shared.note_end(number);
    let _ = to.shutdown(Shutdown::Both);
}
