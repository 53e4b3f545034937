//! What can go wrong with a device's back-end.

use thiserror::Error;

use crate::dirty::DirtyLogError;

/// A device's back-end could not do what was asked of it, or its state does not fit.
#[derive(Debug, Error)]
#[error("{subject}: {doing}")]
pub struct VhostError {
    /// Whom it is about: `vhost device disk0`.
    subject: String,
    doing: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl VhostError {
    pub(super) fn of_device(name: &str, doing: impl Into<String>) -> Self {
        Self { subject: format!("vhost device {name}"), doing: doing.into(), source: None }
    }

    pub(super) fn of_memory(doing: impl Into<String>) -> Self {
        Self { subject: "vhost memory".to_owned(), doing: doing.into(), source: None }
    }

    pub(super) fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The whole chain in one line: `a: b: c`.
    pub fn chain(&self) -> String {
        let causes = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}

impl From<VhostError> for DirtyLogError {
    fn from(error: VhostError) -> Self {
        let text = Self::new(error.to_string());
        match error.source {
            Some(cause) => text.because(cause),
            None => text,
        }
    }
}
