//! Directories that only look like a checkpoint are refused before anything is sent, by the file
//! and what is wrong with it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_engine::{Checkpoint, ErrorKind};
use multifd_tests::peer::command::ended;
use multifd_tests::peer::{Memory, Recorder, Style, Trial};
use multifd_tests::{Multifd, Outcome};
use serde_json::{Value, json};

/// A sound checkpoint of two blocks.
fn checkpoint() -> Outcome<Trial> {
    let trial = Trial::unix()?.patient(Duration::from_secs(10));
    let mut memory = Memory::zero(&[("pc.ram", 4), ("pc.bios", 2)]);
    let recording = Recorder::migration(Style::default(), &mut memory);
    trial.write_checkpoint(&recording)?.result?;
    Checkpoint::open(&trial.checkpoint())?.ram()?;
    Ok(trial)
}

/// Opening, or mapping, the checkpoint after `damage` names `file` and says `says`.
fn refused(file: &str, says: &str, damage: impl FnOnce(&Path) -> Outcome) -> Outcome {
    let trial = checkpoint()?;
    let directory = trial.checkpoint();
    damage(&directory)?;
    let result = Checkpoint::open(&directory).and_then(|checkpoint| checkpoint.ram());
    let error = result.err().unwrap_or_else(|| panic!("accepted, but should say {says:?}"));
    let (chain, path) = (error.chain(), directory.join(file).display().to_string());
    assert!(chain.contains(&path) && chain.contains(says), "{chain:?} does not say {path:?} and {says:?}");
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(error.source_may_resume());
    Ok(())
}

/// Changes the manifest.
fn manifest(change: impl FnOnce(&mut Value)) -> impl FnOnce(&Path) -> Outcome {
    |directory: &Path| {
        let path = directory.join("manifest.json");
        let mut manifest = serde_json::from_slice(&fs::read(&path)?)?;
        change(&mut manifest);
        Ok(fs::write(&path, manifest.to_string())?)
    }
}

/// Changes the first block in the manifest.
fn block(key: &'static str, value: Value) -> impl FnOnce(&Path) -> Outcome {
    manifest(move |manifest| {
        if let Some(field) = manifest.pointer_mut(&format!("/blocks/0/{key}")) {
            *field = value;
        }
    })
}

#[test]
fn parts_that_are_missing() -> Outcome {
    for file in ["manifest.json", "device-state.bin", "ram/00.img", "ram/01.img"] {
        refused(file, "No such file", |directory| Ok(fs::remove_file(directory.join(file))?))?;
    }
    refused("ram/00.img", "No such file", |directory| Ok(fs::remove_dir_all(directory.join("ram"))?))?;
    let nowhere =
        Checkpoint::open(&PathBuf::from("/nonexistent/checkpoint")).err().map(|error| error.chain());
    assert!(nowhere.is_some_and(|chain| chain.contains("/nonexistent/checkpoint/manifest.json")));
    Ok(())
}

#[test]
fn a_manifest_that_is_none() -> Outcome {
    for text in ["", "{", "[]", "null", "{}", "\u{0}", &"[".repeat(100_000)] {
        refused("manifest.json", "reading", |directory| {
            Ok(fs::write(directory.join("manifest.json"), text)?)
        })?;
    }
    refused("manifest.json", "reading", |directory| {
        let path = directory.join("manifest.json");
        let whole = fs::read(&path)?;
        Ok(fs::write(&path, whole.get(..whole.len() / 2).unwrap_or_default())?)
    })
}

#[test]
fn a_manifest_that_cannot_be_true() -> Outcome {
    let file = "manifest.json";
    refused(file, "format 3, expected 1 or 2", manifest(|it| it["format"] = json!(3)))?;
    refused(file, "format 2 does not go with early_state", manifest(|it| it["format"] = json!(2)))?;
    refused(file, "format 0, expected 1 or 2", manifest(|it| it["format"] = json!(0)))?;
    refused(file, "reading", manifest(|it| it["format"] = json!(-1)))?;
    refused(file, "no RAM blocks", manifest(|it| it["blocks"] = json!([])))?;
    refused(file, "blocks", manifest(|it| drop(it.as_object_mut().map(|it| it.remove("blocks")))))?;
    let plus = format!("+{}", "f".repeat(31));
    refused(file, "expected 32 hexadecimal digits", manifest(move |it| it["uuid"] = json!(plus)))?;
    refused(file, "uuid \"12\", expected 32 hexadecimal digits", manifest(|it| it["uuid"] = json!("12")))?;
    refused(file, "block pc.ram: page size 16384, expected 4096", block("page_size", json!(16384)))?;
    refused(file, "block pc.ram: length 0, expected whole pages", block("length", json!(0)))?;
    refused(file, "block pc.ram: length 5000, expected whole pages", block("length", json!(5000)))?;
    refused(file, "reading", block("length", json!(-4096)))?;
    refused(file, "reading", block("length", json!(1e30)))?;
    refused(file, "block pc.bios is there twice", block("idstr", json!("pc.bios")))?;
    refused(file, "block name: 0 bytes", block("idstr", json!("")))?;
    refused(file, "block name: 256 bytes", block("idstr", json!("n".repeat(256))))
}

#[test]
fn files_outside_of_the_checkpoint() -> Outcome {
    for file in [
        "/etc/passwd",
        "../../etc/passwd",
        "ram/../../x",
        "ram/..",
        "ram/",
        "ram",
        "",
        "ram//00.img",
        "other/00.img",
    ] {
        let says = format!("block pc.ram: file {file:?}, expected ram/NAME");
        refused("manifest.json", &says, block("file", json!(file)))?;
    }
    for file in ["ram/00.img", "device-state.bin", "manifest.json"] {
        refused(file, "a link", |directory| {
            let (path, elsewhere) = (directory.join(file), directory.join("elsewhere"));
            fs::rename(&path, &elsewhere)?;
            Ok(symlink(&elsewhere, &path)?)
        })?;
    }
    refused("ram/.", "no file", block("file", json!("ram/.")))?;
    refused("ram/a\u{0}b", "reading", block("file", json!("ram/a\u{0}b")))
}

#[test]
fn ram_of_another_length() -> Outcome {
    for len in [0, 4096, 3 * 4096, 4 * 4096 - 1, 4 * 4096 + 1, 5 * 4096] {
        let says = format!("{len} bytes, the manifest says 16384");
        refused("ram/00.img", &says, |directory| {
            Ok(fs::File::options().write(true).open(directory.join("ram/00.img"))?.set_len(len)?)
        })?;
    }
    refused("ram/00.img", "no file", |directory| {
        let path = directory.join("ram/00.img");
        fs::remove_file(&path)?;
        Ok(symlink("/dev/zero", path)?)
    })
}

#[test]
fn device_state_that_was_cut_anywhere() -> Outcome {
    let trial = checkpoint()?;
    let path = trial.checkpoint().join("device-state.bin");
    let whole = fs::read(&path)?;
    // Without the vmdescription it is whole, too: some machines have none.
    let description = b"\x7e\0\0\0\x29\0\x06";
    let eof = whole.windows(description.len()).position(|bytes| bytes == description).map(|at| at + 6);
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len])?;
        match Checkpoint::open(&trial.checkpoint()) {
            Ok(checkpoint) => {
                assert_eq!(Some(len), eof, "accepted with {len} of {} bytes", whole.len());
                assert_eq!(checkpoint.configuration().machine, "pc-q35-10.0");
            }
            Err(error) => {
                assert_ne!(Some(len), eof, "{}", error.chain());
                assert!(error.chain().contains("device-state.bin"), "{len}: {}", error.chain());
            }
        }
    }
    Ok(())
}

#[test]
fn device_state_with_something_after_its_end_or_of_another_kind() -> Outcome {
    let file = "device-state.bin";
    let write = |bytes: Vec<u8>| move |directory: &Path| Ok(fs::write(directory.join(file), bytes)?);
    refused(file, "configuration type: 0x00, expected 0x07", write(vec![0; 100]))?;
    refused(file, "machine type name: 4294967295 bytes", write([vec![7], vec![0xff; 100]].concat()))?;
    refused(file, "up to its end", |directory| {
        let path = directory.join(file);
        let longer = [fs::read(&path)?, b"more".to_vec()].concat();
        Ok(fs::write(&path, longer)?)
    })
}

#[test]
fn the_command_refuses_before_it_connects() -> Outcome {
    let trial = checkpoint()?;
    manifest(|manifest| manifest["blocks"][0]["file"] = json!("/etc/passwd"))(&trial.checkpoint())?;
    let directory = trial.checkpoint().display().to_string();
    let mut send = Multifd::spawn("send", ["send", &directory, "tcp:127.0.0.1:1", "--json"])?;
    let ended = ended(&mut send)?;
    assert_eq!((ended.code, &ended.json["status"]), (1, &"failed".into()), "{}", ended.stderr);
    assert!(ended.stderr.contains("file \"/etc/passwd\", expected ram/NAME"), "{}", ended.stderr);
    Ok(())
}
