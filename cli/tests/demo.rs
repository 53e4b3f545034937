//! `multifd demo` as people run it.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "helpers of tests, outside of the tests themselves"
)]

use std::process::Command;

use multifd_engine::UserfaultLog;
use serde_json::{Value, json};

/// The JSON object of a demo of 64 MiB, which must succeed.
fn demo(flags: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
    let ram = if flags.contains(&"--ram") { &[][..] } else { &["--ram", "64M"] };
    let output = command.args(["demo", "--json", "-q"]).args(ram).args(flags).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&object["status"], &object["verified"]), (&json!("completed"), &json!(true)), "{object:#}");
    object
}

#[test]
fn a_live_guest_arrives_whole() {
    let object = demo(&[]);
    assert_eq!(object["ram_bytes"], json!(64 << 20));
    assert!(object.get("postcopy").is_none(), "{object:#}");
}

/// Whether its pages are asked for or come before that, is chance.
#[test]
fn a_guest_that_goes_on_before_its_ram_is_there_is_followed_by_it_over_channels() {
    if let Err(error) = UserfaultLog::new() {
        eprintln!("skipped: userfaultfd: {error}");
        return;
    }
    let object = demo(&["--postcopy", "--channels", "3", "--codec", "zstd"]);
    assert_eq!((&object["channels"], &object["codec"]), (&json!(3), &json!("zstd:1")), "{object:#}");
    let figures = &object["postcopy"];
    let counted = ["requests", "pages_requested", "neighbours_pushed", "pages_repeated", "recoveries"];
    assert!(counted.iter().all(|key| figures[key].is_u64()), "{object:#}");
    assert_eq!(figures["recoveries"], 0);
}

/// It writes its RAM faster than it is sent.
#[test]
fn a_guest_that_does_not_converge_goes_on_before_its_ram_is_there() {
    if let Err(error) = UserfaultLog::new() {
        eprintln!("skipped: userfaultfd: {error}");
        return;
    }
    let slow = ["--ram", "8M", "--dirty-rate", "400MiB/s", "--max-bandwidth", "16MiB/s"];
    let stalls = ["--downtime-limit", "1us", "--on-stall", "postcopy", "--deadline", "20s"];
    for more in [&[][..], &["--channels", "0"]] {
        let object = demo(&[&slow[..], &stalls, more].concat());
        let last = object["decisions"].as_array().unwrap().last().unwrap();
        assert_eq!(last["decision"], json!("postcopy"), "{object:#}");
        assert!(object["postcopy"]["run_ms"].is_u64(), "{object:#}");
    }
}

#[test]
fn an_audit_and_a_limit_of_the_switch_over_can_be_asked_for() {
    let object = demo(&["--audit", "--max-switchover-bandwidth", "1GiB/s"]);
    assert_eq!(object["audit"]["pages"], json!((64 << 20) / 4096), "{object:#}");
    let object = demo(&[]);
    assert!(object["audit"].is_null(), "{object:#}");
}

#[test]
fn a_guest_that_goes_on_before_its_ram_is_there_finds_every_page() {
    if let Err(error) = UserfaultLog::new() {
        eprintln!("skipped: userfaultfd: {error}");
        return;
    }
    let channels = ["--postcopy", "--channels", "2", "--postcopy-urgent-channels", "2"];
    for flags in [&["--postcopy"][..], &["--postcopy", "--postcopy-preempt"], &channels] {
        let object = demo(flags);
        let figures = &object["postcopy"];
        let number = |key: &str| figures[key].as_u64().unwrap_or_else(|| panic!("{key}: {object:#}"));
        assert!(
            number("requests") > 0 && number("pages_requested") > 0 && number("touched") > 0,
            "{object:#}"
        );
        assert_eq!(number("recoveries"), 0);
        let (_, _) = (number("run_ms"), number("blocktime_ms"));
        let wait = |key: &str| figures["fault_us"][key].as_u64().unwrap();
        assert!(wait("p50") <= wait("p99") && wait("p99") <= wait("max") && wait("max") > 0, "{object:#}");
    }
}
