//! What people read.

use std::fmt::Write;

use super::difference::{Different, FieldPair};
use super::examined::{Checked, RemarkView, Verdict};
use super::findings::{Device, Findings, Held, Kind, Libvirt, Pages};
use super::values::{Content, ElementView, FieldView, Scalar, StructureView};
use crate::human::{show_bytes, visible};

/// The table; with the fields of each device, if `fields`.
pub(super) fn of(findings: &Findings, fields: bool) -> String {
    let mut out = String::new();
    head(&mut out, findings);
    if let Some(image) = &findings.libvirt {
        libvirt(&mut out, image, fields);
    }
    out.push('\n');
    blocks(&mut out, findings);
    out.push('\n');
    pages(&mut out, &findings.pages);
    if !findings.devices.is_empty() {
        out.push('\n');
        devices(&mut out, &findings.devices, fields);
    }
    if !findings.notes.is_empty() {
        out.push('\n');
        findings.notes.iter().for_each(|note| line(&mut out, "note", note));
    }
    out
}

/// A label and its text, in the columns of the reports.
fn line(out: &mut String, label: &str, text: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{label:<12} {}", visible(text));
}

fn head(out: &mut String, findings: &Findings) {
    let (path, bytes) = (findings.path.display(), show_bytes(findings.bytes));
    let on_disk = show_bytes(findings.bytes_on_disk);
    match findings.kind {
        Kind::Checkpoint => line(out, "checkpoint", &format!("{path}, {bytes}, {on_disk} of it on disk")),
        Kind::MappedRam => line(out, "mapped-ram", &format!("{path}, {bytes}, {on_disk} of it on disk")),
        Kind::Stream => line(out, "stream", &format!("{path}, {bytes}")),
    }
    line(out, "machine", &findings.machine);
    if let Some(uuid) = &findings.uuid {
        line(out, "uuid", uuid);
    }
    if !findings.capabilities.is_empty() {
        line(out, "capabilities", &findings.capabilities.join(", "));
    }
    if let Some(origin) = &findings.origin {
        let how = match origin.channels {
            0 => "one channel".to_owned(),
            channels => format!("{channels} channels, codec {}", origin.codec),
        };
        let seconds = origin.total_ms as f64 / 1000.0;
        line(out, "source", &format!("{}, {how}, in {seconds:.1} s", origin.source));
        line(out, "created", &utc(origin.created_unix_s));
    }
}

fn libvirt(out: &mut String, libvirt: &Libvirt, xml: bool) {
    let domain = libvirt.domain.as_deref().unwrap_or("without a name");
    let state = if libvirt.was_running { "running" } else { "paused" };
    line(out, "libvirt", &format!("domain {domain}, {state}, saved as {}", libvirt.format));
    if xml {
        libvirt.xml.lines().for_each(|text| line(out, "xml", text));
    }
}

fn blocks(out: &mut String, findings: &Findings) {
    let stored = findings.kind != Kind::Stream;
    let mut titles = vec!["RAM block", "length"];
    titles.extend(if stored {
        &["data", "holes"][..]
    } else {
        &["normal", "zero", "xbzrle", "repeated"][..]
    });
    let absent = findings.pages.absent > 0;
    titles.extend(absent.then_some("absent"));
    let mut rows = vec![titles.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for block in &findings.blocks {
        let mut row = vec![block.name.clone(), show_bytes(block.length)];
        let counts = match &block.held {
            Held::Stored { data, holes } => vec![data, holes],
            Held::Sent { normal, zero, xbzrle, repeated } => vec![normal, zero, xbzrle, repeated],
        };
        row.extend(counts.into_iter().map(u64::to_string));
        row.extend(absent.then(|| block.absent_pages.to_string()));
        rows.push(row);
    }
    columns(out, "", &rows, |column| column == 0);
}

fn pages(out: &mut String, pages: &Pages) {
    // Cut off, not rounded: 100 % means all of it.
    let share =
        pages.zero_share.map(|share| format!(" ({:.2} %)", (share * 1e4).floor() / 1e2)).unwrap_or_default();
    let absent = match pages.absent {
        0 => String::new(),
        absent => format!("{absent} absent, "),
    };
    let text = format!("{}: {absent}{} zero{share}, {} data", pages.total, pages.zero, pages.data);
    line(out, "pages", &text);
    if !pages.compression.is_empty() {
        let ratios: Vec<_> =
            pages.compression.iter().map(|by| format!("{:.2}x by {}", by.ratio, by.codec)).collect();
        let text = format!("{}, measured on {} data pages", ratios.join(", "), pages.sampled);
        line(out, "compressible", &text);
    }
}

fn devices(out: &mut String, devices: &[Device], fields: bool) {
    let row = |device: &Device| {
        let numbers = [device.section, device.instance, device.version].map(|number| number.to_string());
        let [section, instance, version] = numbers;
        vec![section, device.name.clone(), instance, version, device.bytes.to_string()]
    };
    let titles = ["section", "device", "instance", "version", "bytes"].map(str::to_owned).to_vec();
    let mut rows = vec![titles];
    rows.extend(devices.iter().map(row));
    let mut table = String::new();
    columns(&mut table, "", &rows, |column| column == 1);
    let mut lines = table.lines();
    let _ = writeln!(out, "{}", lines.next().unwrap_or_default());
    for (device, text) in devices.iter().zip(lines) {
        let live = if device.live { "  live, in pieces" } else { "" };
        let _ = writeln!(out, "{text}{live}");
        if let Some(note) = &device.note {
            let _ = writeln!(out, "{INDENT}note: {note}");
        }
        if fields {
            let mut rows = Vec::new();
            structure_rows(&mut rows, 0, &device.layout);
            columns(out, INDENT, &rows, |column| column != 2);
            remarks(out, "means", &device.meaning);
        }
        remarks(out, "inconsistent", &device.inconsistent);
    }
}

fn remarks(out: &mut String, label: &str, remarks: &[RemarkView]) {
    for RemarkView { field, text } in remarks {
        let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
        let _ = writeln!(out, "{INDENT}{label}: {}", visible(&format!("{field}{text}")));
    }
}

/// Every device, and whether it is consistent.
pub(super) fn of_check(devices: &[Checked]) -> String {
    let mut out = String::new();
    let name = |device: &Checked| match device.instance {
        0 => visible(&device.name),
        instance => format!("{} #{instance}", visible(&device.name)),
    };
    let names: Vec<_> = devices.iter().map(name).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    for (device, name) in devices.iter().zip(&names) {
        let verdict = match device.verdict {
            Verdict::Consistent => "consistent",
            Verdict::Inconsistent => "inconsistent",
            Verdict::Opaque => "not described here, not checked",
            Verdict::Partly => "has a subsection that is not described here, not checked",
        };
        let _ = writeln!(out, "{name:<width$}  {verdict}");
        remarks(&mut out, "inconsistent", &device.findings);
    }
    out
}

/// What differs in the devices of two guests.
pub(super) fn of_differences(devices: &[Different]) -> String {
    if devices.is_empty() {
        return "the devices of both are the same\n".to_owned();
    }
    let mut out = String::new();
    for device in devices {
        let instance = if device.instance == 0 { String::new() } else { format!(" #{}", device.instance) };
        let _ = writeln!(out, "{}{instance}", visible(&device.name));
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let row = |pair: &FieldPair| vec![pair.field.clone(), value(&pair.left), value(&pair.right)];
        let rows: Vec<_> = device.fields.iter().map(row).collect();
        columns(&mut out, INDENT, &rows, |_| true);
        if device.omitted > 0 {
            let _ = writeln!(out, "{INDENT}... {} more", device.omitted);
        }
    }
    out
}

/// A value as people read it.
pub(super) fn text_of(kind: &str, scalar: &Scalar) -> String {
    scalar_text(kind, scalar, true)
}

/// Before the fields of a device.
const INDENT: &str = "         ";

fn structure_rows(rows: &mut Vec<Vec<String>>, depth: usize, structure: &StructureView) {
    for field in &structure.fields {
        field_rows(rows, depth, field);
    }
    for subsection in &structure.subsections {
        let name = indented(depth, &subsection.name);
        rows.push(vec![name, format!("subsection v{}", subsection.version)]);
        structure_rows(rows, depth + 1, &subsection.structure);
    }
}

/// Name, type, bytes, value.
fn field_rows(rows: &mut Vec<Vec<String>>, depth: usize, field: &FieldView) {
    let index = field.index.map(|index| format!("[{index}]")).unwrap_or_default();
    let name = indented(depth, &format!("{}{index}", field.name));
    let kind = match field.array_len {
        Some(len) => format!("{} x {len}", field.kind),
        None => field.kind.clone(),
    };
    let mut row = vec![name, kind, field.size.to_string()];
    match &field.content {
        Content::Scalar(scalar) => {
            row.push(scalar_text(&field.kind, scalar, true));
            rows.push(row);
        }
        Content::Structure(structure) => {
            rows.push(row);
            structure_rows(rows, depth + 1, structure);
        }
        Content::Array { elements, omitted_elements } => {
            let more = match omitted_elements {
                0 => None,
                omitted => Some(format!("... {omitted} more")),
            };
            if elements.iter().all(|element| matches!(element.content, Content::Scalar(_))) {
                let values = elements.iter().map(|element| run_text(&field.kind, element));
                row.push(values.chain(more).collect::<Vec<_>>().join(", "));
                rows.push(row);
            } else {
                rows.push(row);
                elements.iter().for_each(|element| element_rows(rows, depth + 1, element));
                rows.extend(more.map(|more| vec![indented(depth + 1, &more)]));
            }
        }
    }
}

/// A structure in an array.
fn element_rows(rows: &mut Vec<Vec<String>>, depth: usize, element: &ElementView) {
    let name = match element.count {
        1 => format!("[{}]", element.first),
        count => format!("[{}..={}]", element.first, element.first + (count - 1)),
    };
    rows.push(vec![indented(depth, &name)]);
    if let Content::Structure(structure) = &element.content {
        structure_rows(rows, depth + 1, structure);
    }
}

/// A value in an array.
fn run_text(kind: &str, element: &ElementView) -> String {
    let Content::Scalar(scalar) = &element.content else { return String::new() };
    let text = scalar_text(kind, scalar, false);
    if element.count == 1 { text } else { format!("{text} x {}", element.count) }
}

/// With `decimal`, numbers come in both ways where there is a difference.
fn scalar_text(kind: &str, scalar: &Scalar, decimal: bool) -> String {
    let number = |hex: &str, value: String| {
        let digits = hex.trim_start_matches("0x").trim_start_matches('0');
        match value.len() {
            1 => value,
            _ if decimal => format!("0x{digits} ({value})"),
            _ => format!("0x{digits}"),
        }
    };
    match scalar {
        Scalar::Bool { value } => value.to_string(),
        Scalar::Bytes { bytes, text: None } => bytes.clone(),
        Scalar::Bytes { bytes, text: Some(text) } => format!("{bytes}  {text:?}"),
        Scalar::Null { .. } => "null".to_owned(),
        Scalar::Signed { value: -1, .. } if kind == "timer" => "not armed".to_owned(),
        Scalar::Signed { value, hex } => number(hex, value.to_string()),
        Scalar::Unsigned { value, hex } => number(hex, value.to_string()),
    }
}

fn indented(depth: usize, name: &str) -> String {
    format!("{:1$}{name}", "", depth * 2)
}

/// Lines with their columns two blanks apart; `left` says which are aligned to the left. The last
/// column of a row is not padded.
fn columns(out: &mut String, indent: &str, rows: &[Vec<String>], left: impl Fn(usize) -> bool) {
    let rows: Vec<Vec<_>> = rows.iter().map(|row| row.iter().map(|cell| visible(cell)).collect()).collect();
    let mut widths = Vec::new();
    for row in &rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if left(column) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        let text = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(out, "{indent}{}", text.trim_end());
    }
}

/// `2025-11-21 23:10:04 UTC`
fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86400, unix_s % 86400);
    // Years that begin in March have the leap day last; an era is the 400 years after which the
    // calendar repeats.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (unix_s, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_763_766_604, "2025-11-21 23:10:04 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(unix_s), text);
        }
        assert!(utc(u64::MAX).ends_with("UTC"));
    }

    #[test]
    fn columns_line_up() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        let mut out = String::new();
        columns(&mut out, " ", &[row(&["a", "bytes"]), row(&["name", "7", "x"]), row(&["n"])], |column| {
            column != 1
        });
        assert_eq!(out, " a     bytes\n name      7  x\n n\n");
    }
}
