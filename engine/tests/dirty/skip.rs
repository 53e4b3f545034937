//! Tests on machines that lack what they need.

use std::fs::OpenOptions;
use std::io::Write as _;

/// When this variable is set, a test that lacks what it needs fails.
const NO_SKIP: &str = "MULTIFD_NO_SKIP";
/// Names a file to which the reasons are added.
const SKIP_LOG: &str = "MULTIFD_SKIP_LOG";

/// Says on the real stderr, past the test runner, why the calling test does nothing.
pub(crate) fn skipped(why: &str) {
    assert!(std::env::var_os(NO_SKIP).is_none(), "{why} (and {NO_SKIP} is set)");
    let line = format!("{}: skipped: {why}", std::thread::current().name().unwrap_or("test"));
    writeln!(std::io::stderr(), "{line}").unwrap();
    if let Some(log) = std::env::var_os(SKIP_LOG) {
        writeln!(OpenOptions::new().append(true).create(true).open(log).unwrap(), "{line}").unwrap();
    }
}
