//! Guest memory to and from files, by the kernel: no byte of it passes through a buffer of ours.
#![expect(unsafe_code, reason = "std knows no pread into, and no pwrite from, memory that others write")]

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use multifd_transports::{Channel, FileStream};

use super::iovec::{MAX_RANGES_PER_CALL, advance};
use crate::guest::HostMemory;
use crate::os::retry;

impl HostMemory {
    /// Has the kernel write a range of the memory to a file, at `position` of it.
    pub(crate) fn write_to(&self, range: Range<usize>, file: &File, position: u64) -> io::Result<()> {
        let slice = self.slice(range.start, range.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let guard = slice.ptr_guard();
        let mut done = 0;
        while done < range.len() {
            let (start, left) = (guard.as_ptr().wrapping_add(done), range.len() - done);
            let at = file_offset(position + done as u64)?;
            // SAFETY: [start, start + left) lies in `slice`, whose memory `self` keeps mapped.
            let written = retry(|| unsafe { libc::pwrite(file.as_raw_fd(), start.cast(), left, at) })?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += written;
        }
        Ok(())
    }

    /// Has the kernel fill a range of the memory from a file, from `position` of it on.
    /// `UnexpectedEof`: the file ends before.
    pub(crate) fn fill_from(&self, range: Range<usize>, file: &File, position: u64) -> io::Result<()> {
        let slice = self.slice(range.start, range.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let guard = slice.ptr_guard_mut();
        let mut done = 0;
        while done < range.len() {
            let (start, left) = (guard.as_ptr().wrapping_add(done), range.len() - done);
            let at = file_offset(position + done as u64)?;
            // SAFETY: [start, start + left) lies in `slice`, whose memory `self` keeps mapped and
            // which is guest memory: the kernel may write to it at any time. Memory that is mapped
            // for reading only is an error (EFAULT).
            let count = retry(|| unsafe { libc::pread(file.as_raw_fd(), start.cast(), left, at) })?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += count;
        }
        Ok(())
    }
}

/// Writes `parts`, one behind the other, at `position` of a file.
pub(crate) fn write_parts(file: &File, parts: &[&[u8]], position: u64) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let (mut left, mut at) = (&mut slices[..], position);
    while !left.is_empty() {
        let count = i32::try_from(left.len().min(MAX_RANGES_PER_CALL)).map_err(io::Error::other)?;
        let offset = file_offset(at)?;
        // SAFETY: an IoSlice is an iovec, and there are at least `count`.
        let written =
            retry(|| unsafe { libc::pwritev(file.as_raw_fd(), left.as_ptr().cast(), count, offset) })?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut left, written);
        at += written as u64;
    }
    Ok(())
}

/// Writes ranges to the file behind a channel, where that is.
pub(super) fn write_all(ranges: &mut [libc::iovec], channel: &Channel, file: &FileStream) -> io::Result<()> {
    let mut left = ranges;
    while !left.is_empty() {
        if channel.is_closed() {
            return Err(channel.explain(io::ErrorKind::ConnectionAborted.into()));
        }
        match retry(|| write_once(file, left))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                channel.note_direct_sent(written as u64);
                file.seek(file.position() + written as u64);
                left = advance(left, written);
            }
        }
    }
    Ok(())
}

fn write_once(file: &FileStream, ranges: &[libc::iovec]) -> isize {
    let count = i32::try_from(ranges.len().min(MAX_RANGES_PER_CALL)).unwrap_or(i32::MAX);
    // A position past the end of all files is an error of the call (EINVAL).
    let position = i64::try_from(file.position()).unwrap_or(-1);
    // SAFETY: there are at least `count` ranges, valid for reading: see `Ranges`.
    unsafe { libc::pwritev(file.as_fd().as_raw_fd(), ranges.as_ptr(), count, position) }
}

fn file_offset(position: u64) -> io::Result<i64> {
    i64::try_from(position).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn more_parts_than_a_call_takes_are_written_one_behind_the_other() {
        let file = tempfile::tempfile().unwrap();
        let parts: Vec<Vec<u8>> =
            (0..2 * MAX_RANGES_PER_CALL + 3).map(|at| vec![at.to_le_bytes()[0]; at % 5]).collect();
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        write_parts(&file, &slices, 11).unwrap();
        let mut written = vec![0; parts.concat().len()];
        file.read_exact_at(&mut written, 11).unwrap();
        assert!(written == parts.concat());
        assert_eq!(file.metadata().unwrap().len(), 11 + written.len() as u64);
        write_parts(&file, &[], 0).unwrap();
    }
}
