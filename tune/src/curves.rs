//! The model over ranges of links and dirty rates, for plots.

use multifd_codecs::CodecChoice;

use super::findings::{CodecFacts, Curve, Curves, DirtyFacts};
use super::model::{Ends, Model, Setting};

/// Speeds of links in bytes per second, from 10 Mbit/s to 100 Gbit/s; ten per decade, so that a
/// line looks smooth.
pub(super) const LINKS: (f64, f64) = (1.25e6, 12.5e9);
const LINK_STEPS: u32 = 40;

/// Bytes written per second, from 1 MiB to 16 GiB.
const DIRTY_RATES: (f64, f64) = (1_048_576.0, 17_179_869_184.0);
const DIRTY_STEPS: u32 = 56;

/// Usual settings; shown beside the codecs that are best somewhere.
const USUAL: [CodecChoice; 4] =
    [CodecChoice::None, CodecChoice::zlib::<1>(), CodecChoice::zstd::<1>(), CodecChoice::zstd::<3>()];

/// The curves for `channels` channels, the one over dirty rates for `link`.
pub(super) fn curves(model: &Model<'_>, codecs: &[CodecFacts], channels: usize, link: Option<f64>) -> Curves {
    let total_by_link: Vec<Curve> = codecs.iter().map(|codec| over_links(model, codec, channels)).collect();
    let shown: Vec<CodecChoice> = total_by_link
        .iter()
        .enumerate()
        .filter(|(index, curve)| USUAL.contains(&curve.codec) || is_best_somewhere(&total_by_link, *index))
        .map(|(_, curve)| curve.codec)
        .collect();
    let downtime_by_dirty_rate = codecs
        .iter()
        .filter(|codec| shown.contains(&codec.codec))
        .map(|codec| over_dirty_rates(model, codec, channels, link))
        .collect();
    let total_by_link = total_by_link.into_iter().filter(|curve| shown.contains(&curve.codec)).collect();
    Curves { total_by_link, downtime_by_dirty_rate }
}

/// Total time by link, without the links over which the move does not converge.
fn over_links(model: &Model<'_>, codec: &CodecFacts, channels: usize) -> Curve {
    let point = |rate: f64| {
        let setting = Setting { link: Some(rate), limit: None, channels, codec, ends: Ends::Multifd };
        let run = model.run(setting);
        run.converges.then_some((rate, run.total))
    };
    Curve { codec: codec.codec, points: steps(LINKS, LINK_STEPS).filter_map(point).collect() }
}

/// Downtime by dirty rate, up to the rate at which the move no longer converges. The guest writes
/// within its working set where that is known, otherwise within all of its data.
fn over_dirty_rates(model: &Model<'_>, codec: &CodecFacts, channels: usize, link: Option<f64>) -> Curve {
    let point = |rate: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "both are far below 2^63"
        )]
        let dirty = DirtyFacts {
            bytes_per_s: rate as u64,
            working_set_bytes: match model.dirty.working_set_bytes {
                0 => model.guest.data as u64,
                known => known,
            },
            ..model.dirty
        };
        let setting = Setting { link, limit: None, channels, codec, ends: Ends::Multifd };
        let run = Model { dirty, ..*model }.run(setting);
        run.converges.then_some((rate, run.downtime))
    };
    Curve { codec: codec.codec, points: steps(DIRTY_RATES, DIRTY_STEPS).map_while(point).collect() }
}

/// The first curve within a hundredth of the fastest, for some link.
fn is_best_somewhere(curves: &[Curve], index: usize) -> bool {
    let at = |curve: &Curve, rate: f64| {
        let point = curve.points.iter().find(|point| point.0 == rate);
        point.map_or(f64::MAX, |(_, seconds)| *seconds)
    };
    let Some(own) = curves.get(index) else { return false };
    own.points.iter().any(|(rate, _)| {
        let best = curves.iter().map(|curve| at(curve, *rate)).fold(f64::MAX, f64::min);
        curves.iter().position(|curve| at(curve, *rate) <= best * 1.01) == Some(index)
    })
}

/// Values at equal steps of the logarithm, both ends included.
fn steps((from, to): (f64, f64), steps: u32) -> impl Iterator<Item = f64> {
    (0..=steps).map(move |step| from * (to / from).powf(f64::from(step) / f64::from(steps)))
}
