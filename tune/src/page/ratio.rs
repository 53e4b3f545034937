//! Plot of compression ratio over encoding speed.

use multifd_codecs::{CodecChoice, CodecFamily};

use super::axis::{Axis, decades_around, extent};
use super::labels::{Rect, Room, brief, text_width};
use super::number::{bytes_per_s, ratio};
use super::plot::{Anchor, Drawing, Layout, Margins, NARROW, WIDE, figure};
use super::series::{Series, family_look};
use crate::findings::{CodecFacts, Findings};

pub(super) fn section(findings: &Findings, series: &[Series]) -> String {
    if measured(findings).next().is_none() {
        return "<p>No compressing codec was measured.</p>\n".to_owned();
    }
    let [wide, narrow] = [WIDE, NARROW].map(|layout| plot(layout, findings, series));
    let caption = "Up and to the right is better. A line joins the levels of a codec; a bar is the 95 % interval of the ratio. \
                   Several channels encode on several cores.";
    figure(&wide, &narrow, caption)
}

/// The codecs that the plot can show, with their encoding speed.
fn measured(findings: &Findings) -> impl Iterator<Item = (&CodecFacts, f64)> {
    let positive = |value: &f64| value.is_finite() && *value > 0.0;
    findings
        .codecs
        .iter()
        .filter(|facts| facts.ratio.is_finite())
        .filter_map(move |facts| Some((facts, facts.encode_bytes_per_s.filter(positive)?)))
}

fn plot(layout: Layout, findings: &Findings, series: &[Series]) -> String {
    let (left, right) = if layout.is_wide() { (48.0, 64.0) } else { (36.0, 46.0) };
    let inner = layout.inner(Margins { left, right, top: 30.0, bottom: 48.0 });
    let speeds = decades_around(measured(findings).map(|(_, speed)| speed)).unwrap_or((1e6, 1e9));
    let ends =
        findings.codecs.iter().flat_map(|facts| [facts.ratio - error(facts), facts.ratio + error(facts)]);
    let (low, high) = extent(ends).unwrap_or((0.0, 1.0));
    let (low, high) = (low.min(0.9), high.max(1.1));
    let room = (high - low) * 0.06;
    let x = Axis::logarithmic(speeds, (inner.left, inner.right));
    let y = Axis::linear(((low - room).max(0.0), high + room), (inner.bottom, inner.top));
    let title = "Compression ratio against encoding speed of one core";
    let mut drawing = Drawing::new(layout, "ratio", title, &description(findings));
    drawing.text("axis", Anchor::Start, (2.0, layout.font), "ratio");
    drawing.levels(
        inner,
        &y,
        &y.ticks(44.0).into_iter().map(|tick| (tick, ratio_tick(tick))).collect::<Vec<_>>(),
    );
    let ticks = x.ticks(62.0).into_iter().map(|tick| (tick, bytes_per_s(tick)));
    drawing.columns(inner, inner.bottom, &x, &ticks.collect::<Vec<_>>());
    let middle = (inner.left + inner.right) / 2.0;
    drawing.text(
        "axis",
        Anchor::Middle,
        (middle, inner.bottom + layout.font * 3.25),
        "encoding speed of one core",
    );

    let mut room = Room::new(Rect { left: inner.left + 2.0, right: layout.width, ..inner });
    unlimited(&mut drawing, &mut room, inner, findings, &y);
    draw(&mut drawing, &mut room, findings, (&x, &y));
    name(&mut drawing, &mut room, findings, series, (&x, &y));
    drawing.finish()
}

fn error(facts: &CodecFacts) -> f64 {
    if facts.ratio_error.is_finite() { facts.ratio_error.max(0.0) } else { 0.0 }
}

/// A ratio without trailing zeros: `2`, `2.5`, `1.05`
fn ratio_tick(tick: f64) -> String {
    ratio(tick).trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A codec without a speed limit, as a horizontal line with its name at the right.
fn unlimited(drawing: &mut Drawing, room: &mut Room, inner: Rect, findings: &Findings, y: &Axis) {
    let font = drawing.layout.font;
    for facts in &findings.codecs {
        if facts.encode_bytes_per_s.is_some() || !facts.ratio.is_finite() {
            continue;
        }
        let (look, height) = (family_look(facts.codec.family()), y.place(facts.ratio));
        let title = format!("{}: {}, no speed limit", facts.codec, ratio(facts.ratio));
        drawing.path(&format!("line s{look}"), &[(inner.left, height), (inner.right, height)], &title);
        room.take(Rect { left: inner.left, right: inner.right, top: height - 2.0, bottom: height + 2.0 });
        let left = inner.right + 4.0;
        let rect =
            Rect { left, right: drawing.layout.width, top: height - font * 0.7, bottom: height + font * 0.7 };
        if room.first_free(&[rect]).is_some() {
            drawing.text(
                &format!("name s{look}"),
                Anchor::Start,
                (left, height + font * 0.35),
                &brief(&facts.codec.to_string()),
            );
        }
    }
}

/// Draws lines, error bars and marks, and reserves their places.
fn draw(drawing: &mut Drawing, room: &mut Room, findings: &Findings, (x, y): (&Axis, &Axis)) {
    let mut last: Option<(CodecFamily, (f64, f64))> = None;
    for (facts, speed) in measured(findings) {
        let family = facts.codec.family();
        let (place, look) = ((x.place(speed), y.place(facts.ratio)), family_look(family));
        if let Some((_, from)) = last.filter(|(before, _)| *before == family) {
            drawing.path(&format!("joint s{look}"), &[from, place], family.name());
            // Small rectangles along the line.
            for step in 0..=20 {
                let share = f64::from(step) / 20.0;
                let at = (from.0 + (place.0 - from.0) * share, from.1 + (place.1 - from.1) * share);
                room.take(Rect { left: at.0 - 1.0, right: at.0 + 1.0, top: at.1 - 1.0, bottom: at.1 + 1.0 });
            }
        }
        last = Some((family, place));
    }
    for (facts, speed) in measured(findings) {
        let (place, look) = ((x.place(speed), y.place(facts.ratio)), family_look(facts.codec.family()));
        let (top, bottom) = (y.place(facts.ratio + error(facts)), y.place(facts.ratio - error(facts)));
        drawing.segment(&format!("error s{look}"), (place.0, top), (place.0, bottom));
        for end in [top, bottom] {
            drawing.segment(&format!("error s{look}"), (place.0 - 3.0, end), (place.0 + 3.0, end));
        }
        let (value, error) = (ratio(facts.ratio), ratio(error(facts)));
        let title = format!("{}: {value} ± {error} at {}", facts.codec, bytes_per_s(speed));
        drawing.marker(look, place, &title);
        let (top, bottom) = (top.min(place.1 - 5.0), bottom.max(place.1 + 5.0));
        room.take(Rect { left: place.0 - 5.0, right: place.0 + 5.0, top, bottom });
    }
}

/// Draws names where there is room: first of the codecs in the other plots, then of the ends of the
/// lines, then of the others.
fn name(
    drawing: &mut Drawing,
    room: &mut Room,
    findings: &Findings,
    series: &[Series],
    (x, y): (&Axis, &Axis),
) {
    let font = drawing.layout.font;
    let all: Vec<_> = measured(findings).collect();
    let end = |index: usize| {
        let of = |index: Option<usize>| {
            index.and_then(|index| all.get(index)).map(|(facts, _)| facts.codec.family())
        };
        let own = of(Some(index));
        of(index.checked_sub(1)) != own || of(index.checked_add(1)) != own
    };
    let rank = |index: usize, codec: CodecChoice| match () {
        () if series.iter().any(|series| series.codec == codec) => 0,
        () if end(index) => 1,
        () => 2,
    };
    let mut order: Vec<_> = all.iter().enumerate().collect();
    order.sort_by_key(|(index, (facts, _))| rank(*index, facts.codec));
    for (_, (facts, speed)) in order {
        let (left, top) = (x.place(*speed), y.place(facts.ratio));
        let label = brief(&facts.codec.to_string());
        let (width, height) = (text_width(&label, font), font * 1.3);
        let bar = (y.place(facts.ratio - error(facts)) - top).abs().max(5.0) + 1.0;
        let rect = |left: f64, top: f64| Rect { left, top, right: left + width, bottom: top + height };
        let candidates = [
            rect(left + 7.0, top - height - 1.0),
            rect(left - width / 2.0, top - bar - height),
            rect(left + 7.0, top - height / 2.0),
            rect(left - width / 2.0, top + bar),
            rect(left + 7.0, top + 2.0),
            rect(left - width - 7.0, top + 2.0),
            rect(left - width - 7.0, top - height - 1.0),
            rect(left - width - 7.0, top - height / 2.0),
        ];
        if let Some(free) = room.first_free(&candidates) {
            let class = format!("name s{}", family_look(facts.codec.family()));
            let middle = (free.left + free.right) / 2.0;
            drawing.text(&class, Anchor::Middle, (middle, free.bottom - font * 0.3), &label);
        }
    }
}

fn description(findings: &Findings) -> String {
    let all = measured(findings).map(|(facts, speed)| {
        let (value, error) = (ratio(facts.ratio), ratio(error(facts)));
        format!("{}: ratio {value} ± {error} at {}", facts.codec, bytes_per_s(speed))
    });
    all.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_ticks_have_different_numbers() {
        assert_eq!([2.0, 2.5, 1.05, 1.1, 10.0, 0.0].map(ratio_tick), ["2", "2.5", "1.05", "1.1", "10", "0"]);
    }
}
