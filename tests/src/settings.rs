//! What is set in a QEMU before a migration.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::Compression;
use crate::migration::millis;

/// Which side of a migration a QEMU is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// It is started with `-incoming`.
    Destination,
    /// Its guest leaves.
    Source,
}

/// Who looks for zero pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ZeroPages {
    /// The main thread: they travel on the main channel.
    Legacy,
    /// The multifd channels (QEMU's default).
    Multifd,
    /// None: they travel as data.
    None,
}

/// What is set before a migration. The defaults are a plain migration over one connection without a
/// bandwidth limit.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of multifd channels; none = no multifd.
    pub channels: Option<u8>,
    /// Compression of multifd packets.
    pub compression: Compression,
    /// Capability `return-path`: the destination's verdict decides.
    pub return_path: bool,
    /// Who looks for zero pages; none = QEMU's default.
    pub zero_pages: Option<ZeroPages>,
    /// Capability `xbzrle`: later rounds send differences. Not with multifd.
    pub xbzrle: bool,
    /// Bytes a second, 0 = no limit.
    pub max_bandwidth: u64,
    /// How long the guest may be paused.
    pub downtime_limit: Duration,
    /// The source stays in its rounds until it began this many, and only then may switch over.
    /// Needs a guest that keeps writing. 0 and 1 ask for nothing.
    pub min_rounds: u32,
    /// Fewer rounds than `min_rounds` are no failure: QEMU switches over when a guest that got no
    /// CPU wrote nothing between two syncs.
    pub fewer_rounds_allowed: bool,
    /// More capabilities that are on, for both sides: `validate-uuid`, `postcopy-ram`, `mapped-ram`
    /// ...
    pub capabilities: Vec<&'static str>,
    /// More parameters, for both sides.
    pub parameters: Map<String, Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            channels: None,
            compression: Compression::None,
            return_path: false,
            zero_pages: None,
            xbzrle: false,
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            min_rounds: 0,
            fewer_rounds_allowed: false,
            capabilities: Vec::new(),
            parameters: Map::new(),
        }
    }
}

impl Settings {
    /// The capabilities that are on, for this side.
    pub(crate) fn capabilities(&self, side: Side) -> Vec<&'static str> {
        let source = side == Side::Source;
        let mut on = vec!["events"];
        on.extend(self.channels.map(|_| "multifd"));
        on.extend((source && self.return_path).then_some("return-path"));
        on.extend((source && self.xbzrle).then_some("xbzrle"));
        on.extend(&self.capabilities);
        on
    }

    /// The parameters for this side.
    pub(crate) fn parameters(&self, side: Side) -> Map<String, Value> {
        let mut all = self.parameters.clone();
        let mut set = |name: &str, value: Value| all.insert(name.to_owned(), value);
        if let Some(channels) = self.channels {
            set("multifd-channels", channels.into());
            set("multifd-compression", self.compression.name().into());
        }
        if side == Side::Destination {
            return all;
        }
        match self.compression {
            Compression::None => None,
            Compression::Zlib(level) => set("multifd-zlib-level", level.into()),
            Compression::Zstd(level) => set("multifd-zstd-level", level.into()),
        };
        if let Some(zero_pages) = self.zero_pages {
            set("zero-page-detection", zero_pages.name().into());
        }
        if self.min_rounds > 1 {
            set("max-bandwidth", HOLD_BANDWIDTH.into());
            set("avail-switchover-bandwidth", HOLD_SWITCHOVER_BANDWIDTH.into());
            set("downtime-limit", 1.into());
        } else {
            set("max-bandwidth", self.max_bandwidth.into());
            set("downtime-limit", millis(self.downtime_limit).into());
        }
        all
    }
}

/// Bytes a second in the first 100 ms of a migration that is to stay in its rounds. QEMU has no
/// threshold before these have passed and switches over if the first round is done by then; at this
/// rate it never is.
const HOLD_BANDWIDTH: u64 = 1 << 20;

/// Bytes a second that QEMU is told to expect of the switchover while it is to stay in its rounds.
/// With a downtime limit of 1 ms this makes a threshold of 1000 bytes: less than a page, but not
/// nothing (QEMU collects the dirty pages anew only below the threshold).
const HOLD_SWITCHOVER_BANDWIDTH: u64 = 1_000_000;

impl ZeroPages {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Multifd => "multifd",
            Self::None => "none",
        }
    }
}
