//! Tests on machines that lack what they need.

use std::{fs::OpenOptions, io::Write as _, path::PathBuf, process::Command, sync::OnceLock};

use crate::{Failure, Outcome, Release, qemu::PROGRAM};

/// When this variable is set, a test that lacks what it needs fails: where everything is installed,
/// nothing may be skipped unnoticed.
const NO_SKIP: &str = "MULTIFD_NO_SKIP";

/// A file that gets a line for every test that was skipped: test runners hide what a passing test
/// prints.
const SKIP_LOG: &str = "MULTIFD_SKIP_LOG";

/// Says `skipped: why` and returns from the test, which must return [`Outcome`].
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {
        return $crate::skip::skipped(&format!($($why)*))
    };
}

/// Skips the test (see [`skip!`]) when there is no QEMU.
#[macro_export]
macro_rules! skip_without_qemu {
    () => {
        if let Some(why) = $crate::skip::missing_qemu() {
            $crate::skip!("{why}");
        }
    };
}

/// Skips the test (see [`skip!`]) when there is no QEMU or no Linux guest.
#[macro_export]
macro_rules! skip_without_linux {
    () => {
        $crate::skip_without_qemu!();
        if let Some(why) = $crate::skip::missing_linux() {
            $crate::skip!("{why}");
        }
    };
}

/// Skips the test (see [`skip!`]) when there is no browser.
#[macro_export]
macro_rules! skip_without_browser {
    () => {
        if let Some(why) = $crate::browser::missing() {
            $crate::skip!("{why}");
        }
    };
}

/// Says why a test does nothing, on the real stderr: the test runner hides what a passing test
/// prints.
///
/// # Errors
/// When `MULTIFD_NO_SKIP` is set.
pub fn skipped(why: &str) -> Outcome {
    if std::env::var_os(NO_SKIP).is_some() {
        return Err(Failure::new(format!("{why} (and {NO_SKIP} is set)")));
    }
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    writeln!(std::io::stderr(), "{test}: skipped: {why}")?;
    if let Some(log) = std::env::var_os(SKIP_LOG) {
        writeln!(OpenOptions::new().append(true).create(true).open(log)?, "{test}: skipped: {why}")?;
    }
    Ok(())
}

/// Why there is no QEMU to test with, if so. Asked once.
pub fn missing_qemu() -> Option<&'static str> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let look = || match Command::new(PROGRAM).arg("--version").output() {
        Ok(output) => qemu_too_old(&String::from_utf8_lossy(&output.stdout)),
        Err(error) => Some(format!("{PROGRAM}: {error} (tests/peers/install gets it)")),
    };
    MISSING.get_or_init(look).as_deref()
}

/// The QEMU whose own machine types are 11.1 or later, which `tests/peers/install` unpacks; or why
/// there is none.
///
/// # Errors
/// What is missing, and how to get it.
pub fn newest_qemu() -> Result<PathBuf, String> {
    Release::unpacked("newest").map(|release| release.program().to_owned())
}

/// Why no guest runs under KVM, if so.
pub fn missing_kvm() -> Option<&'static str> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.is_err().then_some("no /dev/kvm")
}

/// Where `tests/peers/install` unpacks what it does not install.
pub fn peers_dir() -> PathBuf {
    std::env::var_os("MULTIFD_PEERS_DIR").map_or_else(|| cache_dir().join("multifd-peers"), PathBuf::from)
}

/// Why there is no Linux guest to test with, if so.
pub fn missing_linux() -> Option<String> {
    let dir = guest_dir();
    if let Some(name) = ["vmlinuz", "busybox", "modules"].iter().find(|name| !dir.join(name).exists()) {
        return Some(format!("no {name} in {} (tests/peers/install gets it)", dir.display()));
    }
    let busybox = std::fs::read(dir.join("busybox")).unwrap_or_default();
    let program = busybox.starts_with(b"\x7fELF");
    (!program).then(|| format!("busybox in {} is not a program: {} bytes", dir.display(), busybox.len()))
}

/// Where `tests/peers/install` puts the Linux guest's kernel, modules and busybox.
pub fn guest_dir() -> PathBuf {
    std::env::var_os("MULTIFD_GUEST_DIR").map_or_else(|| cache_dir().join("multifd-guest"), PathBuf::from)
}

fn cache_dir() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))).unwrap_or_default()
}

fn qemu_too_old(version: &str) -> Option<String> {
    let major = version.split("version ").nth(1).and_then(|rest| rest.split('.').next());
    let major: u32 = major.and_then(|text| text.parse().ok()).unwrap_or(0);
    (major < 10).then(|| format!("QEMU 10 or newer is needed, found {:?}", version.lines().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unknown_versions_are_named() {
        assert_eq!(qemu_too_old("QEMU emulator version 10.0.2 (Debian 1:10.0.2)\n"), None);
        assert_eq!(qemu_too_old("QEMU emulator version 11.1.0\n"), None);
        assert!(qemu_too_old("QEMU emulator version 7.2.9\n").unwrap().contains("7.2.9"));
        assert!(qemu_too_old("").is_some());
    }
}
