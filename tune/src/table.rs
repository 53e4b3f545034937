//! The findings as text for a terminal.

use std::fmt::Write;

use multifd_codecs::CodecChoice;

use crate::advice::{time, total};
use crate::findings::{Advice, CodecFacts, DirtyOrigin, Findings, Prediction};
use crate::units::show_bytes;

/// The findings as tables for a terminal, some 30 lines.
pub fn text(findings: &Findings) -> String {
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
    let Findings { sample, pages, machine, .. } = findings;
    writeln!(text, "{}, {} of RAM", findings.source, show_bytes(findings.ram_bytes))?;
    let share = sample.share * 100.0;
    writeln!(
        text,
        "sample       {}, {share:.0} % of the pages that may hold data",
        show_bytes(sample.bytes)
    )?;
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
    writeln!(text, "dirty rate   {}", dirty_rate(findings))?;
    if let Some(xbzrle) = &findings.xbzrle {
        writeln!(
            text,
            "xbzrle       {:.0} % of {} rewritten pages are sent as deltas; all of them take {:.0} % of their size",
            percent(xbzrle.encoded),
            xbzrle.pages,
            percent(xbzrle.size)
        )?;
    }
    writeln!(text, "machine      {} cores available per end", machine.cores)
}

fn dirty_rate(findings: &Findings) -> String {
    let dirty = &findings.dirty;
    let rate = show_bytes(dirty.bytes_per_s);
    match dirty.origin {
        DirtyOrigin::Still => "0 (guest is paused; override with --dirty-rate)".to_owned(),
        DirtyOrigin::Unknown => {
            "unknown: the guest ran while it was recorded (set it with --dirty-rate)".to_owned()
        }
        DirtyOrigin::Given => format!("{rate}/s, given"),
        DirtyOrigin::Measured => {
            format!("{rate}/s in a working set of {}, measured", show_bytes(dirty.working_set_bytes))
        }
    }
}

/// The usual levels; `--json` has all of them.
const SHOWN: [CodecChoice; 9] = [
    CodecChoice::None,
    CodecChoice::zlib::<1>(),
    CodecChoice::zlib::<6>(),
    CodecChoice::zlib::<9>(),
    CodecChoice::zstd::<1>(),
    CodecChoice::zstd::<3>(),
    CodecChoice::zstd::<6>(),
    CodecChoice::zstd::<9>(),
    CodecChoice::zstd::<19>(),
];

fn codecs(text: &mut String, findings: &Findings) -> std::fmt::Result {
    writeln!(
        text,
        "\n{:<10} {:>14} {:>16} {:>16}",
        "codec", "ratio", "encode, per core", "decode, per core"
    )?;
    let advised = |codec: &CodecFacts| {
        let best = |advice: &Advice| findings.predictions.get(advice.best);
        findings.advice.iter().filter_map(best).any(|best| best.codec == codec.codec)
    };
    let shown = |codec: &&CodecFacts| SHOWN.contains(&codec.codec) || advised(codec);
    for facts in findings.codecs.iter().filter(shown) {
        let speed = |speed: Option<f64>| {
            speed.map_or("no limit".to_owned(), |speed| format!("{:.0} MiB/s", speed / 1_048_576.0))
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
        writeln!(text, "  {}", command)?;
    }
    Ok(())
}
