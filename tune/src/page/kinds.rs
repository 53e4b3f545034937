//! Bar and table of the kinds of pages.

use super::labels::{Rect, text_width};
use super::markup::{cell, escaped, table_head};
use super::number::{bytes, percent};
use super::plot::{Anchor, Drawing, Layout, NARROW, WIDE, figure};
use crate::findings::{Findings, PageKinds};

/// `(name, share, effect on a move)`, in the order of the bar; the index is the class `k0` to `k4`
/// in the style sheet.
fn kinds(pages: &PageKinds) -> [(&'static str, f64, &'static str); 5] {
    [
        ("zero", pages.zero, "Sent as 8 bytes: costs next to nothing."),
        ("duplicate", pages.duplicate, "Equal to another page of the sample."),
        ("incompressible", pages.incompressible, "Encrypted, compressed already, or random: no codec helps."),
        ("text", pages.text, "Compresses well."),
        ("other", pages.other, "Code, heap, tables: where codecs differ."),
    ]
}

pub(super) fn section(findings: &Findings) -> String {
    let kinds = kinds(&findings.pages);
    if !kinds.iter().any(|(_, share, _)| *share > 0.0) {
        return "<p>No page was sampled.</p>\n".to_owned();
    }
    let [wide, narrow] = [WIDE, NARROW].map(|layout| bar(Layout { height: 62.0, ..layout }, &kinds));
    let rows = kinds.iter().enumerate().map(|(look, (name, share, meaning))| {
        let swatch =
            format!("<th scope=\"row\"><span class=\"swatch k{look}\"></span>{}</th>", escaped(name));
        let size = bytes(findings.ram_bytes as f64 * share);
        format!(
            "<tr>{swatch}{}{}{}</tr>\n",
            cell("number", &percent(*share)),
            cell("number", &size),
            cell("", meaning)
        )
    });
    let head = table_head(&[("kind", ""), ("share", "number"), ("of RAM", "number"), ("in a move", "")]);
    let table = format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Kinds of pages\"><table>\n{head}<tbody>\n{}</tbody></table></div>\n",
        rows.collect::<String>()
    );
    format!("{}{table}", figure(&wide, &narrow, "Shares of all pages of the guest, by the sample."))
}

fn bar(layout: Layout, kinds: &[(&str, f64, &str)]) -> String {
    /// Least width of a kind that the guest has, so that it is visible.
    const LEAST: f64 = 3.0;
    let said = kinds.iter().map(|(name, share, _)| format!("{name} {}", percent(*share))).collect::<Vec<_>>();
    let mut drawing = Drawing::new(layout, "kinds", "Kinds of pages", &said.join(", "));
    let share = |share: f64| if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let wanted: Vec<f64> = kinds.iter().map(|kind| share(kind.1) * layout.width).collect();
    let widths = wanted.iter().map(|width| if *width > 0.0 { width.max(LEAST) } else { 0.0 });
    let total: f64 = widths.clone().sum();
    let scale = if total > 0.0 { layout.width / total } else { 0.0 };
    let mut left = 0.0;
    for (look, (width, (name, share, _))) in widths.map(|width| width * scale).zip(kinds).enumerate() {
        let right = left + width;
        if width > 0.0 {
            let title = format!("{name}: {}", percent(*share));
            let rect = Rect { left, right: right - 1.0, top: 2.0, bottom: layout.height - 2.0 };
            drawing.rect(&format!("kind k{look}"), rect, &title);
            let (middle, value) = ((left + right) / 2.0, percent(*share));
            let room = width - 8.0;
            let font = layout.font;
            if text_width(&value, font) <= room {
                let named = text_width(name, font) <= room;
                let base = layout.height / 2.0 + if named { font * 1.05 } else { font * 0.35 };
                drawing.text("in-kind", Anchor::Middle, (middle, base), &value);
                if named {
                    drawing.text("in-kind strong", Anchor::Middle, (middle, base - font * 1.35), name);
                }
            }
        }
        left = right;
    }
    drawing.finish()
}
