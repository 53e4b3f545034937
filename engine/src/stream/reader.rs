//! Reading the section stream from the main channel: bytes are buffered until a whole thing can be parsed.

use std::io;
use std::sync::Arc;

use multifd_transports::{Channel, FileStream};
use multifd_wire::Parsed;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::session::Session;

/// Bytes asked of the kernel at a time: 256 KiB. Larger falls out of the L2 cache before it is copied to its page.
const BUFFER_LEN: usize = 256 << 10;

/// Longest thing that is parsed whole; a RAM_DISCARD command, the longest of the wire, is below 64 KiB + 5.
const LONGEST_ITEM: usize = 128 << 10;

/// A cursor over the bytes that arrive on the main channel.
pub(crate) struct StreamReader {
    channel: Arc<Channel>,
    session: Arc<Session>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes of the stream before `start`, for error texts; of a file: where in it `start` is.
    position: u64,
}

impl StreamReader {
    /// Main may be silent for as long as other channels of `session` are not: a round can take any time.
    pub(crate) fn new(channel: Arc<Channel>, session: &Arc<Session>) -> Self {
        let (session, buffer) = (Arc::clone(session), vec![0; BUFFER_LEN].into());
        let position = channel.file().map_or(0, FileStream::position);
        Self { channel, session, buffer, start: 0, end: 0, position }
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
                    return Err(Error::new(ErrorKind::InvalidStream, phase, detail).on(self.name()));
                }
                Ok(None) => self.more(phase, what)?,
                Err(invalid) => {
                    let detail = format!("{what} at byte {} is invalid", self.position);
                    return Err(Error::new(ErrorKind::InvalidStream, phase, detail)
                        .on(self.name())
                        .because(invalid));
                }
            }
        }
    }

    /// The next `count` bytes, which stay in the buffer until [`StreamReader::consume`]. At most a page or two.
    pub(crate) fn bytes(&mut self, phase: Phase, what: &'static str, count: usize) -> Result<&[u8]> {
        while self.end - self.start < count {
            self.more(phase, what)?;
        }
        let end = self.start + count;
        self.buffer
            .get(self.start..end)
            .ok_or_else(|| Error::bug(phase, format_args!("bytes {}..{end} of the buffer", self.start)))
    }

    /// Reads on; an end of the stream is an error: `what` was still due.
    pub(crate) fn more(&mut self, phase: Phase, what: &'static str) -> Result<()> {
        if self.fill(phase, what)? {
            return Ok(());
        }
        let have = self.position + self.buffered().len() as u64;
        let detail = format!("the stream ended after {have} bytes, {what} was expected");
        Err(Error::new(ErrorKind::Transport, phase, detail).on(self.name()))
    }

    /// Reads on; false at the end of the stream.
    pub(crate) fn fill(&mut self, phase: Phase, what: &'static str) -> Result<bool> {
        if self.end == self.buffer.len() || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        // Without room, an end of the stream would be seen where there is none.
        let free = self.buffer.get_mut(self.end..).filter(|free| !free.is_empty());
        let free = free.ok_or_else(|| Error::bug(phase, format_args!("no room for {what}")))?;
        let received = loop {
            let before = self.session.wire_bytes();
            match self.channel.recv(free) {
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut && self.session.wire_bytes() > before => {}
                outcome => break outcome,
            }
        };
        match received {
            Ok(received) => {
                self.end += received;
                Ok(received > 0)
            }
            Err(error) => {
                Err(Error::io(phase, format_args!("waiting for {what} at byte {}", self.position), error)
                    .on(self.name()))
            }
        }
    }

    /// Bytes of the stream that were taken; of a file: where in it the next one is.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Goes on at `position` of the file, at or behind the next byte: `what` is before it.
    pub(crate) fn jump(&mut self, position: u64, what: &'static str) -> Result<()> {
        let seek = |file: &FileStream| {
            let len = file.file_len()?;
            if position > len {
                let text = format!("the file ends at byte {len}, {what} should reach to byte {position}");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            file.seek(position);
            Ok(())
        };
        let file = self.channel.file().ok_or_else(|| io::ErrorKind::Unsupported.into());
        file.and_then(seek).map_err(|error| {
            Error::new(ErrorKind::InvalidStream, Phase::Setup, "a file that is too short")
                .on(self.name())
                .because(error)
        })?;
        (self.start, self.end, self.position) = (0, 0, position);
        Ok(())
    }

    /// `main (tcp:10.0.0.7:51234)`
    pub(crate) fn name(&self) -> String {
        format!("main ({})", self.channel.peer())
    }

    pub(crate) fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }
}
