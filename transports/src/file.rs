//! A regular file as a channel: in one direction, with a position that can be moved.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl};

/// The file behind a channel, which is written or read from one end to the other.
///
/// A file that is written counts for nothing until
/// [`Channel::finish_sending`](crate::Channel::finish_sending): closed or dropped before, it is cut
/// off where the stream began, and removed if it was made for the stream.
#[derive(Debug)]
pub struct FileStream {
    file: File,
    /// Where the next byte goes to or comes from.
    position: AtomicU64,
    /// `None`: it is read.
    writing: Option<Writing>,
    life: Mutex<Life>,
}

#[derive(Debug)]
struct Writing {
    /// Where the stream begins; what is before it is not ours.
    start: u64,
    /// The name that the file was made under.
    made: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Open,
    /// All is written and durable.
    Finished,
    /// Closed by this side before that.
    Closed,
}

impl FileStream {
    /// Opens a file to write a stream from `offset` on, and makes it if it is not there. What is
    /// after `offset` is cut off, what is before it stays. Only its owner can read the file
    /// afterwards: it is a guest's RAM.
    pub(crate) fn create(path: &Path, offset: u64) -> io::Result<Self> {
        check_kind_of(fs::symlink_metadata(path))?;
        let mut options = OpenOptions::new();
        // A link may lead to any file of ours: it would be cut off and overwritten.
        options.write(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
        let (file, made) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, Some(path.to_owned())),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let file = options.open(path)?;
                check_kind(&file.metadata()?)?;
                keep_others_out(&file)?;
                (file, None)
            }
            Err(error) => return Err(error),
        };
        Self::new(file, offset, Some(Writing { start: offset, made }))
    }

    /// Opens a file to read a stream that begins at `offset`.
    pub(crate) fn open(path: &Path, offset: u64) -> io::Result<Self> {
        check_kind_of(fs::metadata(path))?;
        // Never waits for the writer of a named pipe that has taken the file's place meanwhile.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Self::new(file, offset, None)
    }

    /// Takes a file opened elsewhere, to write to it.
    pub(crate) fn writing_to(fd: OwnedFd, offset: u64) -> io::Result<Self> {
        check_mode(&fd, OFlags::RDONLY, "open for reading only, expected a file to write to")?;
        // The kernel would put every page at the file's end.
        if fcntl_getfl(&fd)?.contains(OFlags::APPEND) {
            return Err(invalid("open for appending, expected a file that can be written at any place"));
        }
        Self::new(File::from(fd), offset, Some(Writing { start: offset, made: None }))
    }

    /// Takes a file opened elsewhere, to read from it.
    pub(crate) fn reading_from(fd: OwnedFd, offset: u64) -> io::Result<Self> {
        check_mode(&fd, OFlags::WRONLY, "open for writing only, expected a file to read")?;
        Self::new(File::from(fd), offset, None)
    }

    fn new(file: File, offset: u64, writing: Option<Writing>) -> io::Result<Self> {
        let found = file.metadata()?;
        check_kind(&found)?;
        if writing.is_none() && offset > found.len() {
            let text = format!("offset {offset}, the file has {} bytes", found.len());
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let this = Self { file, position: AtomicU64::new(offset), writing, life: Mutex::new(Life::Open) };
        if this.writing.is_some() {
            this.file.set_len(offset)?;
        }
        Ok(this)
    }

    /// Where in the file the next byte goes to or comes from.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Goes on at `position`. The caller is the one thread that sends or receives.
    pub fn seek(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
    }

    /// Bytes of the file now.
    ///
    /// # Errors
    /// The system's error.
    pub fn file_len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Writes all of `bytes` at a place of their own; the position stays.
    ///
    /// # Errors
    /// The system's error.
    pub fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, position)
    }

    /// Fills `bytes` from a place of their own; the position stays.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before, otherwise the system's error.
    pub fn read_exact_at(&self, bytes: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, position)
    }

    /// A second descriptor of the same file, for pages: `direct` past the page cache (O_DIRECT),
    /// where addresses, lengths and positions must be multiples of the disk's block.
    ///
    /// # Errors
    /// A file system without direct I/O, otherwise the system's error.
    pub fn for_pages(&self, direct: bool) -> io::Result<File> {
        if !direct {
            return self.file.try_clone();
        }
        // By the descriptor: the name may mean another file by now.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mut options = OpenOptions::new();
        options.read(self.writing.is_none()).write(self.writing.is_some()).custom_flags(libc::O_DIRECT);
        options.open(path).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => {
                io::Error::new(ErrorKind::Unsupported, "its file system refuses direct I/O (O_DIRECT)")
            }
            _ => error,
        })
    }

    /// Waits until all that was written so far is durable.
    ///
    /// # Errors
    /// The system's error.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub(crate) fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check_open()?;
        let Some(first) = bufs.iter().find(|buf| !buf.is_empty()) else { return Ok(0) };
        let sent = self.file.write_at(first, self.position())?;
        self.position.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(sent)
    }

    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.check_open()?;
        let received = self.file.read_at(buf, self.position())?;
        self.position.fetch_add(received as u64, Ordering::Relaxed);
        Ok(received)
    }

    /// What was written stays for good. Also syncs the directory, if the file was made.
    pub(crate) fn finish(&self) -> io::Result<()> {
        let Some(writing) = &self.writing else { return Ok(()) };
        self.check_open()?;
        self.file.sync_all()?;
        if let Some(path) = &writing.made {
            let directory = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            File::open(directory)?.sync_all()?;
        }
        let mut life = self.lock();
        // A thread that closed it meanwhile has thrown it away.
        if *life == Life::Closed {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        *life = Life::Finished;
        Ok(())
    }

    /// Ends it. What is written and not finished is thrown away; once more, when a write was still
    /// under way the first time.
    pub(crate) fn close(&self) {
        let mut life = self.lock();
        if *life == Life::Finished {
            return;
        }
        *life = Life::Closed;
        if let Some(writing) = &self.writing
            && let Err(error) = self.throw_away(writing)
        {
            tracing::warn!(%error, ?writing, "an unfinished stream is left in the file");
        }
    }

    fn throw_away(&self, writing: &Writing) -> io::Result<()> {
        self.file.set_len(writing.start)?;
        let Some(path) = &writing.made else { return Ok(()) };
        match fs::symlink_metadata(path) {
            Ok(found) if identity(&found) == identity(&self.file.metadata()?) => fs::remove_file(path),
            // Removed before, or another has taken its place.
            _ => Ok(()),
        }
    }

    fn check_open(&self) -> io::Result<()> {
        match *self.lock() {
            Life::Open => Ok(()),
            Life::Finished | Life::Closed => Err(ErrorKind::ConnectionAborted.into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for FileStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for FileStream {
    fn drop(&mut self) {
        self.close();
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Asked before it is opened: opening a device can do things.
fn check_kind_of(found: io::Result<Metadata>) -> io::Result<()> {
    match found {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        found => check_kind(&found?),
    }
}

/// Takes away what group and others may do with a file that was there before.
fn keep_others_out(file: &File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    let mode = permissions.mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    permissions.set_mode(mode & !0o077);
    file.set_permissions(permissions).map_err(|error| {
        let text = format!("others may read it (mode {:o}), which cannot be changed: {error}", mode & 0o7777);
        io::Error::new(error.kind(), text)
    })
}

fn check_kind(found: &Metadata) -> io::Result<()> {
    let kind = found.file_type();
    let name = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_symlink() => "a symbolic link",
        _ if kind.is_fifo() => "a named pipe",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_block_device() || kind.is_char_device() => "a device",
        _ => "something else",
    };
    Err(invalid(&format!("{name}, expected a regular file")))
}

fn check_mode(fd: &OwnedFd, wrong: OFlags, text: &str) -> io::Result<()> {
    let mode = fcntl_getfl(fd)? & OFlags::RWMODE;
    if mode == wrong { Err(invalid(text)) } else { Ok(()) }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, text)
}

#[cfg(test)]
mod tests;
