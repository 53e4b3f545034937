//! Plot of total time over link speed. The best codec changes where lines cross.

use multifd_codecs::CodecChoice;

use super::axis::{Axis, extent};
use super::envelope::{Stretch, drawable, height, lowest};
use super::labels::Rect;
use super::number::{bits_per_s, time_s};
use super::plot::{Anchor, Drawing, Layout, Margins, NARROW, WIDE, figure};
use super::series::{self, Series};
use crate::curves::LINKS;
use crate::findings::{Curve, Findings};

/// Usual links in Mbit/s, each with the number at the axis, which is of the unit below it.
const KNOWN: [(f64, &str); 6] =
    [(10.0, "10"), (100.0, "100"), (1e3, "1"), (10e3, "10"), (25e3, "25"), (100e3, "100")];

/// Bytes per second of a Mbit/s.
const MBIT: f64 = 125e3;

/// Times at the axis as `(seconds, text, coarse)`; those not coarse are for plots of few decades.
const TIMES: [(f64, &str, bool); 19] = [
    (0.001, "1 ms", true),
    (0.003, "3 ms", false),
    (0.01, "10 ms", true),
    (0.03, "30 ms", false),
    (0.1, "0.1 s", true),
    (0.3, "0.3 s", false),
    (1.0, "1 s", true),
    (3.0, "3 s", false),
    (10.0, "10 s", true),
    (30.0, "30 s", false),
    (60.0, "1 min", true),
    (180.0, "3 min", false),
    (600.0, "10 min", true),
    (1800.0, "30 min", false),
    (3600.0, "1 h", true),
    (10_800.0, "3 h", false),
    (36_000.0, "10 h", true),
    (86_400.0, "1 day", false),
    (864_000.0, "10 days", true),
];

/// The plot, and the same as a list above it.
pub(super) fn section(findings: &Findings, series: &[Series]) -> String {
    let curves = shown(&findings.curves.total_by_link, series);
    if curves.iter().all(|(_, curve)| drawable(curve).is_empty()) {
        return "<p>There is no prediction over link speeds.</p>\n".to_owned();
    }
    let stretches = lowest(&curves.iter().map(|(_, curve)| *curve).collect::<Vec<_>>());
    let [wide, narrow] = [WIDE, NARROW].map(|layout| plot(layout, &curves, &stretches));
    let all = lowest(&findings.curves.total_by_link.iter().collect::<Vec<_>>());
    let left_out = all.iter().any(|stretch| series.iter().all(|series| series.codec != stretch.codec));
    let more = " Other levels are a little faster in places: not all are drawn.";
    let caption = format!(
        "Both axes are logarithmic. The band on top names the fastest codec; it changes where lines cross.{}",
        if left_out { more } else { "" },
    );
    format!("{}{}", words(&stretches, series), figure(&wide, &narrow, &caption))
}

/// The curves of the shown codecs.
pub(super) fn shown<'a>(curves: &'a [Curve], series: &'a [Series]) -> Vec<(&'a Series, &'a Curve)> {
    let curve = |series: &'a Series| Some((series, curves.iter().find(|curve| curve.codec == series.codec)?));
    series.iter().filter_map(curve).collect()
}

fn words(stretches: &[Stretch], series: &[Series]) -> String {
    let last = stretches.len().saturating_sub(1);
    let item = |(index, stretch): (usize, &Stretch)| {
        let (from, to) = (bits_per_s(stretch.from), bits_per_s(stretch.to));
        let range = match index {
            0 if last == 0 => "at every speed".to_owned(),
            0 => format!("up to {to}"),
            _ if index == last => format!("above {from}"),
            _ => format!("{from} to {to}"),
        };
        let (look, codec) = (series::look(series, stretch.codec), stretch.codec);
        format!("<li><span class=\"chip s{look}\">{codec}</span> {range}</li>\n")
    };
    let items: String = stretches.iter().enumerate().map(item).collect();
    format!(
        "<p id=\"fastest\">The fastest codec:</p>\n<ul class=\"stretches\" aria-labelledby=\"fastest\">\n{items}</ul>\n"
    )
}

fn plot(layout: Layout, curves: &[(&Series, &Curve)], stretches: &[Stretch]) -> String {
    let margins = if layout.is_wide() {
        Margins { left: 62.0, right: 78.0, top: 68.0, bottom: 64.0 }
    } else {
        Margins { left: 52.0, right: 64.0, top: 68.0, bottom: 64.0 }
    };
    let inner = layout.inner(margins);
    let heights = || curves.iter().flat_map(|(_, curve)| drawable(curve)).map(|point| point.1);
    let (low, high) = extent(heights()).unwrap_or((1.0, 10.0));
    let x = Axis::logarithmic(LINKS, (inner.left, inner.right));
    let y = Axis::logarithmic((low * 0.8, high * 1.25), (inner.bottom, inner.top));
    let title = "Total time of the move against the speed of the link";
    let mut drawing = Drawing::new(layout, "total", title, &description(curves, stretches));
    drawing.text("axis", Anchor::Start, (2.0, layout.font), "total time");
    axes(&mut drawing, inner, &x, &y);

    let look = |codec: CodecChoice| {
        curves.iter().find(|(series, _)| series.codec == codec).map_or(0, |(series, _)| series.look)
    };
    let dressed: Vec<_> = stretches.iter().map(|stretch| (look(stretch.codec), stretch)).collect();
    drawing.band(inner, &x, &dressed, bits_per_s);
    drawing.text(
        "axis",
        Anchor::End,
        (inner.left - 7.0, inner.top - layout.font * 0.95),
        if layout.is_wide() { "fastest" } else { "best" },
    );
    let mut ends = Vec::new();
    for (look, stretch) in &dressed {
        let found = curves.iter().find(|(series, _)| series.codec == stretch.codec);
        let points = found.map(|(_, curve)| drawable(curve)).unwrap_or_default();
        drawing.path(&format!("best s{look}"), &within(&points, stretch, &x, &y), "the fastest");
    }
    for (series, curve) in curves {
        let points: Vec<_> = drawable(curve).into_iter().filter(|point| x.holds(point.0)).collect();
        let places: Vec<_> = points.iter().map(|point| (x.place(point.0), y.place(point.1))).collect();
        drawing.path(&format!("line s{}", series.look), &places, &series.codec.to_string());
        for (speed, _) in KNOWN {
            let Some(seconds) = height(&points, speed * MBIT) else { continue };
            let title = format!("{} at {}: {}", series.codec, bits_per_s(speed * MBIT), time_s(seconds));
            drawing.marker(series.look, (x.place(speed * MBIT), y.place(seconds)), &title);
        }
        ends.extend(places.last().map(|end| (series.look, series.codec.to_string(), *end)));
    }
    drawing.names(inner, &ends);
    drawing.finish()
}

/// The part of a curve that is in a stretch.
fn within(points: &[(f64, f64)], stretch: &Stretch, x: &Axis, y: &Axis) -> Vec<(f64, f64)> {
    let end = |at: f64| height(points, at).map(|height| (at, height));
    let inside = points.iter().copied().filter(|point| point.0 > stretch.from && point.0 < stretch.to);
    let all = end(stretch.from).into_iter().chain(inside).chain(end(stretch.to));
    all.map(|point| (x.place(point.0), y.place(point.1))).collect()
}

fn axes(drawing: &mut Drawing, inner: Rect, x: &Axis, y: &Axis) {
    let font = drawing.layout.font;
    let all: Vec<_> = TIMES.iter().filter(|time| y.holds(time.0)).collect();
    let coarse = all.len() > 8;
    let times = all.iter().filter(|time| time.2 || !coarse).map(|time| (time.0, time.1.to_owned()));
    drawing.levels(inner, y, &times.collect::<Vec<_>>());
    let links = KNOWN.map(|(speed, number)| (speed * MBIT, number.to_owned()));
    drawing.columns(inner, inner.bottom, x, &links);
    // A unit is written once for all numbers above it.
    for (unit, from, to) in [("Mbit/s", 10.0, 100.0), ("Gbit/s", 1e3, 100e3)] {
        let (from, to) = (x.place(from * MBIT) - font, x.place(to * MBIT) + font);
        let line = inner.bottom + font * 2.0;
        drawing.segment("unit", (from, line), (to, line));
        drawing.text("tick", Anchor::Middle, ((from + to) / 2.0, line + font * 1.15), unit);
    }
    let middle = (inner.left + inner.right) / 2.0;
    drawing.text("axis", Anchor::Middle, (middle, inner.bottom + font * 4.6), "speed of the link");
}

fn description(curves: &[(&Series, &Curve)], stretches: &[Stretch]) -> String {
    let lines: Vec<_> = curves.iter().map(|(series, _)| series.codec.to_string()).collect();
    let best = stretches.iter().map(|stretch| {
        format!("{} from {} to {}", stretch.codec, bits_per_s(stretch.from), bits_per_s(stretch.to))
    });
    format!("Lines for {}. The fastest: {}.", lines.join(", "), best.collect::<Vec<_>>().join("; "))
}
