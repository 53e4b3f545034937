//! How far a migration has come, on the standard error: a line that is rewritten on a terminal, a
//! line every few seconds elsewhere, or JSON; nothing with `-q`.

use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use multifd_engine::{Progress, ProgressReader, RoundRecord};
use serde_json::json;

use crate::flags::{Common, ProgressKind};
use crate::human::tell;

mod snapshot;

use snapshot::{Meter, Snapshot};

/// Between two looks at the counters.
const INTERVAL: Duration = Duration::from_millis(200);

/// Between two lines where there is no terminal.
const LINES_INTERVAL: Duration = Duration::from_secs(5);

/// Between two JSON events.
const EVENTS_INTERVAL: Duration = Duration::from_secs(1);

/// Where one line a round goes if there is no terminal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    /// The counters are watched for new rounds.
    Watched,
    /// What runs the rounds tells of them.
    Told,
}

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Bar,
    Events,
    Lines,
    Nothing,
}

fn form(common: &Common) -> Form {
    match common.progress {
        _ if common.quiet => Form::Nothing,
        ProgressKind::None => Form::Nothing,
        ProgressKind::Json => Form::Events,
        ProgressKind::Lines => Form::Lines,
        ProgressKind::Auto if std::io::stderr().is_terminal() => Form::Bar,
        ProgressKind::Auto => Form::Lines,
    }
}

/// Runs `work` and shows `progress` meanwhile.
pub(crate) fn shown<T>(
    common: &Common,
    progress: &ProgressReader,
    lines: Lines,
    work: impl FnOnce() -> T,
) -> T {
    let form = form(common);
    if form == Form::Nothing {
        return work();
    }
    let (done, finished) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut display = Display::new(form, lines);
            while let Err(RecvTimeoutError::Timeout) = finished.recv_timeout(INTERVAL) {
                display.update(&progress.now(), Instant::now());
            }
            display.end(&progress.now(), Instant::now());
        });
        let result = work();
        drop(done);
        result
    })
}

/// Progress of work that is not a migration: on a terminal only, as there are no rounds to report.
pub(crate) fn bar(common: &Common, template: &str) -> ProgressBar {
    if form(common) == Form::Bar { drawn(template) } else { ProgressBar::hidden() }
}

fn drawn(template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Reports a finished round of a live source, where there is no live line.
pub(crate) fn line(common: &Common, round: &RoundRecord) {
    match form(common) {
        Form::Lines => tell(round),
        Form::Events => tell(json!({ "event": "round", "round": round })),
        Form::Bar | Form::Nothing => {}
    }
}

struct Display {
    form: Form,
    bar: Option<ProgressBar>,
    lines: Lines,
    meter: Meter,
    /// What was written last, and when.
    told: Option<(Snapshot, Instant)>,
}

impl Display {
    fn new(form: Form, lines: Lines) -> Self {
        let bar = (form == Form::Bar).then(|| drawn("{bar:24} {msg}"));
        Self { form, bar, lines, meter: Meter::new(Instant::now()), told: None }
    }

    fn update(&mut self, progress: &Progress, now: Instant) {
        let snapshot = self.meter.measure(progress, now);
        if let Some(bar) = &self.bar {
            // A length of 0 would be a full bar.
            bar.set_length(snapshot.ram_bytes.max(1));
            bar.set_position(snapshot.done_bytes.min(snapshot.ram_bytes));
            bar.set_message(snapshot.to_string());
        } else if self.is_due(&snapshot, now) {
            self.write(snapshot, now);
        }
    }

    /// The first time that anything has come, then at intervals; lines also with each new round.
    fn is_due(&self, snapshot: &Snapshot, now: Instant) -> bool {
        let interval = if self.form == Form::Events { EVENTS_INTERVAL } else { LINES_INTERVAL };
        match &self.told {
            _ if snapshot.wire_bytes == 0 => false,
            None => self.lines == Lines::Watched || self.form == Form::Events,
            Some((last, _)) if last.rounds < snapshot.rounds && self.lines == Lines::Watched => true,
            Some((_, at)) => now.duration_since(*at) >= interval,
        }
    }

    fn write(&mut self, snapshot: Snapshot, now: Instant) {
        match self.form {
            Form::Events => tell(snapshot.event("progress")),
            _ => tell(&snapshot),
        }
        self.told = Some((snapshot, now));
    }

    fn end(mut self, progress: &Progress, now: Instant) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        } else if self.form == Form::Events {
            tell(self.meter.measure(progress, now).event("end"));
        }
    }
}
