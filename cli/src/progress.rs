//! The live line: one that is rewritten on a terminal, one a round otherwise, none with `-q`.

use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use multifd_engine::{PAGE, Progress, ProgressReader, RoundRecord};

use crate::flags::Common;
use crate::human::{show_bytes, tell};

/// Between two looks at the counters.
const INTERVAL: Duration = Duration::from_millis(200);

/// Where one line a round goes if there is no terminal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    /// The counters are watched for new rounds.
    Watched,
    /// Whoever runs the rounds tells of them.
    Told,
}

/// Runs `work` and shows `progress` meanwhile.
pub(crate) fn shown<T>(
    common: &Common,
    progress: &ProgressReader,
    lines: Lines,
    work: impl FnOnce() -> T,
) -> T {
    if common.quiet {
        return work();
    }
    let (done, finished) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut display = Display::new(lines);
            while let Err(RecvTimeoutError::Timeout) = finished.recv_timeout(INTERVAL) {
                display.update(&progress.now());
            }
            display.end();
        });
        let result = work();
        drop(done);
        result
    })
}

/// Progress of work that is not a migration: on a terminal only, as there are no rounds to report.
pub(crate) fn bar(common: &Common, template: &str) -> ProgressBar {
    if common.quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    drawn(template)
}

fn drawn(template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Reports a finished round of a live source, where there is no live line.
pub(crate) fn line(round: &RoundRecord) {
    if !std::io::stderr().is_terminal() {
        tell(round);
    }
}

struct Display {
    bar: Option<ProgressBar>,
    lines: Lines,
    rounds: u64,
    last: (Instant, u64),
}

impl Display {
    fn new(lines: Lines) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| drawn("{bar:24} {msg}"));
        Self { bar, lines, rounds: 0, last: (Instant::now(), 0) }
    }

    fn update(&mut self, now: &Progress) {
        let (then, wire) = std::mem::replace(&mut self.last, (Instant::now(), now.wire_bytes));
        let seconds = then.elapsed().as_secs_f64();
        let rate = (now.wire_bytes - wire) as f64 * 8.0 / seconds / 1e9;
        let pages = now.pages_normal + now.pages_zero + now.pages_xbzrle;
        let message = format!(
            "round {}  {} of {}  wire {}  {rate:.2} Gbit/s",
            now.rounds,
            show_bytes(pages * PAGE as u64),
            show_bytes(now.ram_bytes),
            show_bytes(now.wire_bytes)
        );
        if let Some(bar) = &self.bar {
            bar.set_length(now.ram_bytes);
            bar.set_position((pages * PAGE as u64).min(now.ram_bytes));
            bar.set_message(message);
        } else if now.rounds > self.rounds && self.lines == Lines::Watched {
            self.rounds = now.rounds;
            tell(&message);
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
