//! Are the memories of two guests equal?

use std::{fmt, fs::File, os::unix::fs::FileExt as _, path::Path};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use crate::{During, Failure, Outcome};

/// Granularity of the comparison, in bytes: the page of an x86 guest.
pub const PAGE: u64 = 4096;

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// How two RAM files differ.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Difference {
    /// Number of pages that differ.
    pub pages: u64,
    /// Offset of the first byte that differs.
    pub first_offset: u64,
    /// That byte in the left file and in the right file.
    pub first_bytes: (u8, u8),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, first_offset, first_bytes: (left, right) } = self;
        write!(f, "{pages} pages differ, first page {}: ", first_offset / PAGE)?;
        write!(f, "at {first_offset:#x} left has {left:#04x}, right has {right:#04x}")
    }
}

/// Compares two RAM files of equal length. Holes are zeros and cost nothing where both files have
/// them.
///
/// # Errors
/// When a file cannot be read or the lengths differ.
pub fn compare(left: &Path, right: &Path) -> Outcome<Option<Difference>> {
    let left_file = File::open(left).during(left.display())?;
    let right_file = File::open(right).during(right.display())?;
    let (len, right_len) = (left_file.metadata()?.len(), right_file.metadata()?.len());
    if len != right_len {
        return Err(Failure::new(format!(
            "{} has {len} bytes, {} has {right_len}",
            left.display(),
            right.display()
        )));
    }
    let mut found = None;
    let mut chunks = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut offset = 0;
    while let Some(start) = next_data(&left_file, &right_file, offset, len)? {
        let chunk_len = usize::try_from(len - start).unwrap_or(CHUNK).min(CHUNK);
        chunks.0.resize(chunk_len, 0);
        chunks.1.resize(chunk_len, 0);
        left_file.read_exact_at(&mut chunks.0, start)?;
        right_file.read_exact_at(&mut chunks.1, start)?;
        if chunks.0 != chunks.1 {
            note_differences(start, &chunks.0, &chunks.1, &mut found);
        }
        offset = start + chunk_len as u64;
    }
    Ok(found)
}

/// Fails unless two RAM files are equal; the failure names the first byte that differs and the
/// number of pages.
///
/// # Errors
/// When they differ, or [`compare`] fails.
pub fn check_equal(left: &Path, right: &Path) -> Outcome {
    compare(left, right)?.map_or(Ok(()), |difference| {
        Err(Failure::new(format!("{} and {}: {difference}", left.display(), right.display())))
    })
}

/// Copies what `original` holds to a new file, with holes where it has some.
///
/// # Errors
/// When one cannot be read or the other cannot be written.
pub fn copy_sparse(original: &File, path: &Path) -> Outcome {
    let copy = File::create_new(path).during(path.display())?;
    let len = original.metadata()?.len();
    copy.set_len(len)?;
    let mut page = vec![0; usize::try_from(PAGE)?];
    let mut offset = 0;
    while let Some(start) = next_data(original, original, offset, len)? {
        page.truncate(usize::try_from(len - start)?);
        original.read_exact_at(&mut page, start)?;
        copy.write_all_at(&page, start)?;
        offset = start + PAGE;
    }
    Ok(())
}

/// Start of the page at or after `offset` where at least one of the files has data.
fn next_data(left: &File, right: &File, offset: u64, len: u64) -> Outcome<Option<u64>> {
    let mut next = None;
    for file in [left, right] {
        match seek(file, SeekFrom::Data(offset)) {
            Ok(found) => next = Some(next.unwrap_or(found).min(found)),
            Err(Errno::NXIO) => {}
            // A file system that does not know about holes.
            Err(Errno::INVAL) => next = Some(offset),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(next.map(|found| (found / PAGE * PAGE).max(offset)).filter(|found| *found < len))
}

fn note_differences(start: u64, left: &[u8], right: &[u8], found: &mut Option<Difference>) {
    let page_len = usize::try_from(PAGE).unwrap_or(usize::MAX);
    let pairs = left.chunks(page_len).zip(right.chunks(page_len));
    for (page, (left, right)) in (0_u64..).zip(pairs) {
        let bytes = || (0_u64..).zip(left.iter().copied().zip(right.iter().copied()));
        let Some((offset, first_bytes)) = bytes().find(|(_, (left, right))| left != right) else { continue };
        let first_offset = start + page * PAGE + offset;
        found.get_or_insert(Difference { pages: 0, first_offset, first_bytes }).pages += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    const LEN: u64 = 8 << 20;

    /// A file of `LEN` bytes with data in a few places only.
    fn sparse(scratch: &Scratch, name: &str, data: &[(u64, u8)]) -> std::path::PathBuf {
        let path = scratch.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(LEN).unwrap();
        for (offset, byte) in data {
            file.write_all_at(&[*byte], *offset).unwrap();
        }
        path
    }

    #[test]
    fn a_hole_equals_written_zeros() {
        let scratch = Scratch::new().unwrap();
        let left = sparse(&scratch, "left", &[(5 << 20, 0), (LEN - 1, 9)]);
        let right = sparse(&scratch, "right", &[(LEN - 1, 9)]);
        assert_eq!(compare(&left, &right).unwrap(), None);
        check_equal(&left, &right).unwrap();
    }

    #[test]
    fn a_sparse_copy_is_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt as _;
        let scratch = Scratch::new().unwrap();
        let left = sparse(&scratch, "left", &[(3 * PAGE + 17, 1), (LEN - 1, 9)]);
        let right = scratch.path("right");
        copy_sparse(&File::open(&left).unwrap(), &right).unwrap();
        check_equal(&left, &right).unwrap();
        let blocks = |path: &Path| std::fs::metadata(path).unwrap().blocks();
        assert!(blocks(&right) <= blocks(&left));
    }

    #[test]
    fn counts_pages_and_names_the_first_byte() {
        let scratch = Scratch::new().unwrap();
        let left = sparse(&scratch, "left", &[(3 * PAGE + 17, 1), (3 * PAGE + 18, 1), (6 << 20, 2)]);
        let right = sparse(&scratch, "right", &[(LEN - 1, 3)]);
        let difference = compare(&left, &right).unwrap().unwrap();
        assert_eq!(difference, Difference { pages: 3, first_offset: 3 * PAGE + 17, first_bytes: (1, 0) });
        let text = check_equal(&left, &right).unwrap_err().to_string();
        assert!(text.contains("3 pages differ, first page 3"), "{text}");
    }

    #[test]
    fn different_lengths_are_no_comparison() {
        let scratch = Scratch::new().unwrap();
        let left = sparse(&scratch, "left", &[]);
        let right = sparse(&scratch, "right", &[]);
        File::options().write(true).open(&right).unwrap().set_len(LEN - PAGE).unwrap();
        assert!(compare(&left, &right).is_err());
    }
}
