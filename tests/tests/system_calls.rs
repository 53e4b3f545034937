//! The system calls of each thread are written twice: as a table in docs/embedding.md, and as
//! filters in examples/seccomp, which `./test` runs. Both must be one list, and have every thread
//! that the engine makes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use multifd_tests::{Failure, Outcome};

type Calls = BTreeSet<String>;

fn root() -> Outcome<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or_else(|| Failure::new("no folder above that of the tests"))
}

/// What is between the two, of which the first comes once.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> Outcome<&'a str> {
    let cut = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end));
    cut.map(|(inner, _)| inner).ok_or_else(|| Failure::new(format!("no {begin:?} with {end:?} behind it")))
}

/// The names of threads in a text: `mig-send` of `"mig-send-{id}"` and of `mig-send-N`.
fn names(text: &str, quote: char) -> BTreeSet<String> {
    let begin = format!("{quote}mig-");
    let found = text.split(&begin).skip(1).filter_map(|rest| rest.split(quote).next());
    found.map(|name| format!("mig-{}", name.trim_end_matches("-{id}").trim_end_matches("-N"))).collect()
}

fn filtered_calls(list: &str) -> Calls {
    list.split("libc::SYS_")
        .skip(1)
        .filter_map(|rest| rest.split(',').next())
        .map(|call| call.trim().to_owned())
        .collect()
}

struct Filters {
    always: Calls,
    unfiltered: BTreeSet<String>,
    threads: BTreeMap<String, Calls>,
}

impl Filters {
    fn read() -> Outcome<Self> {
        let text = fs::read_to_string(root()?.join("examples/seccomp/filters.rs"))?;
        let threads = between(&text, "const THREADS: &[(&str, &[i64])] = &[", "\n];")?;
        let entry = |entry: &str| {
            let name = entry.split('"').next().unwrap_or_default();
            let calls = entry.split_once("&[").and_then(|(_, rest)| rest.split_once(']'));
            (format!("mig-{name}"), filtered_calls(calls.map_or("", |(calls, _)| calls)))
        };
        Ok(Self {
            always: filtered_calls(between(&text, "const ALWAYS: &[i64] = &[", "];")?),
            unfiltered: names(between(&text, "const UNFILTERED: &[&str] =", ";")?, '"'),
            threads: threads.split("\"mig-").skip(1).map(entry).collect(),
        })
    }

    /// The filter of a thread, as the example finds it.
    fn of(&self, thread: &str) -> Option<&str> {
        self.threads.keys().rev().find(|name| thread.starts_with(*name)).map(String::as_str)
    }

    fn is_unfiltered(&self, thread: &str) -> bool {
        self.unfiltered.iter().any(|name| thread.starts_with(name))
    }
}

/// Names and calls of each row of the table; no name stands for every thread.
fn table() -> Outcome<Vec<(BTreeSet<String>, Calls)>> {
    let text = fs::read_to_string(root()?.join("docs/embedding.md"))?;
    let section = between(&text, "## Threads, memory, time", "\n## ")?;
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, thread, _, _, calls, _] = cells[..] else { return None };
        let calls = calls.split(", ").filter_map(|call| call.split(' ').next()).map(str::to_owned).collect();
        let thread = thread.replace(", `-", ", `mig-stream-");
        Some((names(&thread, '`'), calls))
    };
    let rows: Vec<_> = section
        .lines()
        .filter(|line| line.starts_with("| `mig-") || line.starts_with("| each of them"))
        .collect();
    rows.iter().map(|line| row(line).ok_or_else(|| Failure::new(format!("no row of four: {line}")))).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Outcome {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Every name that the engine and the transports give to a thread.
fn spawned() -> Outcome<BTreeSet<String>> {
    let mut files = Vec::new();
    for folder in ["engine/src", "transports/src"] {
        sources(&root()?.join(folder), &mut files)?;
    }
    let mut all = BTreeSet::new();
    for file in files {
        all.extend(names(&fs::read_to_string(file)?, '"'));
    }
    all.remove("mig-test");
    Ok(all)
}

#[test]
fn the_table_and_the_filters_of_the_example_have_the_same_system_calls() -> Outcome {
    let filters = Filters::read()?;
    let mut tabled: BTreeMap<String, Calls> = BTreeMap::new();
    let mut always = Calls::new();
    for (threads, calls) in table()? {
        if threads.is_empty() {
            always = calls;
            continue;
        }
        for thread in threads.iter().filter(|thread| !filters.is_unfiltered(thread)) {
            let filter = filters.of(thread).ok_or_else(|| Failure::new(format!("no filter for {thread}")))?;
            tabled.entry(filter.to_owned()).or_default().extend(calls.clone());
        }
    }
    assert_eq!(always, filters.always, "each of them");
    assert!(tabled.len() > 5 && always.len() > 5, "{tabled:?}");
    for (thread, calls) in &filters.threads {
        assert_eq!(tabled.get(thread), Some(calls), "{thread}: the table, and the filter");
    }
    Ok(())
}

#[test]
fn every_thread_has_a_row_in_the_table_and_a_filter_in_the_example() -> Outcome {
    let (filters, spawned) = (Filters::read()?, spawned()?);
    let tabled: BTreeSet<String> = table()?.into_iter().flat_map(|(threads, _)| threads).collect();
    assert_eq!(tabled, spawned, "the table, and what is spawned");
    for thread in &spawned {
        assert!(filters.is_unfiltered(thread) || filters.of(thread).is_some(), "no filter for {thread}");
    }
    for filter in filters.threads.keys() {
        assert!(spawned.iter().any(|thread| thread.starts_with(filter)), "a filter for no thread: {filter}");
    }
    Ok(())
}
