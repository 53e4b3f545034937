//! Plot of expected downtime over dirty rate, up to where the move no longer converges.

use std::fmt::Write;

use super::axis::{Axis, decades_around, extent};
use super::labels::{Rect, brief, spread, text_width};
use super::number::{bytes_per_s, time_s};
use super::plot::{Anchor, Drawing, Layout, Margins, NARROW, WIDE, figure};
use super::series::Series;
use super::total::shown;
use crate::findings::{Curve, DirtyOrigin, Findings};

/// A curve that can be drawn.
struct Line<'a> {
    series: &'a Series,
    /// Points with an `x` above 0 and a `y` of 0 or more.
    points: Vec<(f64, f64)>,
    end: (f64, f64),
    /// It still converges at the highest predicted rate, far from the limit: where it ends is not
    /// known.
    open: bool,
}

pub(super) fn section(findings: &Findings, series: &[Series]) -> String {
    let lines = lines(&findings.curves.downtime_by_dirty_rate, series, limit_s(findings));
    if lines.is_empty() {
        return "<p>There is no prediction over dirty rates.</p>\n".to_owned();
    }
    let [wide, narrow] = [WIDE, NARROW].map(|layout| plot(layout, findings, &lines));
    let link = findings.advice.first().map(|advice| advice.link.as_str()).unwrap_or("the first link");
    let caption = format!(
        "Over {link}. A line ends in a cross where the move no longer converges: the guest writes faster than \
                           it can be sent within the downtime limit."
    );
    format!("{}{}", words(&lines), figure(&wide, &narrow, &caption))
}

fn lines<'a>(curves: &'a [Curve], series: &'a [Series], limit: f64) -> Vec<Line<'a>> {
    let usable = |curve: &Curve| {
        let usable = |point: &&(f64, f64)| {
            point.0.is_finite() && point.0 > 0.0 && point.1.is_finite() && point.1 >= 0.0
        };
        curve.points.iter().filter(usable).copied().collect::<Vec<_>>()
    };
    let farthest = extent(curves.iter().flat_map(usable).map(|point| point.0)).map_or(0.0, |extent| extent.1);
    let line = |(series, curve): (&'a Series, &'a Curve)| {
        let points = usable(curve);
        let end = *points.last()?;
        Some(Line { series, points, end, open: end.0 >= farthest * 0.999 && end.1 < limit / 2.0 })
    };
    shown(curves, series).into_iter().filter_map(line).collect()
}

fn words(lines: &[Line<'_>]) -> String {
    let mut out =
        "<p id=\"converges\">The move converges while the guest writes</p>\n<ul class=\"stretches\" \
                   aria-labelledby=\"converges\">\n"
            .to_owned();
    for line in lines {
        let (look, codec) = (line.series.look, line.series.codec);
        let limit = if line.open { "at least up to" } else { "up to" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<li><span class=\"chip s{look}\">{codec}</span> {limit} {}</li>",
            bytes_per_s(line.end.0)
        );
    }
    out.push_str("</ul>\n");
    out
}

fn limit_s(findings: &Findings) -> f64 {
    findings.downtime_limit_ms as f64 / 1e3
}

/// The guest's own dirty rate, if it is known.
fn own_rate(findings: &Findings) -> Option<(f64, &'static str)> {
    let how = match findings.dirty.origin {
        DirtyOrigin::Given => "given",
        DirtyOrigin::Measured => "measured",
        DirtyOrigin::Still | DirtyOrigin::Unknown => return None,
    };
    (findings.dirty.bytes_per_s > 0).then_some((findings.dirty.bytes_per_s as f64, how))
}

fn plot(layout: Layout, findings: &Findings, lines: &[Line<'_>]) -> String {
    let (left, right) = if layout.is_wide() { (62.0, 40.0) } else { (52.0, 34.0) };
    let inner = layout.inner(Margins { left, right, top: 62.0, bottom: 68.0 });
    let own = own_rate(findings);
    let rates = lines.iter().flat_map(|line| &line.points).map(|point| point.0).chain(own.map(|own| own.0));
    let x = Axis::logarithmic(decades_around(rates).unwrap_or((1e6, 1e9)), (inner.left, inner.right));
    let limit = limit_s(findings);
    let highest = extent(lines.iter().flat_map(|line| &line.points).map(|point| point.1))
        .map_or(0.0, |extent| extent.1);
    let y = Axis::linear((0.0, highest.max(limit).max(1e-3) * 1.12), (inner.bottom, inner.top));
    let mut drawing = Drawing::new(
        layout,
        "downtime",
        "Expected downtime against dirty rate",
        &description(lines, limit, own),
    );
    drawing.text("axis", Anchor::Start, (2.0, layout.font), "downtime");
    drawing.levels(
        inner,
        &y,
        &y.ticks(40.0).into_iter().map(|tick| (tick, time_s(tick))).collect::<Vec<_>>(),
    );
    let middle = (inner.left + inner.right) / 2.0;
    let foot = inner.bottom + own.map_or(0.0, |own| mark(&mut drawing, inner, &x, own));
    let ticks = x.ticks(62.0).into_iter().map(|tick| (tick, bytes_per_s(tick)));
    drawing.columns(inner, foot, &x, &ticks.collect::<Vec<_>>());
    let name = "distinct pages written (dirty rate)";
    drawing.text("axis", Anchor::Middle, (middle, foot + layout.font * 3.25), name);
    let height = y.place(limit);
    drawing.segment("limit", (inner.left, height), (inner.right, height));
    for line in lines {
        let places: Vec<_> = line.points.iter().map(|point| (x.place(point.0), y.place(point.1))).collect();
        drawing.path(&format!("line s{}", line.series.look), &places, &line.series.codec.to_string());
    }
    ends(&mut drawing, inner, lines, (&x, &y));
    let text = format!("limit {}", time_s(limit));
    drawing.text("note halo", Anchor::Start, (inner.left + 6.0, height + layout.font * 1.2), &text);
    drawing.finish()
}

/// Marks the guest's own dirty rate, with its number below the plot. Returns the height of that
/// text.
fn mark(drawing: &mut Drawing, inner: Rect, x: &Axis, (rate, how): (f64, &str)) -> f64 {
    let font = drawing.layout.font;
    let at = x.place(rate);
    drawing.segment("own", (at, inner.top), (at, inner.bottom + font * 0.5));
    let text = format!("this guest: {} ({how})", bytes_per_s(rate));
    let half = text_width(&text, font) / 2.0;
    let centre = at.max(inner.left + half).min(drawing.layout.width - half);
    drawing.text("note", Anchor::Middle, (centre, inner.bottom + font * 1.65), &text);
    font * 1.4
}

/// The ends of the lines, with their names above the data.
fn ends(drawing: &mut Drawing, inner: Rect, lines: &[Line<'_>], (x, y): (&Axis, &Axis)) {
    let font = drawing.layout.font;
    let wanted: Vec<f64> = lines.iter().map(|line| x.place(line.end.0)).collect();
    let widths: Vec<f64> =
        lines.iter().map(|line| text_width(&brief(&line.series.codec.to_string()), font) + 5.0).collect();
    let centres = spread(&wanted, &widths, (0.0, drawing.layout.width));
    if lines.iter().any(|line| !line.open) {
        let heading = "✕ no longer converges";
        drawing.text("axis", Anchor::End, (drawing.layout.width - 2.0, font), heading);
    }
    for ((line, centre), at) in lines.iter().zip(centres).zip(wanted) {
        let (look, codec) = (line.series.look, line.series.codec.to_string());
        let place = (at, y.place(line.end.1));
        drawing.path(
            &format!("leader s{look}"),
            &[(centre, inner.top - font * 1.3), (at, inner.top), place],
            &codec,
        );
        drawing.text(
            &format!("name s{look}"),
            Anchor::Middle,
            (centre, inner.top - font * 1.7),
            &brief(&codec),
        );
        if line.open {
            drawing.marker(
                look,
                place,
                &format!("{codec} converges at least up to {}", bytes_per_s(line.end.0)),
            );
        } else {
            drawing.cross(look, place);
        }
    }
}

fn description(lines: &[Line<'_>], limit: f64, own: Option<(f64, &str)>) -> String {
    let mut out = format!("The downtime limit is {}.", time_s(limit));
    if let Some((rate, how)) = own {
        let _ = write!(out, " This guest writes {} ({how}).", bytes_per_s(rate));
    }
    for line in lines {
        let verb = if line.open { "converges at least up to" } else { "no longer converges above" };
        let _ = write!(out, " {} {verb} {}.", line.series.codec, bytes_per_s(line.end.0));
    }
    out
}
