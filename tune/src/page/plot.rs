//! SVG drawings. Each plot is drawn twice, for wide and for narrow screens, so that text stays
//! readable.

use std::fmt::Write;

use super::axis::Axis;
use super::envelope::Stretch;
use super::labels::{Rect, brief, spread, text_width};
use super::markup::escaped;
use super::number::at;

/// Sizes of a drawing, in its own units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Class in the style sheet, by which screens show or hide it.
    pub(super) class: &'static str,
    pub(super) width: f64,
    pub(super) height: f64,
    /// Font size, as in the style sheet.
    pub(super) font: f64,
}

/// For screens of 720 pixels and more, where its text is not scaled below 11 pixels.
pub(super) const WIDE: Layout = Layout { class: "wide", width: 760.0, height: 420.0, font: 13.0 };

/// For narrower screens. On a phone of 360 pixels it gets 328, and its text has 11.4.
pub(super) const NARROW: Layout = Layout { class: "narrow", width: 344.0, height: 380.0, font: 12.0 };

/// Space around the data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Margins {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl Layout {
    pub(super) fn is_wide(&self) -> bool {
        self.class == WIDE.class
    }

    /// The place of the data.
    pub(super) fn inner(&self, margins: Margins) -> Rect {
        Rect {
            left: margins.left,
            top: margins.top,
            right: self.width - margins.right,
            bottom: self.height - margins.bottom,
        }
    }
}

/// The point of a text that lies at its place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    End,
    Middle,
    Start,
}

/// A drawing under construction.
#[derive(Debug)]
pub(super) struct Drawing {
    out: String,
    pub(super) layout: Layout,
}

impl Drawing {
    /// `id` is unique in the page; `title` and `description` are for screen readers.
    pub(super) fn new(layout: Layout, id: &str, title: &str, description: &str) -> Self {
        let Layout { class, width, height, .. } = layout;
        let (title, description) = (escaped(title), escaped(description));
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<svg class=\"{class}\" viewBox=\"0 0 {} {}\" role=\"img\" \
             aria-labelledby=\"{id}-{class}-title\" aria-describedby=\"{id}-{class}-desc\">\n\
             <title id=\"{id}-{class}-title\">{title}</title>\n<desc id=\"{id}-{class}-desc\">{description}</desc>",
            at(width),
            at(height),
        );
        Self { out, layout }
    }

    pub(super) fn finish(mut self) -> String {
        self.out.push_str("</svg>\n");
        self.out
    }

    pub(super) fn text(&mut self, class: &str, anchor: Anchor, (x, y): (f64, f64), text: &str) {
        let anchor = match anchor {
            Anchor::End => "end",
            Anchor::Middle => "middle",
            Anchor::Start => "start",
        };
        let (x, y, text) = (at(x), at(y), escaped(text));
        let _ = writeln!(
            self.out,
            "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x}\" y=\"{y}\">{text}</text>"
        );
    }

    pub(super) fn segment(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let (x1, y1, x2, y2) = (at(x1), at(y1), at(x2), at(y2));
        let _ =
            writeln!(self.out, "<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>");
    }

    pub(super) fn rect(&mut self, class: &str, rect: Rect, title: &str) {
        let (x, y) = (at(rect.left), at(rect.top));
        let (width, height) = (at((rect.right - rect.left).max(0.0)), at((rect.bottom - rect.top).max(0.0)));
        let title = escaped(title);
        let _ = writeln!(
            self.out,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"><title>{title}</title></rect>"
        );
    }

    /// A line through these places.
    pub(super) fn path(&mut self, class: &str, places: &[(f64, f64)], title: &str) {
        if places.is_empty() {
            return;
        }
        let mut steps = String::new();
        for (index, (x, y)) in places.iter().enumerate() {
            let _ = write!(steps, "{}{} {}", if index == 0 { 'M' } else { 'L' }, at(*x), at(*y));
        }
        let title = escaped(title);
        let _ = writeln!(self.out, "<path class=\"{class}\" d=\"{steps}\"><title>{title}</title></path>");
    }

    /// The marker of a look: each has a shape of its own.
    pub(super) fn marker(&mut self, look: usize, (x, y): (f64, f64), title: &str) {
        let outline: &[(f64, f64)] = match look {
            0 => &[
                (-4.0, -1.7),
                (-1.7, -4.0),
                (1.7, -4.0),
                (4.0, -1.7),
                (4.0, 1.7),
                (1.7, 4.0),
                (-1.7, 4.0),
                (-4.0, 1.7),
            ],
            1 => &[(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)],
            2 => &[(0.0, -4.8), (4.6, 3.4), (-4.6, 3.4)],
            3 => &[(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)],
            4 => &[(0.0, 4.8), (4.6, -3.4), (-4.6, -3.4)],
            5 => &[(-5.0, -2.0), (5.0, -2.0), (5.0, 2.0), (-5.0, 2.0)],
            _ => &[(-5.0, 0.0), (-2.5, -4.3), (2.5, -4.3), (5.0, 0.0)],
        };
        let points: Vec<_> =
            outline.iter().map(|(dx, dy)| format!("{},{}", at(x + dx), at(y + dy))).collect();
        let (points, title) = (points.join(" "), escaped(title));
        let _ = writeln!(
            self.out,
            "<polygon class=\"mark s{look}\" points=\"{points}\"><title>{title}</title></polygon>"
        );
    }

    /// A cross at the end of a line.
    pub(super) fn cross(&mut self, look: usize, (x, y): (f64, f64)) {
        for slope in [5.0, -5.0] {
            self.segment(&format!("end s{look}"), (x - 5.0, y - slope), (x + 5.0, y + slope));
        }
    }

    /// Horizontal lines with their numbers to the left.
    pub(super) fn levels(&mut self, inner: Rect, axis: &Axis, ticks: &[(f64, String)]) {
        for (value, label) in ticks {
            let y = axis.place(*value);
            self.segment("grid", (inner.left, y), (inner.right, y));
            self.text("tick", Anchor::End, (inner.left - 7.0, y + self.layout.font * 0.35), label);
        }
    }

    /// Vertical lines with their numbers below `foot`.
    pub(super) fn columns(&mut self, inner: Rect, foot: f64, axis: &Axis, ticks: &[(f64, String)]) {
        for (value, label) in ticks {
            let x = axis.place(*value);
            self.segment("grid", (x, inner.top), (x, inner.bottom));
            self.text("tick", Anchor::Middle, (x, foot + self.layout.font * 1.65), label);
        }
    }

    /// Names at the right ends of lines, without overlap; `ends` as `(look, name, end)`.
    pub(super) fn names(&mut self, inner: Rect, ends: &[(usize, String, (f64, f64))]) {
        let size = self.layout.font * 1.35;
        let wanted: Vec<_> = ends.iter().map(|(_, _, end)| end.1).collect();
        let bounds = (inner.top, inner.bottom + size / 2.0);
        let places = spread(&wanted, &vec![size; ends.len()], bounds);
        for ((look, name, end), place) in ends.iter().zip(places) {
            let x = inner.right + 12.0;
            self.path(
                &format!("leader s{look}"),
                &[*end, (inner.right + 2.0, end.1), (x - 2.0, place)],
                name,
            );
            self.text(
                &format!("name s{look}"),
                Anchor::Start,
                (x, place + self.layout.font * 0.35),
                &brief(name),
            );
        }
    }

    /// A band above the data that names the best codec of each stretch, with the values where it
    /// changes.
    pub(super) fn band(
        &mut self,
        inner: Rect,
        axis: &Axis,
        stretches: &[(usize, &Stretch)],
        show: impl Fn(f64) -> String,
    ) {
        let font = self.layout.font;
        let (top, bottom) = (inner.top - font * 2.2, inner.top - font * 0.5);
        for (look, stretch) in stretches {
            let (left, right) = (axis.place(stretch.from), axis.place(stretch.to));
            let codec = stretch.codec.to_string();
            let title = format!("{codec}: {} to {}", show(stretch.from), show(stretch.to));
            self.rect(
                &format!("band s{look}"),
                Rect { left: left + 0.75, top, right: right - 0.75, bottom },
                &title,
            );
            if text_width(&brief(&codec), font) < right - left - 6.0 {
                self.text(
                    "in-band",
                    Anchor::Middle,
                    ((left + right) / 2.0, bottom - font * 0.45),
                    &brief(&codec),
                );
            }
        }
        let turns: Vec<f64> = stretches.iter().skip(1).map(|(_, stretch)| stretch.from).collect();
        let places: Vec<f64> = turns.iter().map(|turn| axis.place(*turn)).collect();
        let labels: Vec<String> = turns.iter().map(|turn| show(*turn)).collect();
        let widths: Vec<f64> = labels.iter().map(|label| text_width(label, font) + 6.0).collect();
        for place in &places {
            self.segment("turn", (*place, top - 3.0), (*place, inner.bottom));
        }
        // The list above the plot has them, too.
        if widths.iter().sum::<f64>() > self.layout.width {
            return;
        }
        let centres = spread(&places, &widths, (0.0, self.layout.width));
        for (centre, label) in centres.iter().zip(&labels) {
            self.text("turn-value", Anchor::Middle, (*centre, top - font * 0.6), label);
        }
    }
}

/// Both drawings of a plot with its caption.
pub(super) fn figure(wide: &str, narrow: &str, caption: &str) -> String {
    let caption = escaped(caption);
    format!("<figure class=\"plot\">\n{wide}{narrow}<figcaption>{caption}</figcaption>\n</figure>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_well_formed_and_escaped() {
        let mut drawing = Drawing::new(NARROW, "plot", "a < b", "c & \"d\"");
        drawing.text("name s1", Anchor::End, (1.0, f64::NAN), "<zstd>");
        drawing.path("line s1", &[(0.0, 1.0), (f64::INFINITY, 2.0)], "<t>");
        drawing.path("line s1", &[], "nothing");
        drawing.marker(3, (5.0, 5.0), "&");
        drawing.cross(0, (5.0, 5.0));
        let svg = drawing.finish();
        let parsed = roxmltree::Document::parse(&svg).unwrap();
        let named = |name| parsed.descendants().filter(move |node| node.has_tag_name(name)).count();
        assert_eq!((named("text"), named("path"), named("polygon"), named("line")), (1, 1, 1, 2));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
