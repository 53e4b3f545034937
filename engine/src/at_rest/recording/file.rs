//! A file that is read forward in large pieces, and by position where a mapped stream jumps.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use multifd_wire::Parsed;

use super::invalid;
use crate::error::{Error, ErrorKind, Phase, Result};

/// Bytes asked of the kernel at a time: 256 KiB. Larger falls out of the L2 cache before it is looked at.
const BUFFER_LEN: usize = 256 << 10;

/// A stream's file.
#[derive(Debug)]
pub(super) struct StreamFile {
    file: File,
    name: String,
    len: u64,
}

impl StreamFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |error| storage("opening the file", error).on(&name);
        // Asked before it is opened: opening a named pipe waits for a writer.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_dir() {
            let detail = "no regular file, a stream has to be read in more than one place";
            return Err(Error::new(ErrorKind::Storage, Phase::Setup, detail).on(name));
        }
        let mut file = File::open(path).map_err(failed)?;
        // Not the metadata's length: a block device has none there.
        let len = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, name, len })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `into` from `position` on, as far as the file goes; the count of bytes.
    pub(super) fn read_at(&self, mut into: &mut [u8], position: u64) -> Result<usize> {
        let wanted = into.len();
        let mut at = position;
        while !into.is_empty() {
            match self.file.read_at(into, at) {
                Ok(0) => break,
                Ok(count) => {
                    at += count as u64;
                    into = into.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(storage(format!("reading at byte {at}"), error).on(&self.name)),
            }
        }
        Ok(wanted - into.len())
    }
}

/// A cursor over a file.
pub(super) struct FileReader<'f> {
    file: &'f StreamFile,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Where in the file `start` is.
    position: u64,
}

impl<'f> FileReader<'f> {
    pub(super) fn new(file: &'f StreamFile, position: u64) -> Self {
        Self { file, buffer: vec![0; BUFFER_LEN].into(), start: 0, end: 0, position }
    }

    pub(super) fn file(&self) -> &'f StreamFile {
        self.file
    }

    /// Where in the file the next byte is.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Parses the next thing. `what` names it in errors.
    pub(super) fn next<T>(
        &mut self,
        phase: Phase,
        what: &'static str,
        parse: impl Fn(&[u8]) -> Parsed<T>,
    ) -> Result<T> {
        loop {
            match parse(self.buffered()) {
                Ok(Some((value, used))) => {
                    self.consume(used);
                    return Ok(value);
                }
                Ok(None) => {
                    let have = self.buffered().len();
                    if self.peek(have + 1)?.len() == have {
                        return Err(self.ends(phase, what));
                    }
                }
                Err(error) => {
                    let detail = format!("{what} at byte {} is invalid", self.position);
                    return Err(invalid(phase, detail).because(error));
                }
            }
        }
    }

    /// Takes the next `count` bytes, which may be no more than the buffer has.
    pub(super) fn take(&mut self, phase: Phase, what: &'static str, count: usize) -> Result<&[u8]> {
        if self.peek(count)?.len() < count {
            return Err(self.ends(phase, what));
        }
        let start = self.start;
        self.consume(count);
        let taken = self.buffer.get(start..start + count);
        taken.ok_or_else(|| {
            Error::bug(phase, format_args!("{count} bytes for {what} past the end of the buffer"))
        })
    }

    /// All that is buffered, which is at least `count` bytes unless the file ends before. Nothing is taken.
    pub(super) fn peek(&mut self, count: usize) -> Result<&[u8]> {
        if self.end - self.start < count {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let free = self.buffer.get_mut(self.end..).unwrap_or_default();
            self.end += self.file.read_at(free, self.position + self.end as u64)?;
        }
        Ok(self.buffered())
    }

    /// Passes over bytes that were peeked at.
    pub(super) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start);
        self.start += count;
        self.position += count as u64;
    }

    /// Goes on at `position`, which must lie in the file: `what` is before it.
    pub(super) fn seek(&mut self, position: u64, what: impl FnOnce() -> String) -> Result<()> {
        if position > self.file.len {
            let detail = format!(
                "the file ends at byte {}, {} should reach to byte {position}",
                self.file.len,
                what()
            );
            return Err(invalid(Phase::Setup, detail));
        }
        let ahead = position.checked_sub(self.position).and_then(|ahead| usize::try_from(ahead).ok());
        match ahead {
            Some(ahead) if ahead <= self.end - self.start => self.consume(ahead),
            _ => (self.start, self.end, self.position) = (0, 0, position),
        }
        Ok(())
    }

    fn buffered(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// The error for a file that ends too early.
    pub(super) fn ends(&self, phase: Phase, what: &str) -> Error {
        let end = self.position + self.buffered().len() as u64;
        let detail = match self.buffered().len() {
            0 => format!("the file ends at byte {end}, {what} was expected there"),
            _ => format!("the file ends at byte {end}, within {what} that begins at byte {}", self.position),
        };
        invalid(phase, detail)
    }
}

fn storage(doing: impl Into<std::borrow::Cow<'static, str>>, error: io::Error) -> Error {
    Error::new(ErrorKind::Storage, Phase::Setup, doing).because(error)
}
