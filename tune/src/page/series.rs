//! Which codecs the plots show, and how each looks: the same in all plots.

use super::envelope::lowest;
use crate::tune::findings::{Findings, family};

/// More lines than this are not told apart.
const MOST: usize = 6;

/// What people know, after those that are best somewhere.
const USUAL: [&str; 6] = ["none", "zstd:1", "zlib:1", "zstd:3", "zlib:6", "zstd:9"];

/// The looks (colour, dash, marker) that the style sheet has, in the order in which a family of codecs takes them.
/// 0 is for `none`. Levels of one family are told apart by dash and marker, not by colour alone.
const ZSTD: [usize; 5] = [1, 3, 4, 5, 6];
const ZLIB: [usize; 5] = [2, 5, 6, 4, 3];
const OTHER: [usize; 5] = [4, 6, 5, 3, 1];

/// A codec that the plots show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Series {
    pub(super) codec: String,
    /// Of the style sheet, 0 to 6.
    pub(super) look: usize,
}

/// The codecs to show, in the order of the tables: none, what is advised, what is best somewhere, and the usual levels.
pub(super) fn chosen(findings: &Findings) -> Vec<Series> {
    let curves = &findings.curves;
    let drawn = || {
        curves.total_by_link.iter().chain(&curves.downtime_by_dirty_rate).map(|curve| curve.codec.as_str())
    };
    let mut stretches = lowest(&curves.total_by_link.iter().collect::<Vec<_>>());
    // The widest first.
    stretches.sort_by(|a, b| (b.to / b.from).total_cmp(&(a.to / a.from)));
    let advised = &findings.advice;
    let codec = |index: usize| Some(findings.predictions.get(index)?.codec.as_str());
    let wanted = std::iter::once("none")
        .chain(advised.iter().filter_map(|advice| codec(advice.best)))
        .chain(stretches.iter().map(|stretch| stretch.codec.as_str()))
        .chain(advised.iter().filter_map(|advice| codec(advice.runner_up?)))
        .chain(USUAL)
        .chain(drawn());
    let mut codecs: Vec<&str> = Vec::new();
    for codec in wanted {
        if codecs.len() < MOST && !codecs.contains(&codec) && drawn().any(|drawn| drawn == codec) {
            codecs.push(codec);
        }
    }
    let place = |codec: &str| findings.codecs.iter().position(|facts| facts.codec == codec);
    codecs.sort_by_key(|codec| place(codec).unwrap_or(usize::MAX));
    dressed(&codecs)
}

/// The look of a codec, shown by the plots or not.
pub(super) fn look(series: &[Series], codec: &str) -> usize {
    series
        .iter()
        .find(|series| series.codec == codec)
        .map_or_else(|| family_look(codec), |series| series.look)
}

/// The look of a whole family.
pub(super) fn family_look(codec: &str) -> usize {
    match family(codec) {
        "none" => 0,
        family => looks(family)[0],
    }
}

fn looks(family: &str) -> [usize; 5] {
    match family {
        "zlib" => ZLIB,
        "zstd" => ZSTD,
        _ => OTHER,
    }
}

fn dressed(codecs: &[&str]) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for codec in codecs {
        let free = |look: &usize| series.iter().all(|other| other.look != *look);
        let look = match family(codec) {
            "none" => 0,
            family => looks(family).into_iter().find(free).unwrap_or_default(),
        };
        series.push(Series { codec: (*codec).to_owned(), look });
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::page::fixture;

    #[test]
    fn none_and_what_is_advised_are_shown_each_in_its_own_look() {
        let findings = fixture::realistic();
        let series = chosen(&findings);
        assert_eq!(series.len(), MOST);
        assert_eq!((series[0].codec.as_str(), series[0].look), ("none", 0));
        for advice in &findings.advice {
            let best = &findings.predictions[advice.best].codec;
            assert!(series.iter().any(|series| series.codec == *best), "{best}");
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
