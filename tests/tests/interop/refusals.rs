//! What is not done, in the words of the program that does not do it.

use multifd_tests::{Failure, Release};

/// Major and minor.
type Version = (u32, u32);

/// What a QEMU does not know: by name, the release that has it first, and the one that has it no
/// more.
const FEATURES: [(&str, Version, Version); 12] = [
    ("background-snapshot", (6, 0), NEVER),
    ("block", (0, 0), (9, 1)),
    ("compress", (0, 0), (9, 1)),
    ("direct-io", (9, 1), NEVER),
    ("dirty-limit", (8, 1), NEVER),
    ("mapped-ram", (9, 0), NEVER),
    ("postcopy-preempt", (7, 1), NEVER),
    ("switchover-ack", (8, 1), NEVER),
    ("zero-blocks", (0, 0), (11, 0)),
    ("zero-copy-send", (7, 1), NEVER),
    ("zero-page-detection", (9, 0), NEVER),
    // 5.2 has it, but its package is built without.
    ("zstd", (6, 0), NEVER),
];

const NEVER: Version = (u32::MAX, 0);

/// How a QEMU says that it does not know a feature, around its name.
const UNKNOWN: [(&str, &str); 3] =
    [("Invalid parameter '", "'"), ("Parameter '", "' is unexpected"), (" does not accept value '", "'")];

/// What a QEMU before this release does not do, and how it says so.
const WORDS: [(&str, Version); 4] = [
    ("Parameter 'uri' expects a valid migration protocol", (8, 2)),
    ("unknown migration protocol: file:", (8, 2)),
    ("Property 'kvm-accel.dirty-ring-size' not found", (6, 1)),
    ("Postcopy is not yet compatible with multifd", (10, 1)),
];

/// What we do not do, by the name of the way, and how we say so.
const OURS: [(&str, &str); 2] = [
    ("capability block", "capability block, which QEMU 9.1 removed"),
    ("capability x-ignore-shared", "x-ignore-shared"),
];

/// The words of a failure that is a refusal by a QEMU of this release.
pub(crate) fn at(release: &Release, failure: &Failure) -> Option<String> {
    let said = failure.to_string();
    let unknown = FEATURES
        .iter()
        .filter(|(_, first, end)| !release.since(first.0, first.1) || release.since(end.0, end.1));
    let unknown =
        unknown.flat_map(|(name, ..)| UNKNOWN.map(|(before, behind)| format!("{before}{name}{behind}")));
    let undone = WORDS.iter().filter(|(_, end)| !release.since(end.0, end.1));
    let undone = undone.map(|(words, _)| (*words).to_owned());
    unknown.chain(undone).find(|words| said.contains(words)).map(|words| words.trim().to_owned())
}

/// How we refuse this way.
pub(crate) fn ours(way: &str) -> Option<&'static str> {
    OURS.iter().find(|(name, _)| *name == way).map(|(_, words)| *words)
}
