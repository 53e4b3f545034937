//! docs/reliability.md names a test for each promise: every one of them must be there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use multifd_tests::{Failure, Outcome};

/// Crates and folders that have tests.
const HOMES: [&str; 8] =
    ["benches", "cli", "codecs", "engine", "tests", "transports", "transports-tls", "wire"];

/// Adds the name of each function below `folder`.
fn functions(folder: &Path, found: &mut BTreeSet<String>) -> Outcome {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            functions(&path, found)?;
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = fs::read_to_string(&path)?;
            let name = |rest: &str| rest.split(['(', '<']).next().unwrap_or_default().to_owned();
            found.extend(text.split("fn ").skip(1).map(name));
        }
    }
    Ok(())
}

/// `a::{b, c}_d` is `a::b_d` and `a::c_d`.
fn expanded(name: &str) -> Vec<String> {
    let Some((before, rest)) = name.split_once('{') else { return vec![name.to_owned()] };
    let (inner, behind) = rest.split_once('}').unwrap_or((rest, ""));
    inner.split(',').flat_map(|part| expanded(&format!("{before}{}{behind}", part.trim()))).collect()
}

/// The tests that the tables of a document name: words of four parts at least.
fn named(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter(|line| line.starts_with('|'));
    let quoted = rows.flat_map(|row| row.split('`').skip(1).step_by(2));
    let last = |name: String| name.rsplit([':', ' ', '.']).next().unwrap_or_default().to_owned();
    let is_test = |name: &String| {
        name.matches('_').count() > 2 && name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_' | '*'))
    };
    quoted.flat_map(expanded).map(last).filter(is_test).collect()
}

#[test]
fn every_test_that_the_promises_name_is_there() -> Outcome {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or_else(|| Failure::new("no root"))?;
    let mut functions_there = BTreeSet::new();
    for home in HOMES {
        functions(&root.join(home), &mut functions_there)?;
    }
    let named = named(&fs::read_to_string(root.join("docs/reliability.md"))?);
    assert!(named.len() > 100, "{named:?}");
    let is_there = |name: &String| match name.split_once('*') {
        Some((begin, end)) => functions_there.iter().any(|it| it.starts_with(begin) && it.ends_with(end)),
        None => functions_there.contains(name),
    };
    let missing: Vec<_> = named.iter().filter(|name| !is_there(name)).collect();
    assert!(missing.is_empty(), "named in docs/reliability.md, and no test: {missing:#?}");
    Ok(())
}
