//! The file that a main stream goes to or comes from.

use std::fs::File;
use std::io;
use std::sync::Arc;

use multifd_transports::{Channel, FileStream};

/// A main stream that is a file: it has positions, and pages may lie beside the stream. What is
/// moved anywhere in it counts as main's bytes.
#[derive(Clone)]
pub(crate) struct MainFile {
    channel: Arc<Channel>,
    file: Arc<FileStream>,
}

impl MainFile {
    /// The file behind `main`; `None` if that is a connection. Each end asks once, when main is
    /// there: who has a `MainFile` need not ask.
    pub(crate) fn of(main: &Arc<Channel>) -> Option<Self> {
        Some(Self { channel: Arc::clone(main), file: main.file_handle()? })
    }

    /// The name in errors.
    pub(crate) fn name(&self) -> String {
        format!("main ({})", self.channel.peer())
    }

    /// The stream: bytes at the position, one after another.
    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Where the stream's next byte is.
    pub(crate) fn position(&self) -> u64 {
        self.file.position()
    }

    /// Goes on with the stream at `position`.
    pub(crate) fn seek(&self, position: u64) {
        self.file.seek(position);
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        self.file.file_len()
    }

    /// A second descriptor of it, for pages; `direct`: past the page cache.
    pub(crate) fn for_pages(&self, direct: bool) -> io::Result<File> {
        self.file.for_pages(direct)
    }

    /// Writes `bytes` at a place of their own; the stream's position stays.
    pub(crate) fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, position)?;
        self.count_written(bytes.len());
        Ok(())
    }

    /// Fills `bytes` from a place of their own; the stream's position stays.
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, position)?;
        self.count_read(bytes.len());
        Ok(())
    }

    /// Counts bytes that were written by [`for_pages`](Self::for_pages).
    pub(crate) fn count_written(&self, bytes: usize) {
        self.channel.note_direct_sent(bytes as u64);
    }

    /// Counts bytes that were read by [`for_pages`](Self::for_pages).
    pub(crate) fn count_read(&self, bytes: usize) {
        self.channel.note_direct_received(bytes as u64);
    }

    /// Waits until all that was written so far is durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// Ends it: it is whole and durable when this returns.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.channel.finish_sending()
    }

    /// Throws away what is not finished.
    pub(crate) fn abort(&self) {
        self.channel.closer().close();
    }

    pub(super) fn stream(&self) -> &FileStream {
        &self.file
    }
}
