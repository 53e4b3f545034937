//! Migrations of a QEMU, on either side: what is set, rounds, the end, and the figures.

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::{Failure, Outcome, Qemu, Settings, Side};

/// Bytes a second that QEMU is told to expect of the switchover when it may end: any number of
/// dirty pages is few enough.
const RELEASE_SWITCHOVER_BANDWIDTH: u64 = 1 << 40;

/// How long a QEMU may take to put away a migration that has failed.
const CLEANED_UP: Duration = Duration::from_secs(30);

/// Time between two looks at a state that has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How a migration ended, in the words and figures of one QEMU.
#[derive(Clone, Debug)]
pub struct Report {
    /// `completed`, `failed` or `cancelled`.
    pub status: String,
    /// Why it failed, if QEMU says so.
    pub error: Option<String>,
    /// From the command to the end.
    pub total: Duration,
    /// How long the guest was paused. The source's estimate.
    pub downtime: Duration,
    /// Number of times the dirty pages were collected.
    pub rounds: u64,
    /// Bytes on the wire.
    pub transferred_bytes: u64,
    /// Pages sent as data, zero pages included if no end looked for them.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages sent as differences.
    pub xbzrle_pages: u64,
    /// Everything that `query-migrate` says.
    pub all: Value,
}

impl Report {
    fn new(all: Value) -> Self {
        let number = |path| all.pointer(path).and_then(Value::as_u64).unwrap_or(0);
        let text = |path| all.pointer(path).and_then(Value::as_str).map(str::to_owned);
        Self {
            status: text("/status").unwrap_or_else(|| "none".into()),
            error: text("/error-desc"),
            total: Duration::from_millis(number("/total-time")),
            downtime: Duration::from_millis(number("/downtime")),
            rounds: number("/ram/dirty-sync-count"),
            transferred_bytes: number("/ram/transferred"),
            normal_pages: number("/ram/normal"),
            zero_pages: number("/ram/duplicate"),
            xbzrle_pages: number("/xbzrle-cache/pages"),
            all,
        }
    }

    /// Whether this is an end, or an intermediate state.
    pub fn ended(&self) -> bool {
        ENDS.contains(&self.status.as_str())
    }

    /// Fails unless the migration was completed.
    ///
    /// # Errors
    /// With QEMU's reason.
    pub fn check_completed(self) -> Outcome<Self> {
        if self.status == "completed" {
            return Ok(self);
        }
        let reason = self.error.as_deref().unwrap_or("QEMU says no reason");
        Err(Failure::new(format!("migration {}: {reason}", self.status)))
    }
}

const ENDS: [&str; 3] = ["completed", "failed", "cancelled"];

impl Qemu {
    /// Sets capabilities and parameters. On a destination before [`Qemu::listen`], on a source
    /// before [`Qemu::migrate`].
    ///
    /// # Errors
    /// When QEMU refuses one of them.
    pub fn set_up(&mut self, settings: &Settings, side: Side) -> Outcome {
        let on = settings.capabilities(side);
        // What an earlier migration of this QEMU may have had on.
        let off = ["multifd", "return-path", "xbzrle"].into_iter().filter(|name| !on.contains(name));
        let list = on.iter().map(|name| (*name, true)).chain(off.map(|name| (name, false)));
        let list: Vec<Value> =
            list.map(|(name, state)| json!({ "capability": name, "state": state })).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
        let mut parameters = settings.parameters(side);
        let set = self.execute("migrate-set-parameters", Value::Object(parameters.clone()));
        match set {
            // QEMU before 8.2: what it measures counts.
            Err(refused) if measures(&refused) => {
                parameters.remove("avail-switchover-bandwidth");
                self.execute("migrate-set-parameters", Value::Object(parameters)).map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Listens for a source (QEMU was started with `-incoming defer`). Gives the URI to connect to:
    /// for `tcp:127.0.0.1:0` with the port that was free. A migration that fails leaves QEMU
    /// running, so that the reason can be asked for.
    ///
    /// # Errors
    /// When QEMU cannot listen there.
    pub fn listen(&mut self, uri: &str) -> Outcome<String> {
        self.forget_events();
        let listening = self.execute("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
        match listening {
            // QEMU before 9.1, which exits.
            Err(refused) if refused.to_string().contains("'exit-on-error' is unexpected") => {
                self.execute("migrate-incoming", json!({ "uri": uri }))?
            }
            other => other?,
        };
        let report = self.migration()?;
        let port = report.all.pointer("/socket-address/0/port").and_then(Value::as_str);
        Ok(match (uri.strip_suffix(":0"), port) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            _ => uri.to_owned(),
        })
    }

    /// Starts to migrate to `uri`.
    ///
    /// # Errors
    /// When QEMU refuses; a peer that cannot be reached is a migration that fails, see
    /// [`Qemu::wait_end`].
    pub fn migrate(&mut self, uri: &str) -> Outcome {
        self.wait_cleaned_up(CLEANED_UP)?;
        self.forget_events();
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Waits until the migration before is put away. QEMU reports that it has failed a moment
    /// earlier, and a `migrate` in that moment is refused, and all later ones too.
    fn wait_cleaned_up(&mut self, within: Duration) -> Outcome {
        let deadline = Instant::now() + within;
        let of_a_migration = |entry: &Value| entry.get("type").is_some_and(|kind| kind == "migration");
        loop {
            let connections = match self.execute("query-yank", json!({})) {
                // QEMU before 6.0.
                Err(unknown) if unknown.to_string().contains("query-yank has not been found") => {
                    return Ok(());
                }
                connections => connections?,
            };
            if !connections.as_array().is_some_and(|list| list.iter().any(of_a_migration)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(format!("a migration before is not put away after {within:?}")));
            }
            self.gather_events(LOOK_AGAIN)?;
        }
    }

    /// Lets a migration run to its end: keeps it in its rounds until there were `min_rounds` of
    /// them, then allows the switchover.
    ///
    /// # Errors
    /// When it does not end in time, completes in fewer rounds, or QEMU is gone. A migration that
    /// fails or is cancelled is no error here: see [`Report::check_completed`].
    pub fn settle(&mut self, settings: &Settings, within: Duration) -> Outcome<Report> {
        if settings.min_rounds > 1 {
            self.wait_first_window(within)?;
            self.set_parameter("max-bandwidth", settings.max_bandwidth)?;
            self.wait_rounds(settings.min_rounds, within)?;
            self.set_parameter("downtime-limit", millis(settings.downtime_limit))?;
            let released = self.set_parameter("avail-switchover-bandwidth", RELEASE_SWITCHOVER_BANDWIDTH);
            // QEMU before 8.2: what it measures counts.
            released.or_else(|refused| if measures(&refused) { Ok(()) } else { Err(refused) })?;
        }
        let report = self.wait_end(within)?;
        let too_few = report.rounds < settings.min_rounds.into() && !settings.fewer_rounds_allowed;
        if report.status == "completed" && too_few {
            let Settings { min_rounds, .. } = settings;
            return Err(Failure::new(format!("{} migration rounds, asked for {min_rounds}", report.rounds)));
        }
        Ok(report)
    }

    /// Waits until the source collected dirty pages for the `rounds`th time, or the migration
    /// ended.
    ///
    /// # Errors
    /// When there are fewer after `within` or QEMU is gone.
    pub fn wait_rounds(&mut self, rounds: u32, within: Duration) -> Outcome {
        self.look_until(format_args!("migration round {rounds}"), within, |report| {
            report.rounds >= rounds.into() || report.ended()
        })
    }

    /// Waits until that many bytes were sent, or the migration ended.
    ///
    /// # Errors
    /// When there are fewer after `within` or QEMU is gone.
    pub fn wait_transferred(&mut self, bytes: u64, within: Duration) -> Outcome {
        self.look_until(format_args!("{bytes} bytes sent"), within, |report| {
            report.transferred_bytes >= bytes || report.ended()
        })
    }

    /// Waits until no more than that many bytes of this round are left, or the migration ended.
    ///
    /// # Errors
    /// When there are more after `within` or QEMU is gone.
    pub fn wait_remaining(&mut self, bytes: u64, within: Duration) -> Outcome {
        self.look_until(format_args!("{bytes} bytes left"), within, |report| {
            let remaining = report.all.pointer("/ram/remaining").and_then(Value::as_u64);
            remaining.is_some_and(|remaining| remaining <= bytes) || report.rounds > 1 || report.ended()
        })
    }

    /// Changes a parameter, also while a migration runs.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn set_parameter(&mut self, name: &str, value: impl Into<Value>) -> Outcome {
        let mut parameters = Map::new();
        parameters.insert(name.to_owned(), value.into());
        self.execute("migrate-set-parameters", Value::Object(parameters)).map(drop)
    }

    /// Switches to post-copy as soon as QEMU can: the guest goes on at the destination, its RAM
    /// follows.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn start_postcopy(&mut self) -> Outcome {
        self.execute("migrate-start-postcopy", json!({})).map(drop)
    }

    /// Starts to migrate as [`Qemu::migrate`] does, but goes on with a post-copy that is paused.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn resume_postcopy(&mut self, uri: &str) -> Outcome {
        self.forget_events();
        self.execute("migrate", json!({ "uri": uri, "resume": true })).map(drop)
    }

    /// Waits until QEMU has measured the bandwidth once.
    ///
    /// # Errors
    /// When it has not after `within`, or QEMU is gone.
    pub fn wait_first_window(&mut self, within: Duration) -> Outcome {
        self.look_until("migration bandwidth", within, |report| {
            let measured = report.all.pointer("/ram/mbps").and_then(Value::as_f64);
            measured.is_some_and(|rate| rate > 0.0) || report.ended()
        })
    }

    fn look_until(
        &mut self,
        what: impl fmt::Display,
        within: Duration,
        done: impl Fn(&Report) -> bool,
    ) -> Outcome {
        let deadline = Instant::now() + within;
        loop {
            let report = self.migration()?;
            if done(&report) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(format!("no {what} within {within:?}; {}", report.all)));
            }
            self.gather_events(LOOK_AGAIN)?;
        }
    }

    /// Waits for this status of the migration, `pre-switchover` or `postcopy-active` for example.
    ///
    /// # Errors
    /// When the time is over, the migration ends with another status, or QEMU is gone.
    pub fn wait_status(&mut self, status: &str, within: Duration) -> Outcome<Report> {
        let report = self.migration()?;
        if report.status == status || report.ended() {
            return expect_status(report, status);
        }
        self.wait_event(format_args!("migration status {status}"), within, |event| {
            is_end(event) || event.pointer("/data/status").and_then(Value::as_str) == Some(status)
        })?;
        expect_status(self.migration()?, status)
    }

    /// Waits until the migration completed, failed or was cancelled, and the run state says so too:
    /// `postmigrate` or again `running` on a source.
    ///
    /// # Errors
    /// When the time is over or QEMU is gone.
    pub fn wait_end(&mut self, within: Duration) -> Outcome<Report> {
        if !self.migration()?.ended() {
            self.wait_event("the end of the migration", within, is_end)?;
        }
        self.leave_finish_migrate(within)?;
        self.migration()
    }

    /// A source reports the end of the migration a moment before its guest's run state follows.
    fn leave_finish_migrate(&mut self, within: Duration) -> Outcome {
        let deadline = Instant::now() + within;
        while self.run_state()? == "finish-migrate" {
            if Instant::now() >= deadline {
                return Err(Failure::new(format!("the run state is still finish-migrate after {within:?}")));
            }
            self.gather_events(LOOK_AGAIN)?;
        }
        Ok(())
    }

    /// Waits until the migration completed.
    ///
    /// # Errors
    /// When it failed or was cancelled (the failure quotes QEMU's reason and its stderr, where the
    /// details are), or the time is over.
    pub fn wait_completed(&mut self, within: Duration) -> Outcome<Report> {
        let report = self.wait_end(within)?;
        report.check_completed().map_err(|failure| self.explain(failure))
    }

    /// Cancels the migration; the source's guest runs on.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn cancel(&mut self) -> Outcome {
        self.execute("migrate_cancel", json!({})).map(drop)
    }

    /// State and figures of the migration now.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn migration(&mut self) -> Outcome<Report> {
        Ok(Report::new(self.execute("query-migrate", json!({}))?))
    }
}

/// Moves a guest from one QEMU to another over `uri`, which both can reach. The destination was
/// started with `-incoming defer`; with `-S` its guest stays paused. Gives the source's figures.
///
/// # Errors
/// When one of the two fails or it does not end in time.
pub fn run(
    source: &mut Qemu,
    destination: &mut Qemu,
    uri: &str,
    settings: &Settings,
    within: Duration,
) -> Outcome<Report> {
    destination.set_up(settings, Side::Destination)?;
    source.set_up(settings, Side::Source)?;
    let uri = destination.listen(uri)?;
    source.migrate(&uri)?;
    let report = source.settle(settings, within)?;
    // The details of a source's failure are often in what the destination said.
    let report = report.check_completed().map_err(|failure| destination.explain(source.explain(failure)))?;
    destination.wait_completed(within)?;
    Ok(report)
}

/// Whether a QEMU refused to be told the bandwidth of the switchover, which it measures.
fn measures(refused: &Failure) -> bool {
    refused.to_string().contains("'avail-switchover-bandwidth' is unexpected")
}

fn is_end(event: &Value) -> bool {
    let status = event.pointer("/data/status").and_then(Value::as_str);
    event.get("event").is_some_and(|name| name == "MIGRATION")
        && status.is_some_and(|status| ENDS.contains(&status))
}

fn expect_status(report: Report, status: &str) -> Outcome<Report> {
    if report.status == status {
        return Ok(report);
    }
    let reason = report.error.as_deref().unwrap_or("QEMU says no reason");
    Err(Failure::new(format!("migration status is {} ({reason}), {status} was expected", report.status)))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
