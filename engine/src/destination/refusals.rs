//! Connections that were refused: each has a warning, and the last of them explains why nothing
//! came.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};

/// What was refused so far.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<State>);

#[derive(Default)]
struct State {
    count: usize,
    last: Option<String>,
    /// Warnings in the current second, and when that began.
    second: Option<(Instant, usize)>,
    /// Refused without a warning since the last one.
    unsaid: usize,
}

/// Most warnings in a second; the rest is counted.
const WARNINGS: usize = 5;

impl Refusals {
    /// The connection is closed, and the migration goes on without it. `error` says whose it was
    /// and why.
    pub(crate) fn note(&self, error: &Error) {
        let said = error.chain();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count += 1;
        let second = state.second.get_or_insert_with(|| (Instant::now(), 0));
        if second.0.elapsed() > Duration::from_secs(1) {
            *second = (Instant::now(), 0);
        }
        second.1 += 1;
        if second.1 <= WARNINGS {
            let unsaid = std::mem::take(&mut state.unsaid);
            if unsaid > 0 {
                tracing::warn!(unsaid, "connections refused, without a warning each");
            }
            tracing::warn!("connection refused, the migration goes on: {said}");
        } else {
            state.unsaid += 1;
        }
        state.last = Some(said);
    }

    /// An error of a peer that did not come or went away, with the last refusal: it may have been
    /// the one that was missed.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (&state.last, error.kind()) {
            (Some(last), ErrorKind::Deadline | ErrorKind::Transport) => {
                let (count, s) = (state.count, if state.count == 1 { "" } else { "s" });
                error.noting(format_args!("{count} connection{s} refused, the last: {last}"))
            }
            _ => error,
        }
    }
}
