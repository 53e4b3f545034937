//! The findings as one self-contained HTML page: no script, no font, no request.
//!
//! ```text
//!  Findings ─┬─> advice ──────────────────────────────── the settings, as cards
//!            ├─> series ─ shown codecs and their look ─┬─ total (envelope: the fastest codec by link)
//!            │                                         ├─ ratio
//!            │                                         └─ downtime          drawn by plot, axis, labels
//!            ├─> kinds
//!            └─> tables                                                     text by markup, number
//! ```
//!
//! The page is well-formed XML, so that tests can parse it. `style.css` has the colours, light and
//! dark.

mod advice;
mod axis;
mod downtime;
mod envelope;
#[cfg(test)]
pub(crate) mod fixture;
mod kinds;
mod labels;
mod markup;
mod number;
mod plot;
mod ratio;
mod series;
mod tables;
#[cfg(test)]
mod tests;
mod total;

use markup::escaped;
use number::{bytes, percent};

use crate::findings::Findings;

const STYLE: &str = include_str!("style.css");

/// Content security policy: the browser loads and runs nothing, whatever the page holds.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// The findings as an HTML page with plots, for a browser. It loads nothing.
pub fn html(findings: &Findings) -> String {
    let title = format!("What a move of {} will cost", findings.source);
    let series = series::chosen(findings);
    let sections = [
        ("answer", "Best settings", advice::cards(findings, &series)),
        ("total-time", "Total time against link speed", total::section(findings, &series)),
        ("codecs", "Ratio against CPU", ratio::section(findings, &series)),
        ("pages", "Kinds of pages", kinds::section(findings)),
        ("dirty", "Downtime against dirty rate", downtime::section(findings, &series)),
        ("predictions", "All predictions", tables::predictions(findings)),
        ("measured", "All codecs", tables::codecs(findings)),
        ("machine", "This machine and the guest", tables::machine(findings)),
    ];
    let sections = sections.map(|(id, title, content)| {
        format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n{content}</section>\n")
    });
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<link rel=\"icon\" href=\"data:,\"/>\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n{}</header>\n<main>\n{}{}</main>\n</body>\n</html>\n",
        escaped(&title),
        head(findings),
        sections.concat(),
        tables::notes(findings),
    )
}

fn head(findings: &Findings) -> String {
    let sample = &findings.sample;
    format!(
        "<p class=\"tool\">multifd tune</p>\n<h1>{}</h1>\n<p class=\"sub\">{} of RAM. Measured on a sample of {} pages ({}), {} of \
         the pages that may hold data.</p>\n",
        escaped(&findings.source),
        bytes(findings.ram_bytes as f64),
        sample.pages,
        bytes(sample.bytes as f64),
        escaped(&percent(sample.share)),
    )
}
