//! All findings as tables.

use super::advice::bottleneck;
use super::markup::{cell, escaped, row_head, table_head};
use super::number::{NONE, bytes, bytes_per_s, cpu_s, percent, ratio, time_ms, total};
use crate::findings::{DirtyOrigin, Findings, Prediction};

/// A table in a box that scrolls where the table is too wide or too high.
fn boxed(label: &str, head: &str, rows: &str) -> String {
    format!(
        "<div class=\"scroll tall\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table>\n{head}<tbody>\n{rows}</tbody></table></div>\n",
        escaped(label)
    )
}

pub(super) fn predictions(findings: &Findings) -> String {
    let head = table_head(&[
        ("link", ""),
        ("codec", ""),
        ("channels", "number"),
        ("time", "number"),
        ("downtime", "number"),
        ("wire", "number"),
        ("rounds", "number"),
        ("CPU, source", "number"),
        ("CPU, destination", "number"),
        ("waits for", ""),
        ("converges", ""),
        ("QEMU's time", "number"),
    ]);
    let best = |index: usize| findings.advice.iter().any(|advice| advice.best == index);
    let row = |(index, prediction): (usize, &Prediction)| {
        let cells = [
            total(prediction.converges, prediction.total_ms),
            time_ms(prediction.downtime_ms),
            bytes(prediction.wire_bytes as f64),
            prediction.rounds.to_string(),
            cpu_s(prediction.cpu_source_s),
            cpu_s(prediction.cpu_destination_s),
        ];
        let cells: String = cells.iter().map(|text| cell("number", text)).collect();
        let mark = if best(index) { " ★ best" } else { "" };
        let codec = format!("{}{mark}", prediction.codec);
        format!(
            "<tr{}>{}{}{}{cells}{}{}{}</tr>\n",
            if best(index) { " class=\"winner\"" } else { "" },
            row_head(&prediction.link),
            cell("", &codec),
            cell("number", &prediction.channels.to_string()),
            cell("", bottleneck(prediction.bottleneck)),
            cell("", if prediction.converges { "yes" } else { "no" }),
            cell("number", &total(prediction.qemu_converges, prediction.qemu_total_ms)),
        )
    };
    let rows: String = findings.predictions.iter().enumerate().map(row).collect();
    boxed("All predictions", &head, &rows)
}

pub(super) fn codecs(findings: &Findings) -> String {
    let head = table_head(&[
        ("codec", ""),
        ("ratio", "number"),
        ("± (95 %)", "number"),
        ("encode, one core", "number"),
        ("decode, one core", "number"),
        ("measured on", "number"),
    ]);
    let speed = |value: Option<f64>| value.map_or("no limit".to_owned(), bytes_per_s);
    let rows = findings.codecs.iter().map(|facts| {
        let cells = [
            ratio(facts.ratio),
            ratio(facts.ratio_error),
            speed(facts.encode_bytes_per_s),
            speed(facts.decode_bytes_per_s),
            bytes(facts.measured_bytes as f64),
        ];
        let cells: String = cells.iter().map(|text| cell("number", text)).collect();
        format!("<tr>{}{cells}</tr>\n", row_head(&facts.codec.to_string()))
    });
    let xbzrle = findings.xbzrle.map(|facts| {
        format!(
            "<p>xbzrle, on {} pages seen in two versions: {} of them are sent as deltas; a rewritten page takes {} of \
             its size on the wire.</p>\n",
            facts.pages,
            escaped(&percent(facts.encoded)),
            escaped(&percent(facts.size)),
        )
    });
    format!("{}{}", boxed("All codecs", &head, &rows.collect::<String>()), xbzrle.unwrap_or_default())
}

pub(super) fn machine(findings: &Findings) -> String {
    let machine = &findings.machine;
    let speed = |seconds: f64| if seconds > 0.0 { bytes_per_s(1.0 / seconds) } else { NONE.to_owned() };
    let dirty = match findings.dirty.origin {
        DirtyOrigin::Still => "0 (guest is paused)".to_owned(),
        DirtyOrigin::Unknown => "unknown".to_owned(),
        DirtyOrigin::Given | DirtyOrigin::Measured => {
            let rate = bytes_per_s(findings.dirty.bytes_per_s as f64);
            let how = if findings.dirty.origin == DirtyOrigin::Given { "given" } else { "measured" };
            format!("{rate} ({how}), in a working set of {}", bytes(findings.dirty.working_set_bytes as f64))
        }
    };
    let facts = [
        ("cores available per end", machine.cores.to_string()),
        ("send through a socket, one core", speed(machine.send_byte_s)),
        ("receive from a socket, one core", speed(machine.receive_byte_s)),
        ("store into unpopulated memory, through the file", speed(machine.land_byte_s)),
        ("the same by page faults, as QEMU does", speed(machine.fault_byte_s)),
        ("allocate untouched memory", speed(machine.touch_byte_s)),
        ("first access to mapped guest memory", speed(machine.look_byte_s)),
        ("dirty rate", dirty),
        ("downtime limit", time_ms(findings.downtime_limit_ms)),
    ];
    let rows: String = facts
        .iter()
        .map(|(name, value)| format!("<tr>{}{}</tr>\n", row_head(name), cell("number", value)))
        .collect();
    boxed("This machine and the guest", &table_head(&[("what", ""), ("measured", "number")]), &rows)
}

pub(super) fn notes(findings: &Findings) -> String {
    if findings.notes.is_empty() {
        return String::new();
    }
    let notes: String = findings.notes.iter().map(|note| format!("<li>{}</li>\n", escaped(note))).collect();
    format!("<section>\n<h2>Notes</h2>\n<ul>\n{notes}</ul>\n</section>\n")
}
