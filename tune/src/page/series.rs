//! The codecs that the plots show, and the look of each, the same in all plots.

use multifd_codecs::{CodecChoice, CodecFamily};

use super::envelope::lowest;
use crate::findings::Findings;

/// Most lines in a plot: more cannot be told apart.
const MOST: usize = 6;

/// Usual settings, shown after the codecs that are best somewhere.
const USUAL: [CodecChoice; 6] = [
    CodecChoice::None,
    CodecChoice::zstd::<1>(),
    CodecChoice::zlib::<1>(),
    CodecChoice::zstd::<3>(),
    CodecChoice::zlib::<6>(),
    CodecChoice::zstd::<9>(),
];

/// Looks (colour, dash, marker) in the style sheet, in the order in which the codecs of a family
/// take them; 0 is that of none. Levels of one family differ in dash and marker, not in colour
/// alone.
const ZSTD: [usize; 5] = [1, 3, 4, 5, 6];
const ZLIB: [usize; 5] = [2, 5, 6, 4, 3];
const OTHER: [usize; 5] = [4, 6, 5, 3, 1];

/// A codec that the plots show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Series {
    pub(super) codec: CodecChoice,
    /// Index of its class in the style sheet, `s0` to `s6`.
    pub(super) look: usize,
}

/// The codecs to show, in the order of the tables: none, the advised ones, those best somewhere,
/// and the usual levels.
pub(super) fn chosen(findings: &Findings) -> Vec<Series> {
    let curves = &findings.curves;
    let drawn = || curves.total_by_link.iter().chain(&curves.downtime_by_dirty_rate).map(|curve| curve.codec);
    let mut stretches = lowest(&curves.total_by_link.iter().collect::<Vec<_>>());
    // The widest first.
    stretches.sort_by(|a, b| (b.to / b.from).total_cmp(&(a.to / a.from)));
    let advised = &findings.advice;
    let codec = |index: usize| Some(findings.predictions.get(index)?.codec);
    let wanted = std::iter::once(CodecChoice::None)
        .chain(advised.iter().filter_map(|advice| codec(advice.best)))
        .chain(stretches.iter().map(|stretch| stretch.codec))
        .chain(advised.iter().filter_map(|advice| codec(advice.runner_up?)))
        .chain(USUAL)
        .chain(drawn());
    let mut codecs: Vec<CodecChoice> = Vec::new();
    for codec in wanted {
        if codecs.len() < MOST && !codecs.contains(&codec) && drawn().any(|drawn| drawn == codec) {
            codecs.push(codec);
        }
    }
    let place = |codec: CodecChoice| findings.codecs.iter().position(|facts| facts.codec == codec);
    codecs.sort_by_key(|codec| place(*codec).unwrap_or(usize::MAX));
    dressed(&codecs)
}

/// The look of a codec: its own in the plots, otherwise that of its family.
pub(super) fn look(series: &[Series], codec: CodecChoice) -> usize {
    series
        .iter()
        .find(|series| series.codec == codec)
        .map_or_else(|| family_look(codec.family()), |series| series.look)
}

/// The look of a whole family.
pub(super) fn family_look(family: CodecFamily) -> usize {
    match family {
        CodecFamily::None => 0,
        family => looks(family)[0],
    }
}

fn looks(family: CodecFamily) -> [usize; 5] {
    match family {
        CodecFamily::Zlib => ZLIB,
        CodecFamily::Zstd => ZSTD,
        _ => OTHER,
    }
}

/// Gives each codec a look of its own.
fn dressed(codecs: &[CodecChoice]) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for &codec in codecs {
        let free = |look: &usize| series.iter().all(|other| other.look != *look);
        let look = match codec.family() {
            CodecFamily::None => 0,
            family => looks(family).into_iter().find(free).unwrap_or_default(),
        };
        series.push(Series { codec, look });
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::fixture;

    #[test]
    fn none_and_the_advised_codecs_are_shown_each_in_its_own_look() {
        let findings = fixture::realistic();
        let series = chosen(&findings);
        assert_eq!(series.len(), MOST);
        assert_eq!((series[0].codec, series[0].look), (CodecChoice::None, 0));
        for advice in &findings.advice {
            let best = findings.predictions[advice.best].codec;
            assert!(series.iter().any(|series| series.codec == best), "{best}");
        }
        let mut looks: Vec<_> = series.iter().map(|series| series.look).collect();
        looks.sort_unstable();
        looks.dedup();
        assert_eq!(looks.len(), MOST, "each look once");
    }

    #[test]
    fn without_curves_nothing_is_shown() {
        assert!(chosen(&fixture::empty()).is_empty());
    }
}
