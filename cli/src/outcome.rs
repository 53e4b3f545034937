//! How a command ended: what goes to stdout and stderr, and the exit code.

use std::process::ExitCode;

use multifd_engine::{DigestsDiffer, Error, ErrorKind, Figures, Progress, Remedy, Report};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::flags::Common;
use crate::human::{self, tell};

/// Why a migration, or its preparation, has failed.
pub(crate) enum Failure {
    Migration(Error),
    /// The flags ask for what cannot be: the reason.
    Usage(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Migration(error)
    }
}

/// The end of a command.
pub(crate) struct Outcome {
    status: Status,
    error: Option<String>,
    hint: Option<String>,
    code: u8,
    table: String,
    keys: Map<String, Value>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Cancelled,
    Completed,
    Failed,
}

pub(crate) const DONE: u8 = 0;
pub(crate) const FAILED: u8 = 1;
const USAGE: u8 = 2;
pub(crate) const FAILED_AFTER_COMMIT: u8 = 3;
pub(crate) const CANCELLED: u8 = 130;

impl Outcome {
    /// A migration that ended well. `extra` lines follow its table.
    pub(crate) fn migrated(report: &Report, extra: &str) -> Self {
        let mut outcome = Self::shown(format!("{report}\n{extra}"), json!({}));
        outcome.keys = object(json!(report.figures()));
        outcome
    }

    /// Something to look at.
    pub(crate) fn shown(table: String, keys: Value) -> Self {
        Self { status: Status::Completed, error: None, hint: None, code: DONE, table, keys: object(keys) }
    }

    /// Something to look at that is not as it should be, for this reason.
    pub(crate) fn found_wrong(table: String, keys: Value, reason: String) -> Self {
        Self { error: Some(reason), code: FAILED, ..Self::shown(table, keys) }
    }

    /// An empty result: the output was written elsewhere.
    pub(crate) fn silent() -> Self {
        Self::shown(String::new(), json!({}))
    }

    /// A migration, or its preparation, that failed. The counters stand where they stood.
    pub(crate) fn failed(failure: &Failure, progress: Option<Progress>) -> Self {
        let (status, code, text) = match failure {
            Failure::Migration(error) => {
                let (status, code) = status_and_code(error);
                (status, code, with_remedy(error))
            }
            Failure::Usage(reason) => (Status::Failed, USAGE, reason.clone()),
        };
        let mut keys = object(json!(Figures::so_far(&progress.unwrap_or_default())));
        if digests_differ(failure) {
            keys.insert("digest".to_owned(), json!("different"));
        }
        Self { status, error: Some(text), hint: None, code, table: String::new(), keys }
    }

    /// Failed for a reason outside of a migration.
    pub(crate) fn broken(error: String) -> Self {
        Self {
            status: Status::Failed,
            error: Some(error),
            hint: None,
            code: FAILED,
            table: String::new(),
            keys: Map::new(),
        }
    }

    /// Adds what the operator may look at.
    pub(crate) fn hinting(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }

    /// Adds a key to the JSON object.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.keys.insert(key.to_owned(), value);
        self
    }

    /// Prints the result and gives the exit code.
    pub(crate) fn report(self, common: &Common) -> ExitCode {
        if let Some(error) = &self.error {
            tell(format_args!("multifd: {}", human::visible(error)));
        }
        if let Some(hint) = &self.hint {
            tell(format_args!("  {}", human::visible(hint)));
        }
        if common.json {
            let mut keys = Map::new();
            keys.insert("status".to_owned(), json!(self.status));
            keys.insert("error".to_owned(), json!(self.error));
            if let Some(hint) = &self.hint {
                keys.insert("hint".to_owned(), json!(hint));
            }
            keys.extend(self.keys);
            print(&format!("{:#}\n", Value::Object(keys)));
        } else {
            print(&self.table);
        }
        ExitCode::from(self.code)
    }
}

/// Whether a destination has found that RAM is not what was sent.
fn digests_differ(failure: &Failure) -> bool {
    let Failure::Migration(error) = failure else { return false };
    std::error::Error::source(error).is_some_and(|cause| cause.is::<DigestsDiffer>())
}

fn status_and_code(error: &Error) -> (Status, u8) {
    match error.kind() {
        // Also after a cancel: the exit code must say that the source's guest may not run on.
        _ if !error.source_may_resume() => (Status::Failed, FAILED_AFTER_COMMIT),
        ErrorKind::Cancelled => (Status::Cancelled, CANCELLED),
        ErrorKind::ApiMisuse => (Status::Failed, USAGE),
        _ => (Status::Failed, FAILED),
    }
}

/// The error, and the flag that may help.
fn with_remedy(error: &Error) -> String {
    match error.remedy() {
        Some(Remedy::RaiseMaxRam) => format!("{} (see --max-ram)", error.chain()),
        Some(Remedy::SetUpTls) => format!("{} (see --tls-dir)", error.chain()),
        _ => error.chain(),
    }
}

/// Prints; a reader that has closed its end is not a failure.
fn print(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use multifd_engine::{Channel, Destination, RamBlock};

    use super::*;

    #[test]
    fn flags_that_cannot_be_met_are_wrong_usage() {
        let outcome = Outcome::failed(&Failure::Usage("no such key".to_owned()), None);
        assert_eq!((outcome.code, outcome.error.as_deref()), (USAGE, Some("no such key")));
    }

    #[test]
    fn a_peer_that_speaks_tls_brings_up_the_flag_for_it() {
        let (main, peer) = Channel::pair().unwrap();
        // The beginning of a ClientHello.
        peer.send_all(&[0x16, 3, 1, 2, 0]).unwrap();
        let destination = Destination::builder(Vec::<RamBlock>::new()).over(main, Vec::new()).unwrap();
        let error = destination.receive().err().unwrap();
        let text = with_remedy(&error);
        assert!(text.ends_with("this side is not set up for it (see --tls-dir)"), "{text}");
    }
}
