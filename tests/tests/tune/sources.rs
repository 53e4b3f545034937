//! The same guest looks the same whatever it lies in.

use multifd_tests::{Outcome, Settings, Side, skip_without_qemu};
use serde_json::Value;

use crate::fixture::{SOON, Still, of, prediction, tune};

const FLAGS: [&str; 6] = ["--link", "1Gbit/s", "--channels", "2", "--sample", "1G"];

#[test]
fn a_checkpoint_a_stream_and_a_mapped_ram_file_say_the_same() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let [stream, mapped] = ["stream", "mapped"].map(|name| guest.scratch.path(name));
    for (path, capabilities) in [(&stream, vec![]), (&mapped, vec!["mapped-ram"])] {
        guest.qemu.resume()?;
        guest.qemu.stop()?;
        guest.qemu.set_up(&Settings { capabilities, ..Settings::default() }, Side::Source)?;
        guest.qemu.migrate(&format!("file:{}", path.display()))?;
        guest.qemu.wait_completed(SOON)?;
    }
    let known = tune(&of(&checkpoint), &FLAGS)?;
    assert!(known["source"].as_str().is_some_and(|source| source.starts_with("checkpoint ")));
    assert_eq!(known["sample"]["share"], 1.0, "this guest is small enough to be taken whole");
    assert_eq!(known["dirty"]["origin"], "still");
    for path in [&stream, &mapped] {
        let found = tune(&of(path), &FLAGS)?;
        assert_eq!(found["ram_bytes"], known["ram_bytes"]);
        // The guest has run for a while between one file and the next.
        for kind in ["zero", "duplicate", "incompressible", "text", "other"] {
            near(&found["pages"][kind], &known["pages"][kind], 0.01);
        }
        for codec in ["none", "zlib:1", "zstd:1"] {
            let [found, known] = [&found, &known].map(|findings| prediction(findings, "1Gbit/s", 2, codec));
            let [found, known] =
                [found?, known?].map(|prediction| prediction["wire_bytes"].as_f64().unwrap_or(0.0));
            assert!((found / known - 1.0).abs() < 0.02, "{codec}: {found} and {known}");
        }
    }
    Ok(())
}

#[test]
fn what_a_page_held_before_gives_differences() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let stream = guest.scratch.path("stream");
    guest.qemu.resume()?;
    // The guest writes while it is sent, so that its pages come again.
    let settings = Settings { min_rounds: 3, ..Settings::default() };
    guest.qemu.set_up(&settings, Side::Source)?;
    guest.qemu.migrate(&format!("exec:cat>{}", stream.display()))?;
    guest.qemu.settle(&settings, SOON)?;
    let found = tune(&of(&stream), &FLAGS)?;
    assert_eq!(found["dirty"]["origin"], "unknown");
    let xbzrle = &found["xbzrle"];
    assert!(xbzrle["pages"].as_u64() > Some(0), "{xbzrle}");
    let share = |name: &str| xbzrle[name].as_f64().unwrap_or(-1.0);
    assert!((0.0..=1.0).contains(&share("encoded")) && (0.0..=1.0).contains(&share("size")), "{xbzrle}");
    Ok(())
}

#[test]
fn a_dirty_rate_makes_rounds_until_there_are_too_many() -> Outcome {
    skip_without_qemu!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let with = |rate: &str| -> Outcome<Value> {
        let findings = tune(
            &of(&checkpoint),
            &["--dirty-rate", rate, "--link", "100Mbit/s", "--channels", "2", "--codec", "none"],
        )?;
        assert_eq!(findings["dirty"]["origin"], "given");
        Ok(prediction(&findings, "100Mbit/s", 2, "none")?.clone())
    };
    let [still, calm, stormy] = [with("0")?, with("2MiB/s")?, with("1GiB/s")?];
    assert_eq!(still["rounds"], 2);
    assert!(calm["rounds"].as_u64() > Some(2) && calm["converges"] == true, "{calm}");
    assert!(calm["downtime_ms"].as_u64().is_some_and(|downtime| downtime <= 310), "{calm}");
    assert!(stormy["converges"] == false && stormy["bottleneck"] == "dirty-rate", "{stormy}");
    Ok(())
}

fn near(found: &Value, known: &Value, within: f64) {
    let [found, known] = [found, known].map(|value| value.as_f64().unwrap_or(f64::NAN));
    assert!((found - known).abs() <= within, "{found} and {known}");
}
