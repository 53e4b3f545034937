//! The tables of docs/interop.md.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use multifd_tests::{During, Failure, Outcome, Release};
use time::OffsetDateTime;

use crate::cell::{Cell, Fate};
use crate::way::ways;

/// What is between these lines is written anew.
const BEGIN: &str = "<!-- tables: written by ./test interop-all -->\n";
const END: &str = "<!-- end of tables -->\n";

/// Fates of cells.
#[derive(Default)]
pub(crate) struct Table {
    fates: Vec<(Cell, Option<Fate>)>,
    wrong: Vec<String>,
}

impl Table {
    pub(crate) fn note(&mut self, cell: &Cell, fate: Outcome<Fate>) {
        match &fate {
            Ok(Fate::Moved) => println!("{cell}: moved"),
            Ok(Fate::Refused(release, words)) => println!("{cell}: QEMU {release}: {words}"),
            Ok(Fate::NotOurs(words)) => println!("{cell}: refused by multifd: {words}"),
            Err(failure) => println!("{cell}: FAILED: {failure}"),
        }
        match fate {
            Ok(fate) => self.fates.push((cell.clone(), Some(fate))),
            Err(failure) => {
                self.fates.push((cell.clone(), None));
                self.wrong.push(failure.to_string());
            }
        }
    }

    /// Fails when a cell did.
    pub(crate) fn check(self) -> Outcome {
        if self.wrong.is_empty() { Ok(()) } else { Err(Failure::new(self.wrong.join("\n"))) }
    }

    /// Writes the tables into docs/interop.md.
    pub(crate) fn write(&self, releases: &[Release]) -> Outcome {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/interop.md"));
        let page = fs::read_to_string(&path).during(path.display())?;
        let around =
            page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
        let Some((before, behind)) = around else {
            return Err(Failure::new(format!("{} has no tables to replace", path.display())));
        };
        let tables = self.text(releases)?;
        fs::write(&path, format!("{before}{BEGIN}{tables}{END}{behind}")).during(path.display())
    }

    fn text(&self, releases: &[Release]) -> Outcome<String> {
        let Some((newest, older)) = releases.split_last() else { return Ok(String::new()) };
        let mut notes = Vec::new();
        let mut text = String::new();
        let now = OffsetDateTime::now_utc();
        let moved = self.fates.iter().filter(|(_, fate)| *fate == Some(Fate::Moved)).count();
        writeln!(
            text,
            "\nRun of {}: {} cells, {moved} of them moved the guest.\n",
            now.date(),
            self.fates.len()
        )?;
        let same: Vec<_> = releases.iter().map(|one| (one, one)).collect();
        writeln!(text, "In from a release, and out to the same one, with its own machine type:\n")?;
        self.table(&same, &mut notes, &mut text)?;
        let across: Vec<_> = older.iter().flat_map(|one| [(one, newest), (newest, one)]).collect();
        writeln!(
            text,
            "\nIn from one release, and out to another one, with the machine type of the older:\n"
        )?;
        self.table(&across, &mut notes, &mut text)?;
        writeln!(text)?;
        for (number, note) in (1..).zip(&notes) {
            writeln!(text, "{number}. {note}")?;
        }
        writeln!(text)?;
        Ok(text)
    }

    fn table(&self, columns: &[(&Release, &Release)], notes: &mut Vec<String>, text: &mut String) -> Outcome {
        write!(text, "| way |")?;
        for (from, to) in columns {
            if from == to { write!(text, " {from} |")? } else { write!(text, " {from} to {to} |")? }
        }
        writeln!(text, "\n| --- |{}", " --- |".repeat(columns.len()))?;
        let across = columns.iter().any(|(from, to)| from != to);
        for way in ways().iter().filter(|way| way.across || !across) {
            write!(text, "| {} |", way.name)?;
            for (from, to) in columns {
                let found = self
                    .fates
                    .iter()
                    .find(|(cell, _)| cell.way.name == way.name && cell.from == **from && cell.to == **to);
                write!(text, " {} |", mark(found.and_then(|(_, fate)| fate.as_ref()), notes))?;
            }
            writeln!(text)?;
        }
        Ok(())
    }
}

fn mark(fate: Option<&Fate>, notes: &mut Vec<String>) -> String {
    let note = match fate {
        None => return "**failed**".to_owned(),
        Some(Fate::Moved) => return "yes".to_owned(),
        Some(Fate::Refused(_, words)) => format!("QEMU: `{words}`"),
        Some(Fate::NotOurs(words)) => format!("multifd: `{words}`"),
    };
    let known = notes.iter().position(|known| *known == note);
    let place = known.unwrap_or_else(|| {
        notes.push(note);
        notes.len() - 1
    });
    format!("no ({})", place + 1)
}
