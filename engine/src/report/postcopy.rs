//! What a post-copy took.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// A post-copy as one of its ends saw it. As JSON, under the names that scripts know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PostcopyReport {
    /// Requests for pages: those that were sent at a destination, those that were read at a source.
    pub requests: u64,
    /// Pages that were asked for, those that were on their way included.
    pub pages_requested: u64,
    /// Pages that a source has sent on channels for pages that are asked for before they were,
    /// because those before them were asked for in order. 0 at a destination.
    pub neighbours_pushed: u64,
    /// Pages that were asked for after they had gone behind others, and that a source has sent
    /// again at once. 0 at a destination.
    pub pages_repeated: u64,
    /// How often the link was replaced.
    pub recoveries: u64,
    /// From the start of the migration until the destination had loaded the devices and started the
    /// guest, at a source. `None`: the link broke before the destination could say so.
    #[serde(rename = "run_ms", serialize_with = "millis", skip_serializing_if = "Option::is_none")]
    pub run_after: Option<Duration>,
    /// How the guest's threads waited for pages, at a destination where it ran.
    #[serde(flatten)]
    pub faults: Option<PageFaults>,
}

/// Page faults of a guest that ran before its RAM was there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PageFaults {
    /// Waits of threads for a page.
    pub faults: u64,
    /// From when a fault was heard of until its page was there.
    pub fault_us: FaultLatency,
    /// The sum of all waits.
    pub blocktime_ms: u64,
    /// Waits of each thread.
    pub threads: Vec<ThreadWaits>,
    /// Waits of the back-ends of vhost-user devices, which are not among the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub back_ends: Vec<BackEndWaits>,
    /// Pages that came before anything asked for them.
    pub pages_pushed: u64,
}

/// How long threads have waited for pages, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FaultLatency {
    /// Half of all waits were shorter, to within an eighth.
    pub p50: u64,
    /// 99 % of all waits were shorter, to within an eighth.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// Entry n counts waits of 2^n to 2^(n+1) microseconds; the first, also shorter ones.
    pub histogram: Vec<u64>,
}

/// How long one thread has waited for pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ThreadWaits {
    /// The system's number of the thread (gettid).
    pub thread: u32,
    /// How often it waited.
    pub faults: u64,
    /// How long in all, in microseconds.
    pub blocktime_us: u64,
}

/// How long the threads of a device's back-end have waited for pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BackEndWaits {
    /// The name of the device.
    pub device: String,
    /// How often they waited.
    pub faults: u64,
    /// From when a fault was heard of until its page was there.
    pub fault_us: FaultLatency,
    /// How long in all, in microseconds.
    pub blocktime_us: u64,
}

fn millis<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.and_then(|time| u64::try_from(time.as_millis()).ok()).serialize(serializer)
}

impl fmt::Display for PostcopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(after) = self.run_after {
            write!(f, "the guest ran after {} ms, ", after.as_millis())?;
        }
        if let Some(PageFaults { faults, fault_us: FaultLatency { p50, p99, max, .. }, .. }) = &self.faults {
            write!(f, "{faults} waits for pages (p50 {p50} µs, p99 {p99} µs, max {max} µs), ")?;
        }
        let Self { requests, pages_requested, neighbours_pushed, recoveries, .. } = self;
        write!(f, "{requests} requests for {pages_requested} pages, ")?;
        if *neighbours_pushed > 0 {
            write!(f, "{neighbours_pushed} neighbours with them, ")?;
        }
        write!(f, "{recoveries} recoveries")
    }
}
