//! Every codec at every level, each for as long as it is worth.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use multifd_codecs::{Codec, ZlibLevel, ZstdLevel, parse_codec};

use super::Result;
use super::findings::CodecFacts;
use super::measure::{Encoded, encode};
use super::memory::{Memory, politely};
use super::sample::{Plan, Sample};

/// A level that is slower than the sample is long gets so much time on the clock, and the runs that it gets through are compared
/// with what the reference makes of the same. 27 levels: less than a minute.
const BUDGET: Duration = Duration::from_millis(2000);
const QUICK_BUDGET: Duration = Duration::from_millis(300);

/// For the reference, which takes half a second where cores are free.
const REFERENCE_BUDGET: Duration = Duration::from_secs(20);

/// The fastest codec. It sees all of the sample, and more where the sample says too little.
const REFERENCE: &str = "zstd:1";

/// Half of the 95 % interval of a ratio that needs no further look, as a share of the ratio.
const EXACT_ENOUGH: f64 = 0.03;

/// Further looks, each as large as the sample: with 256 MiB, 1 GiB in all.
const MORE_LOOKS: usize = 3;

/// Levels that are tried with `--quick`.
const QUICK: [&str; 9] =
    ["zlib:1", "zlib:3", "zlib:6", "zstd:1", "zstd:2", "zstd:3", "zstd:5", "zstd:7", "zstd:9"];

/// How the codecs are measured.
pub(super) struct Bench<'a> {
    pub(super) sample: &'a Sample,
    /// That compress side by side.
    pub(super) threads: usize,
    /// Leave the cores to whoever wants them: a guest that runs here needs them more.
    pub(super) polite: bool,
    pub(super) quick: bool,
    /// No other codec than this.
    pub(super) only: Option<Arc<dyn Codec>>,
    pub(super) bar: &'a ProgressBar,
}

/// What came of it.
pub(super) struct Measured {
    pub(super) codecs: Vec<CodecFacts>,
    /// That were looked at.
    pub(super) pages: u64,
    /// Of all held pages, those that were looked at, and of these, those that are not zero; 0.0 to 1.0.
    pub(super) share: f64,
    pub(super) data_share: f64,
}

impl Bench<'_> {
    /// `plan` says where `memory` is looked at next, if the sample is not enough.
    pub(super) fn measure(&self, plan: &mut Plan, memory: &mut dyn Memory, look: u64) -> Result<Measured> {
        let reference = parse_codec(REFERENCE).map_err(|error| error.to_string())?;
        let list = self.list()?;
        self.bar.set_length(list.len() as u64 + 1);
        self.bar.set_position(0);
        self.bar.set_message(reference.describe());
        let mut known = self.encode(self.sample, &*reference, REFERENCE_BUDGET)?;
        let (mut pages, mut share) = (self.sample.pages, self.sample.share);
        let mut data = self.sample.data_share * share;
        for _ in 0..if self.quick { 0 } else { MORE_LOOKS } {
            let (ratio, error) = known.ratio(&known, share);
            if plan.is_done() || error <= ratio * EXACT_ENOUGH {
                break;
            }
            let more = plan.take(memory, look, &|_| ())?;
            known.extend(self.encode(&more, &*reference, REFERENCE_BUDGET)?);
            pages += more.pages;
            share += more.share;
            data += more.data_share * more.share;
        }
        let codecs =
            list.iter().map(|codec| self.one(&**codec, &known, share)).collect::<Result<Vec<_>>>()?;
        Ok(Measured { codecs, pages, share, data_share: data / share.max(f64::MIN_POSITIVE) })
    }

    fn one(&self, codec: &dyn Codec, reference: &Encoded, share: f64) -> Result<CodecFacts> {
        self.bar.inc(1);
        self.bar.set_message(codec.describe());
        let name = codec.describe();
        if name == "none" {
            return Ok(as_it_is(name));
        }
        if name == REFERENCE {
            return Ok(reference.facts(codec, reference, share));
        }
        let budget = if self.quick { QUICK_BUDGET } else { BUDGET };
        let encoded = self.encode(self.sample, codec, budget)?;
        Ok(encoded.facts(codec, reference, share))
    }

    fn encode(&self, sample: &Sample, codec: &dyn Codec, budget: Duration) -> Result<Encoded> {
        self.aside(|| encode(sample, codec, self.threads, budget))
    }

    /// Does what needs cores, and nothing of the memory that is looked at.
    pub(super) fn aside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        if self.polite { politely(work) } else { work() }
    }

    fn list(&self) -> Result<Vec<Arc<dyn Codec>>> {
        let mut names = vec!["none".to_owned()];
        match &self.only {
            Some(codec) if codec.describe() == "none" => {}
            Some(codec) => names.push(codec.describe()),
            None if self.quick => names.extend(QUICK.map(str::to_owned)),
            None => {
                names.extend((1..=ZlibLevel::MAX).map(|level| format!("zlib:{level}")));
                names.extend((1..=ZstdLevel::MAX).map(|level| format!("zstd:{level}")));
            }
        }
        names.iter().map(|name| parse_codec(name).map_err(|error| error.to_string())).collect()
    }
}

fn as_it_is(codec: String) -> CodecFacts {
    CodecFacts {
        codec,
        ratio: 1.0,
        ratio_error: 0.0,
        encode_bytes_per_s: None,
        decode_bytes_per_s: None,
        measured_bytes: 0,
    }
}
