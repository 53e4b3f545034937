//! Ratio and speed of a codec on the sample.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use multifd_codecs::{CodecChoice, Decoder, Encoder};
use rustix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};
use crate::findings::CodecFacts;
use crate::sample::{Run, Sample, spread};

/// A codec's result on some runs of the sample.
pub(super) struct Encoded {
    /// Bytes of pages and of payload, by the run's number; `None`: there was no time for it.
    runs: Vec<Option<(u64, u64)>>,
    encode: Duration,
    decode: Duration,
}

/// Encodes and decodes the sample as channels do, on `threads` threads at once, for about `budget`.
///
/// The order of runs is spread evenly over the sample wherever it ends. Times are of cores, not of
/// the clock: other load on the machine does not count.
pub(super) fn encode(
    sample: &Sample,
    codec: CodecChoice,
    threads: usize,
    budget: Duration,
) -> Result<Encoded> {
    let order = spread(sample.runs.len());
    let next = AtomicUsize::new(0);
    let begin = Instant::now();
    let work = || -> Result<Vec<RunCost>> {
        let mut lane = Lane::new(codec)?;
        let mut done = Vec::new();
        while let Some(number) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Some(run) = sample.runs.get(*number) else { break };
            done.push(lane.run(*number, run)?);
            if begin.elapsed() >= budget {
                break;
            }
        }
        Ok(done)
    };
    let mut all =
        Encoded { runs: vec![None; sample.runs.len()], encode: Duration::ZERO, decode: Duration::ZERO };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for lane in lanes {
            for run in lane.join().map_err(|_| Error::Bug("a measuring thread panicked"))?? {
                all.note(&run);
            }
        }
        Ok(all)
    })
}

/// The cost of one run: bytes, and time on a core.
struct RunCost {
    number: usize,
    raw: u64,
    payload: u64,
    encode: Duration,
    decode: Duration,
}

/// One channel: an encoder, and the decoder at its other end.
struct Lane {
    codec: CodecChoice,
    encoder: Box<dyn Encoder>,
    decoder: Box<dyn Decoder>,
    pages: Vec<u8>,
    payload: Vec<u8>,
    back: Vec<u8>,
}

impl Lane {
    fn new(codec: CodecChoice) -> Result<Self> {
        let factory = codec.codec();
        Ok(Self {
            codec,
            encoder: factory.encoder().map_err(|source| failed(codec, source))?,
            decoder: factory.decoder().map_err(|source| failed(codec, source))?,
            pages: Vec::new(),
            payload: Vec::new(),
            back: Vec::new(),
        })
    }

    fn run(&mut self, number: usize, run: &Run) -> Result<RunCost> {
        let none = Duration::ZERO;
        let mut cost = RunCost { number, raw: run.bytes(), payload: 0, encode: none, decode: none };
        for batch in &run.batches {
            let begin = core_time();
            // As a sender does: guest memory may change under a codec.
            self.pages.clear();
            self.pages.extend_from_slice(batch);
            self.payload.clear();
            let encoded = self.encoder.prepare(&self.pages, &mut self.payload);
            encoded.map_err(|source| failed(self.codec, source))?;
            let encoded = core_time();
            self.back.resize(self.pages.len(), 0);
            let decoded = self.decoder.recv_pages(&self.payload, &mut self.back);
            decoded.map_err(|source| failed(self.codec, source))?;
            cost.encode += encoded.saturating_sub(begin);
            cost.decode += core_time().saturating_sub(encoded);
            cost.payload += self.payload.len() as u64;
        }
        Ok(cost)
    }
}

fn failed(codec: CodecChoice, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Codec { codec, source: Box::new(source) }
}

/// Time that this thread has spent on a core.
pub(super) fn core_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Encoded {
    fn note(&mut self, cost: &RunCost) {
        if let Some(run) = self.runs.get_mut(cost.number) {
            *run = Some((cost.raw, cost.payload));
        }
        self.encode += cost.encode;
        self.decode += cost.decode;
    }

    /// Adds the same codec's result on another part of the memory.
    pub(super) fn extend(&mut self, other: Self) {
        self.runs.extend(other.runs);
        self.encode += other.encode;
        self.decode += other.decode;
    }

    /// Bytes of pages and bytes of payload over all runs.
    fn sums(&self) -> (u64, u64) {
        let done = self.runs.iter().flatten();
        done.fold((0, 0), |(raw, payload), (of, to)| (raw + of, payload + to))
    }

    /// The ratio over all of the sample, and half of its 95 % interval.
    ///
    /// `reference` has encoded all of it, and perhaps more of the memory. A slower codec, which has
    /// not, is compared with it on the runs that both have encoded: what is easy or hard for both
    /// cancels out.
    pub(super) fn ratio(&self, reference: &Self, share: f64) -> (f64, f64) {
        let (raw_all, reference_all) = reference.sums();
        let known = || {
            let pairs = self.runs.iter().zip(&reference.runs);
            pairs.filter_map(|(own, other)| Some(((*own)?, (*other)?)))
        };
        let (own, other) = known().fold((0, 0), |(own, other), ((_, a), (_, b))| (own + a, other + b));
        if own == 0 || other == 0 {
            return (1.0, 0.0);
        }
        let to_reference = own as f64 / other as f64;
        let payload = reference_all as f64 * to_reference;
        let ratio = raw_all as f64 / payload;
        // Two estimates: from these runs to the sample, and from the sample to the memory.
        let to_sample =
            spread_of(known().map(|((_, own), (_, other))| own as f64 - to_reference * other as f64));
        let cost = reference_all as f64 / raw_all as f64;
        let to_memory = spread_of(
            reference.runs.iter().flatten().map(|(raw, payload)| *payload as f64 - cost * *raw as f64),
        );
        let finished = known().count() as f64 / reference.runs.len().max(1) as f64;
        let first = to_sample * (1.0 - finished).max(0.0).sqrt() / own as f64;
        let second = to_memory * (1.0 - share).max(0.0).sqrt() / reference_all as f64;
        let error = ratio * INTERVAL * first.hypot(second);
        // One run does not show how much runs differ.
        let alone = known().count() < 2 && (finished < 1.0 || share < 1.0);
        (ratio, if alone { ratio } else { error })
    }

    pub(super) fn facts(&self, codec: CodecChoice, reference: &Self, share: f64) -> CodecFacts {
        let (raw, _) = self.sums();
        let per_second = |time: Duration| Some(raw as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE));
        let (ratio, ratio_error) = self.ratio(reference, share);
        CodecFacts {
            codec,
            ratio,
            ratio_error,
            encode_bytes_per_s: per_second(self.encode),
            decode_bytes_per_s: per_second(self.decode),
            measured_bytes: raw,
        }
    }
}

/// Half the width of a normal distribution's 95 % interval, in standard errors.
const INTERVAL: f64 = 1.96;

/// Standard error of the sum of these values, each with a mean of 0.
fn spread_of(values: impl Iterator<Item = f64>) -> f64 {
    let (count, squares) = values.fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value * value));
    if count > 1.0 { (squares * count / (count - 1.0)).sqrt() } else { 0.0 }
}
