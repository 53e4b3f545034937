//! `--html`: everything that was found as one page that needs nothing else: no script, no font, no request.
//!
//! ```text
//!  Findings ─┬─> advice ──────────────────────────────── the answer, as cards
//!            ├─> series ─ which codecs, in which look ─┬─ total (envelope: who is fastest where)
//!            │                                         ├─ ratio
//!            │                                         └─ downtime          drawn by plot, axis, labels
//!            ├─> kinds
//!            └─> tables                                                     text by markup, number
//! ```
//!
//! It is XHTML in all but its name, so that tests can read it as XML. `style.css` has the looks, for light and dark.

mod advice;
mod axis;
mod downtime;
mod envelope;
#[cfg(test)]
mod fixture;
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

pub(super) use advice::command_line;

use markup::escaped;
use number::{bytes, percent};

use super::findings::Findings;

const STYLE: &str = include_str!("style.css");

/// Nothing may be loaded or run, whatever is in the page: browsers see to it.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// The page.
pub(super) fn html(findings: &Findings) -> String {
    let title = format!("What a move of {} will cost", findings.source);
    let series = series::chosen(findings);
    let sections = [
        ("answer", "What to set", advice::cards(findings, &series)),
        ("total-time", "Total time against link speed", total::section(findings, &series)),
        ("codecs", "Ratio against CPU", ratio::section(findings, &series)),
        ("pages", "What is in the memory", kinds::section(findings)),
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
