//! What is linked in: licences that this project may be given away with, and crates of the registry
//! only. Advisories need a database that is fetched: `cargo deny check advisories` is for a machine
//! that has one (SECURITY.md).

use std::process::Command;

use multifd_tests::{Failure, Outcome};
use serde_json::Value;

/// Licences that ask for no more than their text.
const ALLOWED: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Zlib",
];

/// Whether an SPDX expression can be met with `allowed` licences.
fn is_met(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    // "MIT/Apache-2.0" is how crates wrote it before there were expressions.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any(&words, &mut at, allowed);
    met && at == words.len()
}

fn any(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = all(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all(words, at, allowed);
    }
    met
}

fn all(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &dyn Fn(&str) -> bool) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = any(words, at, allowed);
        *at += 1;
        return met;
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1).copied().unwrap_or_default();
        *at += 2;
        return allowed(&format!("{word} WITH {exception}"));
    }
    allowed(word)
}

#[test]
fn every_crate_is_of_the_registry_and_has_a_licence_that_we_can_keep() -> Outcome {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let output = cargo.args(["metadata", "--format-version", "1", "--locked", "--offline"]).output()?;
    if !output.status.success() {
        return Err(Failure::new(String::from_utf8_lossy(&output.stderr)));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages =
        metadata.get("packages").and_then(Value::as_array).ok_or_else(|| Failure::new("no packages"))?;
    assert!(packages.len() > 100, "{} packages", packages.len());
    let mut wrong = Vec::new();
    for package in packages {
        let text = |key: &str| package.get(key).and_then(Value::as_str);
        let (name, licence) = (text("name").unwrap_or_default(), text("license").unwrap_or_default());
        if !is_met(licence, &|word| ALLOWED.contains(&word)) {
            wrong.push(format!("{name}: licence {licence:?}"));
        }
        // Members of the workspace have no source.
        if text("source").is_some_and(|source| !source.starts_with("registry+")) {
            wrong.push(format!("{name}: from {:?}", text("source")));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failure::new(wrong.join("\n"))) }
}

#[test]
fn licences_are_read_as_spdx_says() {
    let allowed = |word: &str| ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].contains(&word);
    for met in [
        "MIT",
        "MIT OR GPL-3.0",
        "GPL-3.0/MIT",
        "ISC AND (Apache-2.0 OR MIT)",
        "GPL-2.0 OR MIT AND ISC",
        "Apache-2.0 WITH LLVM-exception OR Apache-2.0",
    ] {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in ["", "GPL-3.0", "MIT AND GPL-3.0", "ISC AND (GPL-2.0 OR Apache-2.0)", "MIT MIT", "MIT AND"] {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}
