//! What is found, for people.

use std::fmt::Write;

use super::advice::{time, total};
use super::findings::{Advice, CodecFacts, DirtyOrigin, Findings, Prediction};
use super::page::command_line;
use crate::human::show_bytes;

pub(super) fn of(findings: &Findings) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = guest(&mut text, findings).and_then(|()| codecs(&mut text, findings));
    for advice in &findings.advice {
        let _ = link(&mut text, findings, advice);
    }
    for note in &findings.notes {
        let _ = writeln!(text, "\nnote: {note}");
    }
    text
}

fn guest(text: &mut String, findings: &Findings) -> std::fmt::Result {
    let Findings { sample, pages, dirty, machine, .. } = findings;
    writeln!(text, "{}, {} of RAM", findings.source, show_bytes(findings.ram_bytes))?;
    let share = sample.share * 100.0;
    writeln!(text, "sample       {}, {share:.0} % of what may hold data", show_bytes(sample.bytes))?;
    let percent = |share: f64| share * 100.0;
    writeln!(
        text,
        "pages        {:.1} % zero, {:.1} % duplicate, {:.1} % incompressible, {:.1} % text, {:.1} % other",
        percent(pages.zero),
        percent(pages.duplicate),
        percent(pages.incompressible),
        percent(pages.text),
        percent(pages.other)
    )?;
    let rate = show_bytes(dirty.bytes_per_s);
    match dirty.origin {
        DirtyOrigin::Still => {
            writeln!(text, "written      nothing: it stands still (--dirty-rate says otherwise)")?
        }
        DirtyOrigin::Unknown => {
            writeln!(text, "written      while it was recorded; how fast is not known (--dirty-rate)")?
        }
        DirtyOrigin::Given => writeln!(text, "written      {rate}/s, as given")?,
        DirtyOrigin::Measured => {
            writeln!(text, "written      {rate}/s within {}, measured", show_bytes(dirty.working_set_bytes))?
        }
    }
    if let Some(xbzrle) = &findings.xbzrle {
        writeln!(
            text,
            "xbzrle       {:.0} % of {} rewritten pages go as a difference, all of them as {:.0} % of their bytes",
            percent(xbzrle.encoded),
            xbzrle.pages,
            percent(xbzrle.size)
        )?;
    }
    writeln!(text, "machine      {} cores for each end", machine.cores)
}

/// The levels that people think of; `--json` has all of them.
const SHOWN: [&str; 9] =
    ["none", "zlib:1", "zlib:6", "zlib:9", "zstd:1", "zstd:3", "zstd:6", "zstd:9", "zstd:19"];

fn codecs(text: &mut String, findings: &Findings) -> std::fmt::Result {
    writeln!(text, "\n{:<10} {:>14} {:>16} {:>16}", "codec", "ratio", "encode, a core", "decode, a core")?;
    let advised = |codec: &CodecFacts| {
        let best = |advice: &Advice| findings.predictions.get(advice.best);
        findings.advice.iter().filter_map(best).any(|best| best.codec == codec.codec)
    };
    let shown = |codec: &&CodecFacts| SHOWN.contains(&codec.codec.as_str()) || advised(codec);
    for facts in findings.codecs.iter().filter(shown) {
        let speed = |speed: Option<f64>| {
            speed.map_or("as it is".to_owned(), |speed| format!("{:.0} MiB/s", speed / 1_048_576.0))
        };
        writeln!(
            text,
            "{:<10} {:>6.2} ± {:>5.2} {:>16} {:>16}",
            facts.codec,
            facts.ratio,
            facts.ratio_error,
            speed(facts.encode_bytes_per_s),
            speed(facts.decode_bytes_per_s)
        )?;
    }
    Ok(())
}

fn link(text: &mut String, findings: &Findings, advice: &Advice) -> std::fmt::Result {
    writeln!(text, "\n{}: {}", advice.link, advice.reason)?;
    writeln!(
        text,
        "  {:<10} {:>8} {:>9} {:>9} {:>11} {:>16} {:>9}   limit",
        "codec", "channels", "total", "downtime", "wire", "CPU, src + dst", "QEMU"
    )?;
    let row = |prediction: Option<&Prediction>, word: &str, text: &mut String| {
        let Some(prediction) = prediction else { return Ok(()) };
        let bottleneck = serde_json::to_value(prediction.bottleneck).unwrap_or_default();
        writeln!(
            text,
            "  {:<10} {:>8} {:>9} {:>9} {:>11} {:>16} {:>9}   {} {word}",
            prediction.codec,
            prediction.channels,
            total(prediction.converges, prediction.total_ms),
            time(prediction.downtime_ms),
            show_bytes(prediction.wire_bytes),
            format!("{:.1} + {:.1} s", prediction.cpu_source_s, prediction.cpu_destination_s),
            total(prediction.qemu_converges, prediction.qemu_total_ms),
            bottleneck.as_str().unwrap_or_default(),
        )
    };
    let at = |index: usize| findings.predictions.get(index);
    row(at(advice.best), "<- best", text)?;
    if let Some(runner_up) = advice.runner_up {
        row(at(runner_up), "", text)?;
    }
    if advice.plain != advice.best && Some(advice.plain) != advice.runner_up {
        row(at(advice.plain), "", text)?;
    }
    writeln!(text, "  multifd send DIR URI {}", advice.flags)?;
    for command in &advice.qmp {
        writeln!(text, "  {}", command_line(command))?;
    }
    Ok(())
}
