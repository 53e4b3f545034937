//! Instructions of the hot paths, counted by valgrind: the same on a busy machine as on an idle
//! one.
//!
//! `multifd-instructions` counts and compares with `counts`, which was written by
//! `multifd-instructions --write`. One that has grown by more than 5 % is an error: mend it, or
//! write the new counts and say why in CHANGELOG.md. Another compiler makes other instructions: its
//! counts are shown and not judged.

mod cases;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use cases::{CASES, Case};
use clap::Parser;

type Problem = Box<dyn std::error::Error>;

/// Most that the instructions of a case may grow, in percent.
const ALLOWED: f64 = 5.0;

/// A case is counted for one time and for so many, and the difference is divided: what is done once
/// does not count.
const MOST_TIMES: usize = 5;

/// Instructions of the hot paths
#[derive(Parser)]
struct Flags {
    /// Write what is counted as what the next runs are compared with
    #[arg(long)]
    write: bool,
    /// Run one case, under valgrind
    #[arg(long, hide = true, requires = "times")]
    case: Option<String>,
    #[arg(long, hide = true)]
    times: Option<usize>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let done = match (&flags.case, flags.times) {
        (Some(name), Some(times)) => run(name, times).map(|()| true),
        _ => count_all(flags.write),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("multifd-instructions: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str, times: usize) -> Result<(), Problem> {
    let case = CASES.iter().find(|case| case.name == name).ok_or("no such case")?;
    (case.run)(times)
}

/// False if a case has grown by too much.
fn count_all(write: bool) -> Result<bool, Problem> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: no valgrind");
        return Ok(true);
    }
    let compiler = compiler()?;
    let before = Counts::read()?;
    let judged = before.compiler == compiler;
    let (mut text, mut good) = (format!("{compiler}\n"), true);
    println!("{:<28} {:>12} {:>9}", "instructions of", "now", "before");
    for case in CASES {
        let now = count(case)?;
        writeln!(text, "{now} {}", case.name)?;
        let Some(before) = before.of(case) else {
            println!("{:<28} {now:>12} {:>9}", case.name, "-");
            continue;
        };
        let grown = (now as f64 / before as f64 - 1.0) * 100.0;
        let bad = judged && grown > ALLOWED;
        println!("{:<28} {now:>12} {grown:>+8.1}%{}", case.name, if bad { " too many" } else { "" });
        good &= !bad;
    }
    if !judged {
        println!("not judged: the counts of before are of {}, this is {compiler}", before.compiler);
    }
    if write {
        std::fs::write(Counts::path(), text)?;
        return Ok(true);
    }
    if !good {
        println!("mend it, or write the new counts (--write) and say why in CHANGELOG.md");
    }
    Ok(good)
}

/// Instructions of a case, done once.
fn count(case: &Case) -> Result<u64, Problem> {
    let once = collected(case, 1)?;
    let more = collected(case, MOST_TIMES)?;
    Ok(more.checked_sub(once).ok_or("fewer instructions for more work")? / (MOST_TIMES as u64 - 1))
}

/// Instructions of a process that does a case so many times.
fn collected(case: &Case, times: usize) -> Result<u64, Problem> {
    let this = std::env::current_exe()?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(this);
    let output = command.args(["--case", case.name, "--times", &times.to_string()]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {said}", case.name).into());
    }
    let collected = said.lines().find_map(|line| line.split_once("Collected : "));
    let (_, count) = collected.ok_or_else(|| format!("valgrind does not say what it counted: {said}"))?;
    Ok(count.trim().parse()?)
}

/// What the counts depend on.
fn compiler() -> Result<String, Problem> {
    let output = Command::new("rustc").arg("--version").output()?;
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    Ok(format!("{}, {profile}", String::from_utf8(output.stdout)?.trim()))
}

/// What was counted before.
struct Counts {
    compiler: String,
    cases: Vec<(String, u64)>,
}

impl Counts {
    fn path() -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/counts"))
    }

    fn read() -> Result<Self, Problem> {
        let text = std::fs::read_to_string(Self::path())?;
        let (compiler, cases) = text.split_once('\n').ok_or("counts without cases")?;
        let case = |line: &str| -> Result<_, Problem> {
            let (count, name) = line.split_once(' ').ok_or_else(|| format!("no count: {line}"))?;
            Ok((name.to_owned(), count.parse()?))
        };
        let cases = cases.lines().map(case).collect::<Result<_, _>>()?;
        Ok(Self { compiler: compiler.to_owned(), cases })
    }

    fn of(&self, case: &Case) -> Option<u64> {
        self.cases.iter().find(|(name, _)| name == case.name).map(|(_, count)| *count)
    }
}
