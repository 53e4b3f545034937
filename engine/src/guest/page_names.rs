//! Pages as an error names them.

use std::fmt;
use std::ops::Range;

use multifd_wire::BlockName;

/// Ranges of pages that an error's text names.
const NAMED: usize = 32;

/// Adds `; RAM block pc.ram: 5, 9..12` for each block, as long as there are not too many.
pub(crate) fn write(f: &mut fmt::Formatter<'_>, blocks: &[(BlockName, Vec<usize>)]) -> fmt::Result {
    let mut room = NAMED;
    for (block, pages) in blocks {
        let ranges = ranges(pages);
        let named: Vec<_> = ranges.iter().take(room).map(named).collect();
        if named.is_empty() {
            return f.write_str("; and more blocks");
        }
        write!(f, "; RAM block {block}: {}", named.join(", "))?;
        if named.len() < ranges.len() {
            f.write_str(", and more")?;
        }
        room -= named.len();
    }
    Ok(())
}

/// Neighbouring pages.
fn ranges(pages: &[usize]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some(last) if last.end == *page => last.end += 1,
            _ => ranges.push(*page..*page + 1),
        }
    }
    ranges
}

fn named(range: &Range<usize>) -> String {
    if range.len() == 1 { range.start.to_string() } else { format!("{}..{}", range.start, range.end) }
}
