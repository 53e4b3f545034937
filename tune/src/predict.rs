//! Predictions for every configured setting.

use std::num::NonZeroU64;

use multifd_codecs::CodecChoice;

use crate::config::{Config, Link};
use crate::curves;
use crate::findings::{CodecFacts, Curves, Prediction};
use crate::model::{Ends, Model, Setting};

/// Each link with each number of channels and each codec. Without channels there is no codec.
pub(crate) fn predictions(config: &Config, model: &Model<'_>, codecs: &[CodecFacts]) -> Vec<Prediction> {
    let mut all = Vec::new();
    for link in &config.links {
        for channels in &config.channels {
            let possible = possible(codecs, *channels);
            all.extend(possible.map(|codec| one(config, model, link, *channels, codec)));
        }
    }
    all
}

/// The curves for the first link and the most channels.
pub(crate) fn curves(config: &Config, model: &Model<'_>, codecs: &[CodecFacts]) -> Curves {
    let channels = config.channels.iter().copied().max().unwrap_or_default();
    let link = config.links.first().and_then(|link| link.rate).map(bytes_per_s);
    let codecs: Vec<_> = possible(codecs, channels).copied().collect();
    curves::curves(model, &codecs, channels, link)
}

fn possible(codecs: &[CodecFacts], channels: usize) -> impl Iterator<Item = &CodecFacts> {
    codecs.iter().filter(move |facts| channels > 0 || facts.codec == CodecChoice::None)
}

fn one(config: &Config, model: &Model<'_>, link: &Link, channels: usize, codec: &CodecFacts) -> Prediction {
    let (rate, limit) = (link.rate.map(bytes_per_s), config.max_bandwidth.map(bytes_per_s));
    let setting = Setting { link: rate, limit, channels, codec, ends: Ends::Multifd };
    let ours = model.run(setting);
    let qemu = model.run(Setting { ends: Ends::Qemu, ..setting });
    Prediction {
        link: link.name.clone(),
        link_bytes_per_s: link.rate.map(NonZeroU64::get),
        channels,
        codec: codec.codec,
        total_ms: rounded(ours.total * 1e3),
        wire_bytes: rounded(ours.wire),
        rounds: ours.rounds,
        downtime_ms: rounded(ours.downtime * 1e3),
        cpu_source_s: ours.source_core,
        cpu_destination_s: ours.destination_core,
        converges: ours.converges,
        bottleneck: ours.bottleneck,
        qemu_total_ms: rounded(qemu.total * 1e3),
        qemu_converges: qemu.converges,
    }
}

fn bytes_per_s(rate: NonZeroU64) -> f64 {
    rate.get() as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float's cast stops at the limits"
)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}
