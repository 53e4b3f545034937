//! The answer: what to set for each link, why, and what it costs.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::markup::{cell, escaped, row_head, table_head};
use super::number::{NONE, bytes, channels, compared, cpu_s, time_ms, total};
use super::series::{Series, look};
use crate::tune::findings::{Advice, Bottleneck, Findings, Prediction};

pub(super) fn cards(findings: &Findings, series: &[Series]) -> String {
    if findings.advice.is_empty() {
        return "<p>There is no advice: no link was asked for.</p>\n".to_owned();
    }
    let cards =
        findings.advice.iter().enumerate().map(|(number, advice)| card(findings, series, (number, advice)));
    format!("{}<div class=\"cards\">\n{}</div>\n", overview(findings, series), cards.collect::<String>())
}

/// One row a link, which leads to its card.
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
        let (link, codec) = (escaped(&advice.link), escaped(&best.codec));
        let (look, channels) = (look(series, &best.codec), escaped(&channels(best.channels)));
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

/// How it is called what a move waits for.
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
    // Writing to a string does not fail.
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
    let setting = if best.codec == "none" { "do not compress".to_owned() } else { best.codec.clone() };
    let _ = writeln!(
        out,
        "<p class=\"best\"><strong class=\"setting s{}\">{}</strong> <span>{}</span></p>",
        look(series, &best.codec),
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
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"What else could be set for {label}\"><table>\n{head}<tbody>\n"
    );
    // When nothing is to be compressed, that is what the others are compared with.
    let named = |prediction: &Prediction| prediction.codec == "none";
    let plain = plain.filter(|_| !named(best) && !runner_up.is_some_and(named));
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
    let qmp: Vec<_> = advice.qmp.iter().map(command_line).collect();
    let _ = writeln!(
        out,
        "<h4 id=\"qmp-{number}\">QMP, for both QEMUs, in this order</h4>\n<pre class=\"copy\" tabindex=\"0\" \
         aria-labelledby=\"link-{number} qmp-{number}\">{}</pre>",
        escaped(&qmp.join("\n"))
    );
}

/// A command as people write it, its name first; anything else as it is.
pub(in crate::tune) fn command_line(qmp: &Value) -> String {
    let part = |name: &str| qmp.get(name).map(|value| format!("\"{name}\": {value}"));
    match (qmp.as_object().map(Map::len), part("execute"), part("arguments")) {
        (Some(1), Some(execute), None) => format!("{{{execute}}}"),
        (Some(2), Some(execute), Some(arguments)) => format!("{{{execute}, {arguments}}}"),
        _ => qmp.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_command_begins_with_its_name_and_loses_nothing() {
        let commands = [
            json!({ "execute": "query-migrate" }),
            json!({ "execute": "migrate-set-parameters", "arguments": { "a": "<\"b\">" } }),
            json!({ "execute": "stop", "id": 7 }),
            json!(7),
        ];
        for qmp in commands {
            assert_eq!(serde_json::from_str::<Value>(&command_line(&qmp)).unwrap(), qmp);
        }
        assert!(
            command_line(&json!({ "arguments": {}, "execute": "stop" }))
                .starts_with("{\"execute\": \"stop\", ")
        );
    }
}
