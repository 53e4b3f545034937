//! Every way to move that was asked about.

use std::num::NonZeroU64;

use super::curves;
use super::findings::{CodecFacts, Curves, Prediction};
use super::model::{Ends, Model, Setting};
use crate::flags::{Common, Link, Tune};
use crate::human;

/// What people have between their hosts.
const LINKS: [&str; 4] = ["100Mbit/s", "1Gbit/s", "10Gbit/s", "25Gbit/s"];
const CHANNELS: [usize; 4] = [1, 2, 4, 8];

/// Over which links, with how many channels.
pub(super) struct Choices {
    pub(super) links: Vec<Link>,
    channels: Vec<usize>,
    /// Bytes per second that no move may exceed.
    max_bandwidth: Option<NonZeroU64>,
}

impl Choices {
    pub(super) fn of(flags: &Tune, common: &Common) -> Self {
        let usual = || LINKS.iter().filter_map(|link| human::link(link).ok()).collect();
        Self {
            links: if flags.link.is_empty() { usual() } else { flags.link.clone() },
            channels: if flags.channels.is_empty() { CHANNELS.to_vec() } else { flags.channels.clone() },
            max_bandwidth: common.max_bandwidth(),
        }
    }

    /// Each link with each number of channels and each codec. Without channels there is no codec.
    pub(super) fn predict(&self, model: &Model<'_>, codecs: &[CodecFacts]) -> Vec<Prediction> {
        let mut all = Vec::new();
        for link in &self.links {
            for channels in &self.channels {
                let possible = codecs.iter().filter(|codec| *channels > 0 || codec.codec == "none");
                all.extend(possible.map(|codec| self.one(model, link, *channels, codec)));
            }
        }
        all
    }

    pub(super) fn curves(&self, model: &Model<'_>, codecs: &[CodecFacts]) -> Curves {
        let channels = self.channels.iter().copied().max().unwrap_or_default();
        let link = self.links.first().and_then(|link| link.rate).map(|rate| rate.get() as f64);
        let codecs: Vec<_> =
            codecs.iter().filter(|codec| channels > 0 || codec.codec == "none").cloned().collect();
        curves::curves(model, &codecs, channels, link)
    }

    fn one(&self, model: &Model<'_>, link: &Link, channels: usize, codec: &CodecFacts) -> Prediction {
        let bytes = |rate: NonZeroU64| rate.get() as f64;
        let (rate, limit) = (link.rate.map(bytes), self.max_bandwidth.map(bytes));
        let setting = Setting { link: rate, limit, channels, codec, ends: Ends::Multifd };
        let ours = model.run(setting);
        let qemu = model.run(Setting { ends: Ends::Qemu, ..setting });
        Prediction {
            link: link.name.clone(),
            link_bytes_per_s: link.rate.map(NonZeroU64::get),
            channels,
            codec: codec.codec.clone(),
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
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float's cast stops at the limits"
)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}
