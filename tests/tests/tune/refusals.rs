//! What cannot be tuned is refused in a line that says why.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use multifd_tests::{CommandReport, Multifd, Outcome, Scratch};
use multifd_wire::Configuration;
use serde_json::json;

use crate::fixture::SOON;

/// The error, and the exit code.
fn refused(arguments: &[&str]) -> Outcome<(String, Option<i32>)> {
    let arguments = ["tune", "--json", "-q"].iter().chain(arguments);
    let mut process = Multifd::spawn("tune", arguments)?;
    let status = process.wait(SOON)?;
    let said = process.stderr().text();
    if status.code() == Some(1) {
        let report = CommandReport::by(&process)?;
        assert_eq!(report.text("status")?, "failed");
        assert_eq!(said.trim_end(), format!("multifd: {}", report.text("error")?));
    }
    Ok((said, status.code()))
}

#[test]
fn what_is_no_guest_is_named() -> Outcome {
    let scratch = Scratch::new()?;
    let folder = scratch.path("folder");
    fs::create_dir(&folder)?;
    let text = scratch.path("text");
    fs::write(&text, "this is no stream, but it is long enough to be taken for the begin of one")?;
    let nothing = scratch.path("nothing");
    fs::write(&nothing, "")?;
    let missing = scratch.path("missing");
    for (path, expected) in [
        (&folder, "not a checkpoint"),
        (&text, "no migration stream"),
        (&nothing, "nothing"),
        (&missing, "No such file"),
    ] {
        let path = path.display().to_string();
        let (error, code) = refused(&[&path])?;
        assert!(error.contains(expected) && error.contains(&path), "{error}");
        assert_eq!(code, Some(1));
    }
    Ok(())
}

#[test]
fn the_page_is_not_written_over_the_input() -> Outcome {
    let scratch = Scratch::new()?;
    let stream = scratch.path("stream");
    fs::write(&stream, "a stream")?;
    let path = stream.display().to_string();
    let (error, code) = refused(&[&path, "--html", &path])?;
    assert!(error.contains(&format!("refusing to overwrite the input {path}")), "{error}");
    assert_eq!(code, Some(1));
    assert_eq!(fs::read_to_string(&stream)?, "a stream");
    Ok(())
}

/// It is there before what is measured turns out to be nothing.
#[test]
fn the_page_is_its_owners_alone() -> Outcome {
    let scratch = Scratch::new()?;
    let (stream, page) = (scratch.path("stream"), scratch.path("page"));
    fs::write(&stream, "no stream")?;
    refused(&[&stream.display().to_string(), "--html", &page.display().to_string()])?;
    assert_eq!(fs::metadata(&page)?.permissions().mode() & 0o777, 0o600);
    Ok(())
}

#[test]
fn a_checkpoint_of_zeros_has_nothing_to_measure() -> Outcome {
    let scratch = Scratch::new()?;
    let folder = scratch.path("zeros");
    fs::create_dir_all(folder.join("ram"))?;
    fs::File::create(folder.join("ram/00.img"))?.set_len(1 << 20)?;
    let configuration = Configuration::new("pc-q35-10.0");
    let mut state = Vec::new();
    configuration.encode(&mut state);
    // No devices: EOF, and a description of nothing.
    let description = br#"{"page_size": 4096, "devices": []}"#;
    state.extend([0, 6]);
    state.extend(u32::try_from(description.len())?.to_be_bytes());
    state.extend(description);
    fs::write(folder.join("device-state.bin"), state)?;
    let block = json!({ "idstr": "pc.ram", "length": 1 << 20, "page_size": 4096, "file": "ram/00.img" });
    let manifest = json!({
        "format": 1, "machine": "pc-q35-10.0", "uuid": null, "switchover_start": false, "blocks": [block],
        "source": "a test", "codec": "none", "channels": 0, "created_unix_s": 0, "total_ms": 0,
    });
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let (error, code) = refused(&[&folder.display().to_string()])?;
    assert!(error.contains("no page that is not zero"), "{error}");
    assert_eq!(code, Some(1));
    Ok(())
}

#[test]
fn wrong_values_are_repeated() -> Outcome {
    for (flags, expected) in [
        (&["dir", "--link", "0"][..], "link of 0"),
        (&["dir", "--link", "0Gbit/s"], "link of 0"),
        (&["dir", "--link", "fast"], "\"fast\""),
        (&["dir", "--channels", "256"], "\"256\""),
        (&["dir", "--cores", "0"], "0"),
        (&["dir", "--sample", "0"], "at least 4M"),
        (&["dir", "--dirty-rate", "much"], "\"much\""),
        (&["dir", "--pid", "1"], "--pid"),
        (&[], "SOURCE"),
    ] {
        let (error, code) = refused(flags)?;
        assert!(error.contains(expected), "{flags:?}: {error}");
        assert_eq!(code, Some(2), "{flags:?}");
    }
    Ok(())
}

#[test]
fn a_process_without_memory_is_named() -> Outcome {
    let (error, code) = refused(&["--pid", "4194305"])?;
    assert!(error.contains("4194305") && error.contains("no such process"), "{error}");
    assert_eq!(code, Some(1));
    // A child that has ended, but was not waited for, has a name and nothing else.
    let mut child = std::process::Command::new("true").spawn()?;
    let pid = child.id().to_string();
    let stat = format!("/proc/{pid}/stat");
    let deadline = Instant::now() + SOON;
    while !fs::read_to_string(&stat)?.contains(") Z ") {
        assert!(Instant::now() < deadline, "`true` does not end");
        std::thread::yield_now();
    }
    let (error, code) = refused(&["--pid", &pid])?;
    child.wait()?;
    assert!(error.contains(&pid) && error.contains("no memory"), "{error}");
    assert_eq!(code, Some(1));
    Ok(())
}
