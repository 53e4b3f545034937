//! What is said only behind the last byte of a stream: how the command has ended that it came from,
//! and whether it was the last byte.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use multifd_tests::peer::command::{Ended, ended, names};
use multifd_tests::peer::{Lane, Memory, Recorder, Style};
use multifd_tests::{Multifd, Outcome, Scratch};

use crate::commands::{check_gone, line_of};

/// A folder with a recorded stream.
pub(crate) struct Place {
    pub(crate) scratch: Scratch,
    pub(crate) memory: Memory,
}

impl Place {
    pub(crate) fn new(return_path: bool) -> Outcome<Self> {
        let (scratch, mut memory) = (Scratch::new()?, Memory::small(9));
        let style = Style { return_path, ..Style::default() };
        fs::write(scratch.path("stream"), Recorder::migration(style, &mut memory).bytes(Lane::Main))?;
        fs::create_dir(scratch.path("out"))?;
        Ok(Self { scratch, memory })
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.scratch.path(name).display().to_string()
    }

    pub(crate) fn checkpoint(&self) -> String {
        self.path("out/guest")
    }

    /// `multifd receive URI` to its end.
    fn receive(&self, uri: &str, flags: &[&str]) -> Outcome<Ended> {
        let checkpoint = self.checkpoint();
        let usual = ["receive", uri, "--out", &checkpoint, "--json"];
        ended(&mut Multifd::spawn("receive", usual.iter().chain(flags))?)
    }

    fn refuses(&self, uri: &str, flags: &[&str], says: &str) -> Outcome {
        let refused = self.receive(uri, flags)?;
        let status = refused.json.get("status").and_then(serde_json::Value::as_str);
        assert_eq!((refused.code, status), (1, Some("failed")), "{uri}: {}", refused.stderr);
        assert!(refused.stderr.contains(says), "{uri}: {}", refused.stderr);
        self.check_nothing_left()
    }

    pub(crate) fn check_nothing_left(&self) -> Outcome {
        assert_eq!(names(&self.scratch.path("out"))?, Vec::<String>::new());
        Ok(())
    }
}

#[test]
fn a_command_that_fails_behind_the_last_byte_leaves_no_checkpoint() -> Outcome {
    let place = Place::new(false)?;
    let stream = place.path("stream");
    place.refuses(&format!("exec:cat {stream}; exit 1"), &[], "ended with exit status: 1")?;
    place.refuses(&format!("exec:cat {stream}; kill -9 $$"), &[], "ended with signal: 9")?;
    // The output is closed before: its end is not the command's.
    place.refuses(&format!("exec:cat {stream}; exec >&-; exit 5"), &[], "ended with exit status: 5")
}

#[test]
fn a_wrong_checksum_in_the_trailer_of_a_packed_stream_leaves_no_checkpoint() -> Outcome {
    let place = Place::new(false)?;
    let packed = place.path("packed");
    let pack = format!("gzip < {} > {packed}", place.path("stream"));
    multifd_tests::Process::spawn("gzip", std::process::Command::new("sh").args(["-c", &pack]))?
        .wait_success(crate::SOON)?;
    let mut bytes = fs::read(&packed)?;
    // RFC 1952: the CRC is the first half of the last 8 bytes.
    let crc = bytes.len() - 8;
    bytes[crc] ^= 1;
    fs::write(&packed, bytes)?;
    place.refuses(&format!("exec:gzip -dc {packed}"), &[], "ended with exit status: 1")
}

#[test]
fn bytes_behind_the_stream_leave_no_checkpoint() -> Outcome {
    let place = Place::new(false)?;
    let stream = place.path("stream");
    let says = "follow it";
    place.refuses(&format!("exec:cat {stream}; echo rubbish"), &[], says)?;
    File::options().append(true).open(&stream)?.write_all(b"x")?;
    place.refuses(&format!("file:{stream}"), &[], says)?;
    let checkpoint = place.checkpoint();
    let arguments = ["receive", "fd:0", "--out", &checkpoint, "--json"];
    let mut piped = std::process::Command::new("sh");
    piped.args(["-c", "cat \"$0\" | \"$@\"", &stream]).arg(Multifd::binary()?).args(arguments);
    let mut piped = multifd_tests::Process::spawn("receive", piped.stdout(std::process::Stdio::piped()))?;
    let piped = ended(&mut piped)?;
    assert!(piped.code == 1 && piped.stderr.contains(says), "{}", piped.stderr);
    place.check_nothing_left()
}

#[test]
fn a_command_that_never_ends_has_no_verdict() -> Outcome {
    let place = Place::new(false)?;
    let (stream, number) = (place.path("stream"), place.path("number"));
    for (close, says) in [("", "the stream is still open after 5s"), ("exec >&-;", "did not end within 5s")] {
        let command = format!("exec:cat {stream}; {close} echo $$ > {number}; exec sleep 1000");
        place.refuses(&command, &["--timeout", "5s"], says)?;
        check_gone(&line_of(Path::new(&number))?)?;
        fs::remove_file(&number)?;
    }
    Ok(())
}

#[test]
fn a_command_that_waits_for_its_standard_input_ends_well() -> Outcome {
    let place = Place::new(false)?;
    let received = place.receive(&format!("exec:cat {}; cat > /dev/null", place.path("stream")), &[])?;
    assert_eq!(received.code, 0, "{}", received.stderr);
    let checkpoint = place.scratch.path("out/guest");
    place.memory.check_checkpoint(&checkpoint)?;
    // Only the owner reads a guest's RAM.
    for (folder, files) in [(checkpoint.clone(), 0o600), (checkpoint.join("ram"), 0o600)] {
        assert_eq!(fs::metadata(&folder)?.permissions().mode() & 0o777, 0o700);
        for entry in fs::read_dir(&folder)? {
            let found = entry?.metadata()?;
            assert!(found.is_dir() || found.permissions().mode() & 0o777 == files, "{found:?}");
        }
    }
    Ok(())
}

#[test]
fn a_command_that_fails_after_the_source_was_answered_ends_with_exit_code_3() -> Outcome {
    let place = Place::new(true)?;
    // The answers come on the second command's standard input, which ends after the last of them.
    let command = format!("exec:cat {}; cat > {}; exit 7", place.path("stream"), place.path("answers"));
    let received = place.receive(&command, &[])?;
    assert_eq!((received.code, &received.json["status"]), (3, &"failed".into()), "{}", received.stderr);
    assert!(received.stderr.contains("ended with exit status: 7"), "{}", received.stderr);
    place.memory.check_checkpoint(&place.scratch.path("out/guest"))
}
