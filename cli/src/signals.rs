//! Signals that end a process: the first one cancels cleanly, the second one ends the process.
//!
//! ```text
//!  main: install() ── flags, files, addresses ── cancel_on_signal(migration) ── the end
//!         a signal here is kept ───────────────────────^
//! ```

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::{Canceller, HandOver};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::human::tell;
use crate::outcome::{CANCELLED, DONE, FAILED_AFTER_COMMIT};

/// How long the command may take to end by itself after the second signal, which has closed all
/// that it could wait for.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a signal does now.
enum Target {
    /// Flags are read, files are opened: the first signal is kept for the migration.
    Starting,
    /// A command with nothing to clean up.
    Nothing,
    Migration(Canceller),
}

struct Watched {
    target: Target,
    /// A signal has come, and was kept or has cancelled.
    came: bool,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { target: Target::Starting, came: false });

/// Handles signals from now to the end of the process.
///
/// # Errors
/// The system refuses a handler or a thread.
pub(crate) fn install() -> io::Result<()> {
    // Handled, so that a file that grows past the limit of the process is an error of the write, as
    // on a full disk. Not ignored, which commands behind exec: would inherit.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    // A parent that blocked them for itself has handed that on; no thread could get them then.
    // Before any other thread is there.
    let ours = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGXFSZ];
    ours.into_iter().collect::<SigSet>().thread_unblock()?;
    let mut handled = vec![SIGINT, SIGQUIT, SIGTERM];
    // nohup is there so that this does not end the process.
    handled.extend(Some(SIGHUP).filter(|signal| (ignored() >> (signal - 1)) & 1 == 0));
    let mut signals = Signals::new(handled)?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(on_signal))
        .map(drop)
}

/// The first signal, which may have come already, cancels by `canceller`.
pub(crate) fn cancel_on_signal(canceller: Canceller) {
    let came = {
        let mut watched = lock();
        watched.target = Target::Migration(canceller.clone());
        watched.came
    };
    if came {
        canceller.cancel();
    }
}

/// Signals end the process by their default action.
pub(crate) fn end_on_signal() {
    let came = {
        let mut watched = lock();
        watched.target = Target::Nothing;
        watched.came
    };
    if came {
        std::process::exit(CANCELLED.into());
    }
}

fn on_signal(signal: i32) {
    let (first, canceller) = {
        let mut watched = lock();
        let first = !std::mem::replace(&mut watched.came, true);
        match &watched.target {
            Target::Starting => (first, None),
            Target::Migration(canceller) => (first, Some(canceller.clone())),
            Target::Nothing => {
                drop(watched);
                if emulate_default_handler(signal).is_err() {
                    std::process::exit(CANCELLED.into());
                }
                return;
            }
        }
    };
    match (first, canceller) {
        (true, None) => tell("multifd: cancelling, once more to end at once"),
        (true, Some(canceller)) => {
            let too_late = canceller.hand_over() != HandOver::Before;
            canceller.cancel();
            tell(if too_late {
                "multifd: the guest is handed over already; once more to end without waiting"
            } else {
                "multifd: cancelling, once more to end at once"
            });
        }
        (false, None) => std::process::exit(CANCELLED.into()),
        (false, Some(canceller)) => end(&canceller),
    }
}

/// Ends the process: regularly if that is soon, else with the code that says where the guest may
/// run.
fn end(canceller: &Canceller) -> ! {
    canceller.close_channels();
    // The event that is waited for is the end of the process.
    let deadline = Instant::now() + EXIT_TIMEOUT;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        thread::park_timeout(left);
    }
    let code = match canceller.hand_over() {
        HandOver::Before => CANCELLED,
        HandOver::Begun => FAILED_AFTER_COMMIT,
        HandOver::Done => DONE,
    };
    std::process::exit(code.into());
}

/// Signals that were ignored when the process started, a bit each; none where the system does not
/// tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn lock() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}
