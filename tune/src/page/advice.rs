//! The settings for each link, with reason and cost.

use std::fmt::Write;

use multifd_codecs::CodecChoice;

use super::markup::{cell, escaped, row_head, table_head};
use super::number::{NONE, bytes, channels, compared, cpu_s, time_ms, total};
use super::series::{Series, look};
use crate::findings::{Advice, Bottleneck, Findings, Prediction};

pub(super) fn cards(findings: &Findings, series: &[Series]) -> String {
    if findings.advice.is_empty() {
        return "<p>There is no advice: no link was configured.</p>\n".to_owned();
    }
    let cards =
        findings.advice.iter().enumerate().map(|(number, advice)| card(findings, series, (number, advice)));
    format!("{}<div class=\"cards\">\n{}</div>\n", overview(findings, series), cards.collect::<String>())
}

/// A table with one row per link, which leads to its card.
fn overview(findings: &Findings, series: &[Series]) -> String {
    let head = table_head(&[
        ("link", ""),
        ("set", ""),
        ("time", "number"),
        ("with none", "number"),
        ("downtime", "number"),
        ("wire", "number"),
    ]);
    let row = |(number, advice): (usize, &Advice)| {
        let best = findings.predictions.get(advice.best)?;
        let plain = findings.predictions.get(advice.plain);
        let cells = [
            total(best.converges, best.total_ms),
            plain.map_or(NONE.to_owned(), |plain| total(plain.converges, plain.total_ms)),
            time_ms(best.downtime_ms),
            bytes(best.wire_bytes as f64),
        ];
        let cells: String = cells.iter().map(|text| cell("number", text)).collect();
        let (link, codec) = (escaped(&advice.link), best.codec);
        let (look, channels) = (look(series, codec), escaped(&channels(best.channels)));
        Some(format!(
            "<tr><th scope=\"row\"><a href=\"#link-{number}\">{link}</a></th>\
             <td><span class=\"chip s{look}\">{codec}</span>, <span class=\"whole\">{channels}</span></td>{cells}</tr>\n"
        ))
    };
    let rows: String = findings.advice.iter().enumerate().filter_map(row).collect();
    format!(
        "<div class=\"scroll overview\" tabindex=\"0\" role=\"region\" aria-label=\"The best setting for each link\"><table>\n\
         {head}<tbody>\n{rows}</tbody></table></div>\n"
    )
}

/// Name of a bottleneck.
pub(super) fn bottleneck(bottleneck: Bottleneck) -> &'static str {
    match bottleneck {
        Bottleneck::DestinationCpu => "destination CPU",
        Bottleneck::DirtyRate => "dirty rate",
        Bottleneck::Link => "link",
        Bottleneck::SourceCpu => "source CPU",
    }
}

fn card(findings: &Findings, series: &[Series], (number, advice): (usize, &Advice)) -> String {
    let mut out = format!("<article class=\"card\" aria-labelledby=\"link-{number}\">\n");
    // Writing to a string cannot fail.
    let _ = writeln!(out, "<h3 id=\"link-{number}\">{}</h3>", escaped(&advice.link));
    let Some(best) = findings.predictions.get(advice.best) else {
        let _ = writeln!(out, "<p>{}</p>\n</article>", escaped(&advice.reason));
        return out;
    };
    let plain = findings.predictions.get(advice.plain);
    head(&mut out, series, best);
    let _ = writeln!(out, "<p class=\"reason\">{}</p>", escaped(&advice.reason));
    facts(&mut out, best);
    let runner_up = advice.runner_up.and_then(|index| findings.predictions.get(index));
    comparison(&mut out, &advice.link, best, runner_up, plain);
    commands(&mut out, number, advice);
    out.push_str("</article>\n");
    out
}

fn head(out: &mut String, series: &[Series], best: &Prediction) {
    let setting = match best.codec {
        CodecChoice::None => "do not compress".to_owned(),
        codec => codec.to_string(),
    };
    let _ = writeln!(
        out,
        "<p class=\"best\"><strong class=\"setting s{}\">{}</strong> <span>{}</span></p>",
        look(series, best.codec),
        escaped(&setting),
        escaped(&channels(best.channels)),
    );
    if !best.converges {
        out.push_str("<p class=\"warning\">Does not converge within the downtime limit.</p>\n");
    }
}

fn facts(out: &mut String, best: &Prediction) {
    let facts = [
        ("total time", total(best.converges, best.total_ms)),
        ("downtime", time_ms(best.downtime_ms)),
        ("on the wire", bytes(best.wire_bytes as f64)),
        ("CPU, source", cpu_s(best.cpu_source_s)),
        ("CPU, destination", cpu_s(best.cpu_destination_s)),
        ("waits for", bottleneck(best.bottleneck).to_owned()),
    ];
    out.push_str("<dl class=\"facts\">\n");
    for (name, value) in facts {
        let _ = writeln!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escaped(&value));
    }
    out.push_str("</dl>\n");
}

fn comparison(
    out: &mut String,
    link: &str,
    best: &Prediction,
    runner_up: Option<&Prediction>,
    plain: Option<&Prediction>,
) {
    let head = table_head(&[
        ("instead", ""),
        ("time", "number"),
        ("", "number"),
        ("downtime", "number"),
        ("wire", "number"),
        ("CPU, both", "number"),
    ]);
    let label = escaped(link);
    let _ = write!(
        out,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Other settings for {label}\"><table>\n{head}<tbody>\n"
    );
    // Once is enough.
    let uncompressed = |prediction: &Prediction| prediction.codec == CodecChoice::None;
    let plain = plain.filter(|_| !uncompressed(best) && !runner_up.is_some_and(uncompressed));
    let plain = plain.map(|plain| ("no compression", plain));
    for (name, other) in runner_up.map(|other| ("runner-up", other)).into_iter().chain(plain) {
        let name = match name {
            "runner-up" => format!("{}, {}", other.codec, channels(other.channels)),
            name => format!("{name}, {}", channels(other.channels)),
        };
        let cells = [
            total(other.converges, other.total_ms),
            if other.converges { compared(best.total_ms, other.total_ms) } else { NONE.to_owned() },
            time_ms(other.downtime_ms),
            bytes(other.wire_bytes as f64),
            cpu_s(other.cpu_source_s + other.cpu_destination_s),
        ];
        let cells: String = cells.iter().map(|text| cell("number", text)).collect();
        let _ = writeln!(out, "<tr>{}{cells}</tr>", row_head(&name));
    }
    let qemu = match best.qemu_converges {
        true => [time_ms(best.qemu_total_ms), compared(best.total_ms, best.qemu_total_ms)],
        false => [total(false, 0), NONE.to_owned()],
    };
    let qemu: String =
        qemu.iter().map(String::as_str).chain([NONE; 3]).map(|text| cell("number", text)).collect();
    let _ =
        writeln!(out, "<tr>{}{qemu}</tr>\n</tbody></table></div>", row_head("the same, QEMU at both ends"));
}

fn commands(out: &mut String, number: usize, advice: &Advice) {
    let _ = writeln!(
        out,
        "<h4 id=\"flags-{number}\">Flags of multifd send</h4>\n<pre class=\"copy\" tabindex=\"0\" \
         aria-labelledby=\"link-{number} flags-{number}\">{}</pre>",
        escaped(&advice.flags)
    );
    if advice.qmp.is_empty() {
        return;
    }
    let qmp: Vec<_> = advice.qmp.iter().map(ToString::to_string).collect();
    let _ = writeln!(
        out,
        "<h4 id=\"qmp-{number}\">QMP, for both QEMUs, in this order</h4>\n<pre class=\"copy\" tabindex=\"0\" \
         aria-labelledby=\"link-{number} qmp-{number}\">{}</pre>",
        escaped(&qmp.join("\n"))
    );
}
