//! The main channel of a migration as a source of bytes.

use std::io;
use std::sync::Arc;

use multifd_transports::Channel;

use super::reader::{ByteSource, ItemReader, SeekError};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::io::MainFile;
use crate::run::session::Session;

/// Reads the main channel of a destination.
pub(crate) type MainReader = ItemReader<MainSource>;

/// The main channel. It may be silent for as long as other channels of the session are not: a round
/// can take any time.
pub(crate) struct MainSource {
    channel: Arc<Channel>,
    /// Main is a file.
    file: Option<MainFile>,
    session: Arc<Session>,
}

impl MainReader {
    /// Reads what arrives on `channel`.
    pub(crate) fn of_main(channel: Arc<Channel>, session: &Arc<Session>) -> Self {
        let file = MainFile::of(&channel);
        let position = file.as_ref().map_or(0, MainFile::position);
        Self::new(MainSource { channel, file, session: Arc::clone(session) }, position)
    }

    pub(crate) fn channel(&self) -> &Arc<Channel> {
        &self.source().channel
    }

    /// The file that main is, if it is one.
    pub(crate) fn file(&self) -> Option<&MainFile> {
        self.source().file.as_ref()
    }
}

impl ByteSource for MainSource {
    fn read(&mut self, _position: u64, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let before = self.session.wire_bytes();
            match self.channel.recv(into) {
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut && self.session.wire_bytes() > before => {}
                outcome => return outcome,
            }
        }
    }

    fn seek(&mut self, position: u64) -> Result<(), SeekError> {
        let none = || SeekError::Io(io::ErrorKind::Unsupported.into());
        let file = self.file.as_ref().ok_or_else(none)?;
        let len = file.len().map_err(SeekError::Io)?;
        if position > len {
            return Err(SeekError::EndsAt(len));
        }
        file.seek(position);
        Ok(())
    }

    fn name(&self) -> String {
        format!("main ({})", self.channel.peer())
    }

    fn failed(&self, phase: Phase, what: &str, position: u64, error: io::Error) -> Error {
        Error::io(phase, format_args!("waiting for {what} at byte {position}"), error)
    }

    fn ended(&self, phase: Phase, what: &str, _begin: u64, end: u64) -> Error {
        let detail = format!("the stream ended after {end} bytes, {what} was expected");
        Error::new(ErrorKind::Transport, phase, detail)
    }
}
