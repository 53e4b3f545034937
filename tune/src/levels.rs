//! The measurement of all codecs at all levels within a time budget.

use std::time::Duration;

use multifd_codecs::{CodecChoice, ZlibLevel, ZstdLevel};

use crate::config::Progress;
use crate::error::Result;
use crate::findings::CodecFacts;
use crate::measure::{Encoded, encode};
use crate::memory::{Memory, politely};
use crate::sample::{Plan, Sample};

/// Time on the clock for a level that does not get through the sample before; the runs that it gets
/// through are compared with the reference's result for the same runs. 27 levels: less than a
/// minute.
const BUDGET: Duration = Duration::from_millis(2000);
const QUICK_BUDGET: Duration = Duration::from_millis(300);

/// Time for the reference, which takes half a second where cores are free.
const REFERENCE_BUDGET: Duration = Duration::from_secs(20);

/// The fastest codec. It encodes all of the sample, and more parts where the sample is not exact
/// enough.
const REFERENCE: CodecChoice = CodecChoice::zstd::<1>();

/// Half of the 95 % interval of a ratio that is exact enough, as a share of the ratio.
const EXACT_ENOUGH: f64 = 0.03;

/// Most further parts, each as large as the sample: with 256 MiB, 1 GiB in all.
const MORE_PARTS: usize = 3;

/// Levels of a quick measurement.
const QUICK: [CodecChoice; 9] = [
    CodecChoice::zlib::<1>(),
    CodecChoice::zlib::<3>(),
    CodecChoice::zlib::<6>(),
    CodecChoice::zstd::<1>(),
    CodecChoice::zstd::<2>(),
    CodecChoice::zstd::<3>(),
    CodecChoice::zstd::<5>(),
    CodecChoice::zstd::<7>(),
    CodecChoice::zstd::<9>(),
];

/// Settings of the measurement.
pub(crate) struct Bench<'a> {
    pub(crate) sample: &'a Sample,
    /// Threads that compress at once.
    pub(crate) threads: usize,
    /// Run on idle cores only: the guest is live on this machine and has precedence.
    pub(crate) polite: bool,
    pub(crate) quick: bool,
    /// The only codec to measure beside none.
    pub(crate) only: Option<CodecChoice>,
    pub(crate) progress: &'a dyn Fn(Progress),
}

/// Measurements of all codecs.
pub(crate) struct Measured {
    pub(crate) codecs: Vec<CodecFacts>,
    /// Pages sampled.
    pub(crate) pages: u64,
    /// Share of the held pages that was sampled, 0.0 to 1.0.
    pub(crate) share: f64,
    /// Share of the sampled pages that are not zero, 0.0 to 1.0.
    pub(crate) data_share: f64,
}

impl Bench<'_> {
    /// Measures all codecs; takes further parts of `memory`, of about `limit` bytes, where the
    /// sample is not exact enough.
    pub(crate) fn measure(&self, plan: &mut Plan, memory: &mut dyn Memory, limit: u64) -> Result<Measured> {
        let list = self.list();
        let total = list.len() as u64 + 1;
        (self.progress)(Progress { done: 0, total, codec: Some(REFERENCE) });
        let mut known = self.encode(self.sample, REFERENCE, REFERENCE_BUDGET)?;
        let (mut pages, mut share) = (self.sample.pages, self.sample.share);
        let mut data = self.sample.data_share * share;
        for _ in 0..if self.quick { 0 } else { MORE_PARTS } {
            let (ratio, error) = known.ratio(&known, share);
            if plan.is_done() || error <= ratio * EXACT_ENOUGH {
                break;
            }
            let more = plan.take(memory, limit, &|_| ())?;
            known.extend(self.encode(&more, REFERENCE, REFERENCE_BUDGET)?);
            pages += more.pages;
            share += more.share;
            data += more.data_share * more.share;
        }
        let mut codecs = Vec::new();
        for (done, codec) in (1..).zip(list) {
            (self.progress)(Progress { done, total, codec: Some(codec) });
            codecs.push(self.one(codec, &known, share)?);
        }
        Ok(Measured { codecs, pages, share, data_share: data / share.max(f64::MIN_POSITIVE) })
    }

    fn one(&self, codec: CodecChoice, reference: &Encoded, share: f64) -> Result<CodecFacts> {
        match codec {
            CodecChoice::None => Ok(uncompressed()),
            REFERENCE => Ok(reference.facts(codec, reference, share)),
            _ => {
                let budget = if self.quick { QUICK_BUDGET } else { BUDGET };
                Ok(self.encode(self.sample, codec, budget)?.facts(codec, reference, share))
            }
        }
    }

    fn encode(&self, sample: &Sample, codec: CodecChoice, budget: Duration) -> Result<Encoded> {
        let threads = self.threads;
        self.aside(|| encode(sample, codec, threads, budget))
    }

    /// Runs work that needs cores and does not touch the guest.
    pub(crate) fn aside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        if self.polite { politely(work) } else { work() }
    }

    /// None, and what is to be compared with it.
    fn list(&self) -> Vec<CodecChoice> {
        let mut list = vec![CodecChoice::None];
        match self.only {
            Some(CodecChoice::None) => {}
            Some(codec) => list.push(codec),
            None if self.quick => list.extend(QUICK),
            None => {
                list.extend(
                    (1..=ZlibLevel::MAX)
                        .filter_map(|level| ZlibLevel::new(level).ok())
                        .map(CodecChoice::Zlib),
                );
                list.extend(
                    (1..=ZstdLevel::MAX)
                        .filter_map(|level| ZstdLevel::new(level).ok())
                        .map(CodecChoice::Zstd),
                );
            }
        }
        list
    }
}

fn uncompressed() -> CodecFacts {
    CodecFacts {
        codec: CodecChoice::None,
        ratio: 1.0,
        ratio_error: 0.0,
        encode_bytes_per_s: None,
        decode_bytes_per_s: None,
        measured_bytes: 0,
    }
}
