//! Connections that were refused: each has a warning, and the last of them explains why nothing
//! came.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Remedy};
use crate::run::stop::lock;

/// What was refused so far.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<State>);

#[derive(Default)]
struct State {
    count: usize,
    last: Option<String>,
    remedy: Option<Remedy>,
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
        let mut state = lock(&self.0);
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
        state.remedy = error.remedy();
    }

    /// An error of a peer that did not come or went away, with the last refusal: it may have been
    /// the one that was missed.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let state = lock(&self.0);
        match (&state.last, error.kind()) {
            (Some(last), ErrorKind::Cancelled | ErrorKind::Deadline | ErrorKind::Transport) => {
                let (count, s) = (state.count, if state.count == 1 { "" } else { "s" });
                let remedy = state.remedy;
                error
                    .noting(format_args!("{count} connection{s} refused, the last: {last}"))
                    .remedied_by(remedy)
            }
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Phase;

    #[test]
    fn a_refused_connection_that_spoke_tls_is_the_remedy_of_a_source_that_never_came() {
        let refusals = Refusals::default();
        let late = || Error::new(ErrorKind::Deadline, Phase::Accept, "no main channel");
        assert_eq!(refusals.explain(late()).remedy(), None);
        refusals.note(&Error::unexpected_tls(Phase::Accept, "peer"));
        assert_eq!(refusals.explain(late()).remedy(), Some(Remedy::SetUpTls));
        let other = Error::new(ErrorKind::InvalidStream, Phase::Accept, "not a stream");
        assert_eq!(refusals.explain(other).remedy(), None);
    }
}
