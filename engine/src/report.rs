//! What a migration took. Every number was measured.

mod postcopy;

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::convergence::{DowntimeLedger, RoundRecord};
use crate::run::counters::Progress;
use crate::run::session::Session;
use crate::source::{AuditReport, XbzrleStats, ZeroCopyStats};

pub use postcopy::{BackEndWaits, FaultLatency, PageFaults, PostcopyReport, ThreadWaits};

/// The account of a migration that has ended well.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// From the start to the end, both included; at a destination, from the arrival of the main
    /// channel.
    pub total: Duration,
    /// Up to the first page: connections, headers, the list of blocks.
    pub setup: Duration,
    /// From the pause of the guest, if
    /// [`Precopy::guest_paused_at`](crate::Precopy::guest_paused_at) has said when that was, else
    /// from the call of `stop_copy`, to the destination's word that it has arrived; at a
    /// destination, from the announcement of the last RAM to the end of the stream.
    pub downtime: Duration,
    /// The counters at the end.
    pub progress: Progress,
    /// The codec of the parallel channels: `none`, `zlib`, `zstd:3`.
    pub codec: String,
    /// The destination said that it has the guest.
    pub confirmed: bool,
    /// What the downtime was made of. At a destination, the time that loading took is all that is
    /// known.
    pub ledger: DowntimeLedger,
    /// What was decided after each round, and why. Empty at a destination.
    pub decisions: Vec<RoundRecord>,
    /// What the xbzrle cache has done, if there was one.
    pub xbzrle: Option<XbzrleStats>,
    /// What became of zero-copy sends, if there were any.
    pub zero_copy: Option<ZeroCopyStats>,
    /// What a post-copy took as this end saw it, if there was one.
    pub postcopy: Option<PostcopyReport>,
    /// What was compared with what had been sent, if
    /// [`SourceConfig::audit`](crate::SourceConfig::audit) was asked for; with what had been
    /// placed, if [`DestinationConfig::verify`](crate::DestinationConfig::verify) was.
    pub audit: Option<AuditReport>,
    /// Whether all of RAM is at the destination what it was at the source, where both ends are
    /// multifd and kept a digest of it ([`SourceConfig::digest`](crate::SourceConfig::digest)).
    pub digest: Option<DigestVerdict>,
}

/// What a comparison of digests has come to. A difference is an error, because of
/// [`DigestsDiffer`](crate::DigestsDiffer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DigestVerdict {
    /// Every page was placed as it was sent.
    Equal,
}

/// The same as plain numbers, under the names that scripts know.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Figures {
    /// [`Report::total`].
    pub total_ms: u64,
    /// [`Report::setup`].
    pub setup_ms: u64,
    /// [`Report::downtime`].
    pub downtime_ms: u64,
    /// [`Report::progress`].
    #[serde(flatten)]
    pub progress: Progress,
    /// [`Report::codec`].
    pub codec: String,
    /// Seconds of CPU time in which pages were encoded, or decoded, on all channels.
    pub codec_cpu_s: f64,
    /// Bytes on the wire per second of the total time.
    pub throughput_bytes_per_s: u64,
    /// [`Report::digest`]: `equal`; not there without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<DigestVerdict>,
    /// [`Report::postcopy`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyReport>,
}

impl Report {
    pub(crate) fn of(session: &Session, total: Duration, codec: String) -> Self {
        Self {
            total,
            setup: Duration::ZERO,
            downtime: Duration::ZERO,
            progress: session.progress(),
            codec,
            confirmed: true,
            ledger: DowntimeLedger::default(),
            decisions: Vec::new(),
            xbzrle: None,
            zero_copy: None,
            postcopy: None,
            audit: None,
            digest: None,
        }
    }

    /// Why the guest stood still for longer than `limit`, if it did: which part of the ledger took
    /// the most, and what had been expected.
    pub fn over_limit(&self, limit: Duration) -> Option<String> {
        if self.downtime <= limit {
            return None;
        }
        let (part, most) = self.ledger.parts().into_iter().max_by_key(|(_, micros)| *micros)?;
        let expected = self.decisions.last().map_or(0, |round| round.expected_downtime_us);
        Some(format!(
            "{:.1?} are over the limit of {limit:?}: {part} took {} ms, {} ms were expected in all",
            self.downtime,
            most / 1000,
            expected / 1000
        ))
    }

    /// Plain numbers: times in ms, throughput as bytes on the wire per second of total time.
    pub fn figures(&self) -> Figures {
        Figures {
            codec: self.codec.clone(),
            digest: self.digest,
            postcopy: self.postcopy.clone(),
            ..Figures::of(&self.progress, self.total, self.setup, self.downtime)
        }
    }
}

impl Figures {
    /// The counters of a migration that did not end well; no times.
    pub fn so_far(progress: &Progress) -> Self {
        let none = Duration::ZERO;
        Self { throughput_bytes_per_s: 0, ..Self::of(progress, none, none, none) }
    }

    fn of(progress: &Progress, total: Duration, setup: Duration, downtime: Duration) -> Self {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let per_second = u128::from(progress.wire_bytes) * 1_000_000 / total.as_micros().max(1);
        Self {
            total_ms: ms(total),
            setup_ms: ms(setup),
            downtime_ms: ms(downtime),
            progress: progress.clone(),
            codec: String::new(),
            codec_cpu_s: progress.codec_us as f64 / 1e6,
            digest: None,
            postcopy: None,
            throughput_bytes_per_s: u64::try_from(per_second).unwrap_or(u64::MAX),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (figures, progress) = (self.figures(), &self.progress);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(f, "total        {} ms (setup {} ms)", figures.total_ms, figures.setup_ms)?;
        writeln!(f, "downtime     {} ms", figures.downtime_ms)?;
        writeln!(f, "RAM          {:.1} MiB", mib(progress.ram_bytes))?;
        writeln!(
            f,
            "on the wire  {:.1} MiB at {:.1} MiB/s",
            mib(progress.wire_bytes),
            mib(figures.throughput_bytes_per_s)
        )?;
        writeln!(
            f,
            "pages        {} normal, {} zero, {} xbzrle in {} rounds",
            progress.pages_normal, progress.pages_zero, progress.pages_xbzrle, progress.rounds
        )?;
        write!(f, "channels     {} ({})", progress.channels, figures.codec)?;
        if progress.codec_us > 0 {
            let (saved, seconds) = (mib(progress.bytes_saved), figures.codec_cpu_s);
            write!(f, "\ncodec        {saved:.1} MiB saved in {seconds:.2} s of this end's CPUs")?;
        }
        if let Some(DigestVerdict::Equal) = self.digest {
            f.write_str("\ndigest       equal")?;
        }
        if let Some(stats) = &self.xbzrle {
            let looked_up = (stats.hits + stats.misses).max(1);
            let off = if stats.switched_off { ", switched off" } else { "" };
            write!(
                f,
                "\nxbzrle       {} % hits, {:.1} MiB saved{off}",
                stats.hits * 100 / looked_up,
                mib(stats.saved_bytes)
            )?;
        }
        if let Some(ZeroCopyStats { sends, copied, refused }) = &self.zero_copy {
            write!(
                f,
                "\nzero-copy    {sends} sends, {copied} copied by the kernel all the same, {refused} refused"
            )?;
        }
        if let Some(postcopy) = &self.postcopy {
            write!(f, "\npost-copy    {postcopy}")?;
        }
        if !self.decisions.is_empty() {
            write!(f, "\nledger       {}", self.ledger)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_scripts_know_are_there_with_or_without_a_result() {
        let session = Session::new(Duration::from_secs(1));
        session.counters.thread(0);
        let figures = [
            Figures::so_far(&session.progress()),
            Report::of(&session, Duration::from_secs(1), "none".to_owned()).figures(),
        ];
        for figures in figures.map(|figures| serde_json::to_value(figures).unwrap()) {
            let numbers = [
                "total_ms",
                "setup_ms",
                "downtime_ms",
                "rounds",
                "ram_bytes",
                "wire_bytes",
                "pages_normal",
                "pages_zero",
                "pages_xbzrle",
                "channels",
                "throughput_bytes_per_s",
                "bytes_saved",
            ];
            assert!(numbers.iter().all(|key| figures[key].is_u64()), "{figures}");
            assert!(figures["codec"].is_string() && figures["codec_cpu_s"].is_f64(), "{figures}");
            assert_eq!(figures["per_channel"][1]["name"], "thread 0");
            assert_eq!(figures["per_channel"][1]["pages_normal"], 0);
        }
    }
}
