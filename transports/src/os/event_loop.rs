//! Waiting for many descriptors and times on the caller's thread: futures over poll(2).
//!
//! ```text
//!  block_on: poll the future ── ready ──> done
//!      ^        | pending: each future below has noted what it waits for
//!      |        v
//!      +── poll(2) over all of that, until the first time noted
//! ```
//!
//! There are no wakers: after each poll(2) everything is polled again, and what is not ready notes
//! the same as before. With the few hundred descriptors of a listener that costs less than it would
//! to keep account of who is to be woken, and nothing needs a thread or a runtime. Only futures of
//! this module may be awaited in it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// What the futures of one turn wait for.
#[derive(Default)]
struct Waits {
    /// `Weak`: the future that noted it may be dropped in the same turn, and then the descriptor
    /// must close at once.
    descriptors: Vec<(Weak<dyn AsFd>, PollFlags)>,
    /// The first of the times.
    deadline: Option<Instant>,
}

thread_local! {
    static WAITS: RefCell<Waits> = RefCell::default();
}

/// Runs a future of this module to its end, on this thread.
///
/// # Errors
/// The system's error, when it cannot wait.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        // A callback may come here again, and has its own.
        let outer = WAITS.take();
        let polled = future.as_mut().poll(&mut context);
        let waits = WAITS.replace(outer);
        match polled {
            Poll::Ready(output) => return Ok(output),
            Poll::Pending => waits.wait()?,
        }
    }
}

impl Waits {
    fn wait(&self) -> io::Result<()> {
        let open = self.descriptors.iter().filter_map(|(fd, flags)| Some((fd.upgrade()?, *flags)));
        let open: Vec<_> = open.collect();
        // Each once: what was polled several times in a turn has noted the same several times, and
        // the kernel takes no more entries than a process may have descriptors.
        let mut once = BTreeMap::new();
        for (fd, flags) in &open {
            let fd = fd.as_fd();
            once.entry(fd.as_raw_fd()).or_insert((fd, PollFlags::empty())).1 |= *flags;
        }
        let mut fds: Vec<_> =
            once.into_values().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // A time too long for the kernel counts as none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn note_descriptor<F: AsFd + 'static>(descriptor: &Arc<F>, flags: PollFlags) {
    let descriptor: Weak<F> = Arc::downgrade(descriptor);
    WAITS.with_borrow_mut(|waits| waits.descriptors.push((descriptor, flags)));
}

fn note_time(time: Instant) {
    WAITS
        .with_borrow_mut(|waits| waits.deadline = Some(waits.deadline.map_or(time, |first| first.min(time))));
}

/// Makes a call that does not block, again and again until it is neither `WouldBlock` nor
/// `Interrupted`.
pub(crate) async fn when_ready<F: AsFd + 'static, T>(
    descriptor: &Arc<F>,
    flags: PollFlags,
    mut call: impl FnMut(&F) -> io::Result<T>,
) -> io::Result<T> {
    poll_fn(|_| {
        loop {
            match call(descriptor) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    note_descriptor(descriptor, flags);
                    return Poll::Pending;
                }
                outcome => return Poll::Ready(outcome),
            }
        }
    })
    .await
}

/// Waits until a descriptor is ready, or broken.
pub(crate) async fn ready<F: AsFd + 'static>(descriptor: &Arc<F>, flags: PollFlags) -> io::Result<()> {
    let look = |descriptor: &F| {
        let mut fds = [PollFd::new(descriptor, flags)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
            0 => Err(ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    };
    when_ready(descriptor, flags, look).await
}

/// Waits until `time`.
pub(crate) async fn sleep_until(time: Instant) {
    poll_fn(|_| {
        if Instant::now() >= time {
            return Poll::Ready(());
        }
        note_time(time);
        Poll::Pending
    })
    .await;
}

/// What `work` comes to; `None` when `limit` has passed before.
pub(crate) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    // A time beyond the clock's range counts as none.
    let Some(end) = Instant::now().checked_add(limit) else { return Some(work.await) };
    match first(work, sleep_until(end)).await {
        First::One(output) => Some(output),
        First::Other(()) => None,
    }
}

/// Which of two futures was first.
pub(crate) enum First<A, B> {
    One(A),
    Other(B),
}

/// Waits for the first of two. `one` comes first if both are ready.
pub(crate) async fn first<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> First<A, B> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| match one.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(First::One(output)),
        Poll::Pending => other.as_mut().poll(context).map(First::Other),
    })
    .await
}

/// Futures that go on side by side, whenever [`next`](Self::next) or [`turn`](Self::turn) is
/// awaited.
pub(crate) struct Tasks<T>(Vec<Task<T>>);

struct Task<T> {
    future: Pin<Box<dyn Future<Output = T>>>,
    state: Rc<Cell<State>>,
    output: Option<T>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Aborted,
    Finished,
    Running,
}

/// One of the [`Tasks`].
pub(crate) struct TaskHandle(Rc<Cell<State>>);

impl TaskHandle {
    /// Drops the task, at the next turn. It will have no output.
    pub(crate) fn abort(&self) {
        self.0.set(State::Aborted);
    }

    /// Whether it has an output that [`Tasks::next`] has not given yet, or has given.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.get() == State::Finished
    }
}

impl<T> Tasks<T> {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// True if there is none that could still finish, or has finished and was not given.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|task| task.state.get() == State::Aborted)
    }

    pub(crate) fn spawn(&mut self, future: impl Future<Output = T> + 'static) -> TaskHandle {
        let state = Rc::new(Cell::new(State::Running));
        self.0.push(Task { future: Box::pin(future), state: Rc::clone(&state), output: None });
        TaskHandle(state)
    }

    /// The output of the next that has finished. Never ready while there is none.
    pub(crate) async fn next(&mut self) -> T {
        poll_fn(|context| {
            self.poll_all(context);
            let finished = self.0.iter().position(|task| task.output.is_some());
            match finished.and_then(|index| self.0.remove(index).output) {
                Some(output) => Poll::Ready(output),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Lets each go on as far as it can without waiting.
    pub(crate) async fn turn(&mut self) {
        poll_fn(|context| {
            self.poll_all(context);
            Poll::Ready(())
        })
        .await;
    }

    fn poll_all(&mut self, context: &mut Context<'_>) {
        self.0.retain(|task| task.state.get() != State::Aborted);
        for task in self.0.iter_mut().filter(|task| task.state.get() == State::Running) {
            if let Poll::Ready(output) = task.future.as_mut().poll(context) {
                task.state.set(State::Finished);
                task.output = Some(output);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::testing::LONG;

    fn pair() -> (Arc<UnixStream>, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        one.set_nonblocking(true).unwrap();
        (Arc::new(one), other)
    }

    async fn byte(socket: &Arc<UnixStream>) -> u8 {
        let mut byte = [0];
        when_ready(socket, PollFlags::IN, |mut socket| socket.read(&mut byte)).await.unwrap();
        byte[0]
    }

    /// poll(2) takes no more entries than a process may have descriptors.
    #[test]
    fn what_is_polled_again_and_again_in_one_turn_is_waited_for_once() {
        let (end, mut peer) = pair();
        let mut tasks = Tasks::new();
        tasks.spawn(async move { byte(&end).await });
        let output = block_on(async {
            for _ in 0..100_000 {
                tasks.turn().await;
            }
            let wait = first(sleep_until(Instant::now() + Duration::from_millis(1)), tasks.next());
            assert!(matches!(wait.await, First::One(())));
            peer.write_all(b"x").unwrap();
            tasks.next().await
        });
        assert_eq!(output.unwrap(), b'x');
    }

    #[test]
    fn tasks_come_in_the_order_in_which_they_finish_and_an_aborted_one_never() {
        let (ends, mut peers): (Vec<_>, Vec<_>) = (0..3).map(|_| pair()).unzip();
        let mut tasks = Tasks::new();
        let handles: Vec<_> =
            ends.into_iter().map(|end| tasks.spawn(async move { byte(&end).await })).collect();
        block_on(async {
            tasks.turn().await;
            assert!(handles.iter().all(|handle| !handle.is_finished()));
            peers[2].write_all(b"2").unwrap();
            assert_eq!(tasks.next().await, b'2');
            assert!(handles[2].is_finished() && !handles[0].is_finished());
            handles[0].abort();
            peers[0].write_all(b"0").unwrap();
            peers[1].write_all(b"1").unwrap();
            assert_eq!(tasks.next().await, b'1');
            // The task is gone, and with it its end.
            assert_eq!(peers[0].write_all(b"0").unwrap_err().kind(), ErrorKind::BrokenPipe);
            assert!(within(Duration::from_millis(1), tasks.next()).await.is_none());
        })
        .unwrap();
    }

    #[test]
    fn a_time_that_passes_ends_a_wait_and_one_beyond_the_clock_is_none() {
        let (end, mut peer) = pair();
        block_on(async {
            assert!(within(Duration::from_millis(1), byte(&end)).await.is_none());
            assert!(within(Duration::from_millis(1), ready(&end, PollFlags::IN)).await.is_none());
            peer.write_all(b"xy").unwrap();
            assert!(within(LONG, ready(&end, PollFlags::IN)).await.is_some());
            assert_eq!(within(Duration::MAX, byte(&end)).await, Some(b'x'));
            assert_eq!(within(Duration::ZERO, byte(&end)).await, Some(b'y'));
        })
        .unwrap();
    }

    #[test]
    fn a_task_that_is_polled_again_and_again_waits_for_one_descriptor() {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let (end, mut peer) = pair();
        let mut tasks = Tasks::new();
        tasks.spawn(async move { byte(&end).await });
        block_on(async {
            for _ in 0..=limit.unwrap_or(1 << 20) {
                tasks.turn().await;
            }
            assert!(within(Duration::from_millis(1), tasks.next()).await.is_none());
            peer.write_all(b"x").unwrap();
            assert_eq!(tasks.next().await, b'x');
        })
        .unwrap();
    }

    /// As a callback of a listener does that dials.
    #[test]
    fn one_wait_within_another_leaves_the_outer_one_as_it_was() {
        let (end, mut peer) = pair();
        let (inner_end, mut inner_peer) = pair();
        let outer = first(byte(&end), async {
            inner_peer.write_all(b"i").unwrap();
            assert_eq!(block_on(byte(&inner_end)).unwrap(), b'i');
            peer.write_all(b"o").unwrap();
            std::future::pending::<()>().await;
        });
        assert!(matches!(block_on(outer).unwrap(), First::One(b'o')));
    }
}
