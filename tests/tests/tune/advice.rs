//! What was predicted of bytes comes true, and what is advised is understood by both programs.

use multifd_tests::{
    CommandReport, Compression, Failure, Multifd, Outcome, Receive, Settings, ram, skip_without_qemu,
};
use serde_json::{Value, json};

use crate::fixture::{SOON, Still, of, prediction, tune};

/// Bytes on the wire may differ from what was predicted by this share. (Times are for
/// `benches/versus`.)
const WITHIN: f64 = 0.03;

#[test]
fn bytes_on_the_wire_are_as_predicted() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let flags = ["--link", "1Gbit/s", "--channels", "0", "--channels", "2", "--sample", "64M"];
    let findings = tune(&of(&checkpoint), &flags)?;
    let mut moves = vec![(None, Compression::None)];
    let codecs = [Compression::None, Compression::Zlib(1), Compression::Zstd(1), Compression::Zstd(3)];
    moves.extend(codecs.map(|codec| (Some(2), codec)));
    for (channels, compression) in moves {
        let settings = Settings { channels, compression, return_path: true, ..Settings::default() };
        let out = guest.scratch.path("out");
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
        let mut send = Multifd::send(&checkpoint, receive.uri(), &settings)?;
        send.wait_success(SOON)?;
        receive.wait_success(SOON)?;
        std::fs::remove_dir_all(&out)?;
        let sent = CommandReport::by(&send)?.number("wire_bytes")?;
        let codec = compression.to_string();
        let predicted = prediction(&findings, "1Gbit/s", channels.map_or(0, u64::from), &codec)?;
        let predicted = predicted["wire_bytes"].as_u64().unwrap_or_default();
        let error = (predicted as f64 / sent as f64 - 1.0).abs();
        assert!(error <= WITHIN, "{channels:?} {codec}: {predicted} bytes predicted, {sent} sent");
    }
    Ok(())
}

#[test]
fn advice_moves_a_guest_between_two_qemus() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let links = ["--link", "20Mbit/s", "--link", "loopback", "--channels", "3"];
    let findings = tune(&of(&checkpoint), &links)?;
    let advice = findings["advice"].as_array().cloned().unwrap_or_default();
    assert_eq!(advice.len(), 2, "{findings:#}");
    for advice in &advice {
        let mut destination = guest.builder.clone().incoming("defer").paused().spawn("destination")?;
        // The guest has moved before: it must run before it may move again.
        guest.qemu.resume()?;
        guest.qemu.stop()?;
        for qemu in [&mut guest.qemu, &mut destination] {
            for command in advice["qmp"].as_array().into_iter().flatten() {
                let name = command["execute"].as_str().unwrap_or_default();
                qemu.execute(name, command["arguments"].clone())?;
            }
            // The shaped link is only thought of.
            qemu.set_parameter("max-bandwidth", 0)?;
        }
        let uri = destination.listen("tcp:127.0.0.1:0")?;
        guest.qemu.migrate(&uri)?;
        guest.qemu.wait_completed(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        ram::check_equal(guest.qemu.ram(), destination.ram())?;
        let parameters = destination.execute("query-migrate-parameters", json!({}))?;
        let best = best(&findings, advice)?;
        assert_eq!(parameters["multifd-channels"], best["channels"]);
        let codec = best["codec"].as_str().unwrap_or_default();
        assert!(codec.starts_with(parameters["multifd-compression"].as_str().unwrap_or("?")), "{parameters}");
    }
    Ok(())
}

#[test]
fn the_flags_that_are_advised_are_flags_of_send() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let findings = tune(&of(&checkpoint), &["--link", "50Mbit/s", "--channels", "2"])?;
    let advice = &findings["advice"][0];
    let flags = advice["flags"].as_str().unwrap_or_default();
    let out = guest.scratch.path("out");
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
    let mut arguments = vec!["send".to_owned(), checkpoint.display().to_string(), receive.uri().to_owned()];
    arguments.push("--json".to_owned());
    arguments.extend(flags.split(' ').map(str::to_owned));
    let mut send = Multifd::spawn("send", arguments)?;
    send.wait_success(SOON)?;
    receive.wait_success(SOON)?;
    let report = CommandReport::by(&send)?;
    let best = best(&findings, advice)?;
    assert_eq!(report.text("codec")?, best["codec"]);
    assert_eq!(report.number("channels")?, 2);
    assert!(report.text("codec")? != "none", "at 50 Mbit/s compression pays: {advice:#}");
    Ok(())
}

fn best<'f>(findings: &'f Value, advice: &Value) -> Outcome<&'f Value> {
    let index = advice["best"].as_u64().and_then(|index| usize::try_from(index).ok());
    index
        .and_then(|index| findings["predictions"].get(index))
        .ok_or_else(|| Failure::new(format!("no prediction for {advice:#}")))
}
