//! A file that is read forward in large pieces, and by position where a mapped stream jumps.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use super::invalid;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{ByteSource, ItemReader, SeekError};

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

    /// A reader from `position` on.
    pub(super) fn reader(&self, position: u64) -> FileReader<'_> {
        ItemReader::new(self, position)
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

/// Reads a stream's file forward, and goes on elsewhere where a mapped stream jumps.
pub(super) type FileReader<'f> = ItemReader<&'f StreamFile>;

impl ByteSource for &StreamFile {
    fn read(&mut self, position: u64, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read_at(into, position) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome,
            }
        }
    }

    fn seek(&mut self, position: u64) -> Result<(), SeekError> {
        // Every read names its position.
        if position > self.len { Err(SeekError::EndsAt(self.len)) } else { Ok(()) }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn failed(&self, _phase: Phase, what: &str, position: u64, error: io::Error) -> Error {
        storage(format!("reading {what} at byte {position}"), error)
    }

    fn ended(&self, phase: Phase, what: &str, begin: u64, end: u64) -> Error {
        let detail = if begin == end {
            format!("the file ends at byte {end}, {what} was expected there")
        } else {
            format!("the file ends at byte {end}, within {what} that begins at byte {begin}")
        };
        invalid(phase, detail)
    }
}

fn storage(doing: impl Into<std::borrow::Cow<'static, str>>, error: io::Error) -> Error {
    Error::new(ErrorKind::Storage, Phase::Setup, doing).because(error)
}
