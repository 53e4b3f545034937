//! Releases of QEMU: the installed one, and those that `tests/peers/install` unpacks beside it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::qemu::PROGRAM;
use crate::skip::{missing_qemu, peers_dir};
use crate::{Failure, Outcome};

/// What `tests/peers/install` reads, too.
const LIST: &str = include_str!("../peers/releases");

/// A release of QEMU that runs here.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Release {
    version: (u32, u32, u32),
    program: PathBuf,
}

impl Release {
    /// All that run here, the oldest first, and why others that should do not. Asked once.
    pub fn all() -> &'static (Vec<Self>, Vec<String>) {
        static FOUND: OnceLock<(Vec<Release>, Vec<String>)> = OnceLock::new();
        FOUND.get_or_init(find)
    }

    /// The installed one.
    ///
    /// # Errors
    /// Why there is none.
    pub fn installed() -> Result<Self, String> {
        match missing_qemu() {
            None => Self::of(Path::new(PROGRAM)).map_err(|failure| failure.to_string()),
            Some(why) => Err(why.to_owned()),
        }
    }

    /// The unpacked one of this name in `tests/peers/releases`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn unpacked(name: &str) -> Result<Self, String> {
        let program = program(name);
        match program.exists() {
            true => Self::of(&program).map_err(|failure| failure.to_string()),
            false => Err(format!("no {} (tests/peers/install gets it)", program.display())),
        }
    }

    fn of(program: &Path) -> Outcome<Self> {
        let output = Command::new(program).arg("--version").output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let wrong = || Failure::new(format!("{} --version says {said:?}", program.display()));
        Ok(Self { version: version(&said).ok_or_else(wrong)?, program: program.to_owned() })
    }

    /// What to start.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Whether it is this release or a later one.
    pub fn since(&self, major: u32, minor: u32) -> bool {
        (self.version.0, self.version.1) >= (major, minor)
    }

    /// The machine type that is called after this release, which later ones have, too.
    pub fn machine(&self) -> String {
        format!("pc-q35-{}.{}", self.version.0, self.version.1)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.version;
        f.pad(&format!("{major}.{minor}.{patch}"))
    }
}

fn program(name: &str) -> PathBuf {
    peers_dir().join(format!("qemu-{name}/run")).join(PROGRAM)
}

/// Name and mark of each release in the list.
fn listed() -> impl Iterator<Item = (&'static str, &'static str)> {
    LIST.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.nth(2)?))
    })
}

fn find() -> (Vec<Release>, Vec<String>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    let mut note = |release: Result<Release, String>| match release {
        Ok(release) => found.push(release),
        Err(why) => missing.push(why),
    };
    note(Release::installed());
    for (name, mark) in listed() {
        if mark == "always" || program(name).exists() {
            note(Release::unpacked(name));
        }
    }
    found.sort();
    (found, missing)
}

fn version(said: &str) -> Option<(u32, u32, u32)> {
    let text = said.split("version ").nth(1)?.split([' ', '\n']).next()?;
    let mut numbers = text.splitn(3, '.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_three_numbers() {
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\n"), Some((7, 2, 22)));
        assert_eq!(version("QEMU emulator version 11.1.0\nCopyright"), Some((11, 1, 0)));
        assert_eq!(version("QEMU emulator version 11"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn each_line_of_the_list_has_a_name_and_a_mark() {
        let listed: Vec<_> = listed().collect();
        assert!(listed.contains(&("7.2", "always")) && listed.contains(&("5.2", "request")), "{listed:?}");
        assert!(listed.iter().all(|(_, mark)| ["always", "request"].contains(mark)), "{listed:?}");
    }
}
