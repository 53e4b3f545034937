//! The figures of a post-copy at its source.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// What a post-copy took, as its source sees it. As JSON, under the names that scripts know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PostcopyReport {
    /// Requests for pages.
    pub requests: u64,
    /// Pages that were asked for, those that were on their way included.
    pub pages_requested: u64,
    /// Pages that were sent before they were asked for, because those before them were asked for in order.
    pub pages_pushed: u64,
    /// Pages that were asked for after they had gone behind others, and went again at once.
    pub pages_repeated: u64,
    /// How often the link was replaced.
    pub recoveries: u64,
    /// From the start of the migration until the destination had loaded the devices and started the guest. `None`: the link
    /// broke before it could say so.
    #[serde(rename = "run_ms", serialize_with = "millis")]
    pub run_after: Option<Duration>,
}

fn millis<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.and_then(|time| u64::try_from(time.as_millis()).ok()).serialize(serializer)
}

impl fmt::Display for PostcopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(after) = self.run_after {
            write!(f, "the guest ran after {} ms, ", after.as_millis())?;
        }
        let Self { requests, pages_requested, pages_pushed, recoveries, .. } = self;
        write!(
            f,
            "{requests} requests for {pages_requested} pages, {pages_pushed} neighbours with them, {recoveries} recoveries"
        )
    }
}
