//! Reading the section stream: bytes are buffered until a whole thing can be parsed.

use std::io;

use multifd_wire::Parsed;

use crate::error::{Error, ErrorKind, Phase, Result};

/// Bytes asked of the kernel at a time: 256 KiB. Larger falls out of the L2 cache before it is
/// copied to its page.
const BUFFER_LEN: usize = 256 << 10;

/// Longest thing that is parsed whole; a RAM_DISCARD command, the longest of the wire, is below 64
/// KiB + 5.
const LONGEST_ITEM: usize = 128 << 10;

/// Source of a stream's bytes: the main channel of a migration, or a file.
pub(crate) trait ByteSource {
    /// Receives what comes at `position`, waiting for at least one byte; 0 at the end. `into` is
    /// never empty.
    fn read(&mut self, position: u64, into: &mut [u8]) -> io::Result<usize>;

    /// Goes on at `position`: the next [`ByteSource::read`] is of its bytes.
    ///
    /// # Errors
    /// The source has no positions, or ends before.
    fn seek(&mut self, position: u64) -> Result<(), SeekError>;

    /// The name in errors: `main (tcp:10.0.0.7:51234)`.
    fn name(&self) -> String;

    /// The error of a failed [`ByteSource::read`] at `position`: `what` was due.
    fn failed(&self, phase: Phase, what: &str, position: u64, error: io::Error) -> Error;

    /// The error of a source that ends within `what`, whose bytes `begin..end` are there.
    fn ended(&self, phase: Phase, what: &str, begin: u64, end: u64) -> Error;
}

/// Why a source cannot go on at another position.
#[derive(Debug)]
pub(crate) enum SeekError {
    /// It ends at this byte, before that position.
    EndsAt(u64),
    /// It has no positions, or they cannot be told.
    Io(io::Error),
}

/// A cursor over the bytes of a stream.
pub(crate) struct ItemReader<S> {
    source: S,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes of the stream before `start`; of a file: where in it `start` is.
    position: u64,
}

impl<S: ByteSource> ItemReader<S> {
    /// Reads from `position` on: where `source` is.
    pub(crate) fn new(source: S, position: u64) -> Self {
        Self { source, buffer: vec![0; BUFFER_LEN].into(), start: 0, end: 0, position }
    }

    pub(crate) fn source(&self) -> &S {
        &self.source
    }

    /// See [`ByteSource::name`].
    pub(crate) fn name(&self) -> String {
        self.source.name()
    }

    /// Bytes of the stream that were taken; of a file: where in it the next one is.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// What has arrived and was not taken yet.
    pub(crate) fn buffered(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Takes the next `count` bytes off; `count` may not be more than what is buffered.
    pub(crate) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start);
        self.start += count;
        self.position += count as u64;
    }

    /// Parses the next thing, waiting for as many bytes as it takes. `what` names it in errors.
    pub(crate) fn next<T>(
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
                Ok(None) if self.buffered().len() >= LONGEST_ITEM => {
                    let detail =
                        format!("{what} at byte {} is longer than {LONGEST_ITEM} bytes", self.position);
                    return Err(self.invalid(phase, detail));
                }
                Ok(None) => self.more(phase, what)?,
                Err(invalid) => {
                    let detail = format!("{what} at byte {} is invalid", self.position);
                    return Err(self.invalid(phase, detail).because(invalid));
                }
            }
        }
    }

    /// Takes the next `count` bytes; at most a buffer full. The end of the stream is an error:
    /// `what` was still due.
    pub(crate) fn take(&mut self, phase: Phase, what: &'static str, count: usize) -> Result<&[u8]> {
        while self.end - self.start < count {
            self.more(phase, what)?;
        }
        let start = self.start;
        self.consume(count);
        self.buffer
            .get(start..start + count)
            .ok_or_else(|| Error::bug(phase, format_args!("bytes {start}..+{count} of the buffer")))
    }

    /// All that is buffered: at least `count` bytes, at most a buffer full, unless the stream ends
    /// before. Nothing is taken.
    #[cfg(feature = "at-rest")]
    pub(crate) fn peek(&mut self, phase: Phase, what: &'static str, count: usize) -> Result<&[u8]> {
        while self.end - self.start < count && self.fill(phase, what)? {}
        Ok(self.buffered())
    }

    /// Reads on; an end of the stream is an error: `what` was still due.
    pub(crate) fn more(&mut self, phase: Phase, what: &'static str) -> Result<()> {
        if self.fill(phase, what)? { Ok(()) } else { Err(self.ended(phase, what)) }
    }

    /// Reads on; false at the end of the stream.
    pub(crate) fn fill(&mut self, phase: Phase, what: &'static str) -> Result<bool> {
        if self.end == self.buffer.len() || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let position = self.position + (self.end - self.start) as u64;
        // Without room, an end of the stream would be seen where there is none.
        let free = self.buffer.get_mut(self.end..).filter(|free| !free.is_empty());
        let free = free.ok_or_else(|| Error::bug(phase, format_args!("no room for {what}")))?;
        match self.source.read(position, free) {
            Ok(received) => {
                self.end += received;
                Ok(received > 0)
            }
            Err(error) => Err(self.source.failed(phase, what, self.position, error).on(self.name())),
        }
    }

    /// Goes on at `position` of the file: `what` is before it.
    ///
    /// # Errors
    /// The file ends before, or is none.
    pub(crate) fn seek(&mut self, position: u64, what: impl FnOnce() -> String) -> Result<()> {
        let ahead = position.checked_sub(self.position).and_then(|ahead| usize::try_from(ahead).ok());
        if let Some(ahead) = ahead.filter(|ahead| *ahead <= self.end - self.start) {
            self.consume(ahead);
            return Ok(());
        }
        self.source.seek(position).map_err(|error| match error {
            SeekError::EndsAt(end) => {
                let detail =
                    format!("the file ends at byte {end}, {} should reach to byte {position}", what());
                self.invalid(Phase::Setup, detail)
            }
            SeekError::Io(error) => {
                let doing = format!("going on at byte {position}, behind {}", what());
                Error::storage(Phase::Setup, doing, error).on(self.name())
            }
        })?;
        (self.start, self.end, self.position) = (0, 0, position);
        Ok(())
    }

    /// The error for a stream that ends before all of `what` is there.
    pub(crate) fn ended(&self, phase: Phase, what: &str) -> Error {
        let end = self.position + self.buffered().len() as u64;
        self.source.ended(phase, what, self.position, end).on(self.name())
    }

    fn invalid(&self, phase: Phase, detail: String) -> Error {
        Error::new(ErrorKind::InvalidStream, phase, detail).on(self.name())
    }
}
