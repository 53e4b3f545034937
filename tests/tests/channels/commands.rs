//! Our own command with a command behind `exec:`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use multifd_tests::peer::command::{ended, interrupt};
use multifd_tests::peer::{Lane, Memory, Recorder, Style};
use multifd_tests::{Failure, Multifd, Outcome, Scratch};

use crate::SOON;

/// Fails unless the process is gone, or nothing but its exit status is left of it.
pub(crate) fn check_gone(process: &str) -> Outcome {
    let begun = Instant::now();
    let stat = PathBuf::from("/proc").join(process.trim()).join("stat");
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        if begun.elapsed() > SOON {
            return Err(Failure::new(format!("process {process} lives on")));
        }
        std::thread::park_timeout(Duration::from_millis(1));
    }
    Ok(())
}

/// Waits until the file has a whole line.
pub(crate) fn line_of(file: &Path) -> Outcome<String> {
    let begun = Instant::now();
    loop {
        match std::fs::read_to_string(file) {
            Ok(line) if line.ends_with('\n') => return Ok(line),
            _ if begun.elapsed() > SOON => {
                return Err(Failure::new(format!("nothing in {}", file.display())));
            }
            _ => std::thread::park_timeout(Duration::from_millis(1)),
        }
    }
}

#[test]
fn a_checkpoint_passes_through_commands_and_ctrl_c_takes_them_along() -> Outcome {
    let scratch = Scratch::new()?;
    let path = |name: &str| scratch.path(name).display().to_string();
    let mut memory = Memory::small(9);
    let style = Style { return_path: false, ..Style::default() };
    std::fs::write(path("stream"), Recorder::migration(style, &mut memory).bytes(Lane::Main))?;

    let from = format!("exec:cat {}", path("stream"));
    let mut receive = Multifd::spawn("receive", ["receive", &from, "--out", &path("guest"), "--json"])?;
    assert_eq!(ended(&mut receive)?.code, 0);
    memory.check_checkpoint(&scratch.path("guest"))?;

    let to = format!("exec:gzip > {}", path("packed"));
    let sent = ended(&mut Multifd::spawn("send", ["send", &path("guest"), &to, "--json"])?)?;
    assert_eq!((sent.code, &sent.json["confirmed"]), (0, &false.into()), "{}", sent.stderr);
    let back = format!("exec:gzip -dc {}", path("packed"));
    let mut receive = Multifd::spawn("receive", ["receive", &back, "--out", &path("back"), "--json"])?;
    assert_eq!(ended(&mut receive)?.code, 0);
    memory.check_checkpoint(&scratch.path("back"))?;

    let failing =
        ended(&mut Multifd::spawn("send", ["send", &path("guest"), "exec:cat >&2; exit 3", "--json"])?)?;
    assert_eq!(failing.code, 3, "after the last byte: {}", failing.stderr);
    assert!(failing.stderr.contains("ended with exit status: 3"), "{}", failing.stderr);

    // The shell, and a child of it that holds the pipes, too.
    let numbers = path("numbers");
    let waiting = format!("exec:sleep 1000 & echo $! $$ > {numbers}; wait");
    for command in ["receive", "send"] {
        let folder = if command == "send" {
            [path("guest"), waiting.clone()]
        } else {
            [waiting.clone(), "--out".into()]
        };
        let mut arguments = vec![command.to_owned()];
        arguments.extend(folder);
        arguments.extend((command == "receive").then(|| path("never")));
        // Most of a second of a stream that the command does not read.
        arguments.extend(["--json".to_owned(), "--max-bandwidth".to_owned(), "4K".to_owned()]);
        let mut process = Multifd::spawn(command, arguments)?;
        let line = line_of(Path::new(&numbers))?;
        interrupt(&process)?;
        let cancelled = ended(&mut process)?;
        assert_eq!(cancelled.code, 130, "{command}: {}", cancelled.stderr);
        line.split_whitespace().try_for_each(check_gone)?;
        std::fs::remove_file(&numbers)?;
    }
    Ok(())
}
