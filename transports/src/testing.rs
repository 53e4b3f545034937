//! Waiting in tests: on events, with a deadline.

use std::fs;
use std::sync::mpsc;
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Longest wait for anything that must happen: generous, for a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// A thread whose result is waited for no longer than [`LONG`], so that a hang is a failure.
pub(crate) struct Spawned<T> {
    name: String,
    result: mpsc::Receiver<T>,
    thread: JoinHandle<()>,
}

/// `name` is at most 15 bytes and the test's own: [`Spawned::until_asleep`] finds the thread by it.
pub(crate) fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Spawned<T> {
    assert!(name.len() <= 15, "the kernel cuts {name}");
    let (sender, result) = mpsc::channel();
    let thread = Builder::new().name(name.to_owned()).spawn(move || drop(sender.send(body()))).unwrap();
    Spawned { name: name.to_owned(), result, thread }
}

impl<T> Spawned<T> {
    pub(crate) fn join(self) -> T {
        match self.result.recv_timeout(LONG) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("{} hangs", self.name),
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{}: {:?}", self.name, self.thread.join()),
        }
    }

    /// Waits until the thread is blocked in the kernel.
    pub(crate) fn until_asleep(&self) {
        let begun = Instant::now();
        while state_of(&self.name) != Some('S') {
            assert!(begun.elapsed() < LONG, "{} runs on and on", self.name);
            thread::yield_now();
        }
    }
}

/// The state letter of this process's thread of that name.
fn state_of(name: &str) -> Option<char> {
    fs::read_dir("/proc/self/task").unwrap().flatten().find_map(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let (head, tail) = stat.rsplit_once(") ")?;
        head.ends_with(&format!("({name}")).then(|| tail.chars().next())?
    })
}
