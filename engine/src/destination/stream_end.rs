//! The end of what comes in over a pipe, a command or a file. A checksum in a trailer, or the exit
//! status of a command, says only there that the bytes before it were not what they should be.

use std::time::Duration;

use super::return_path::ReturnPath;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::MainReader;

/// How long a pipe may stay open behind the stream. Its writer has no exit status that could be
/// waited for, and a copy of its end in any other process keeps it open.
const HELD_OPEN: Duration = Duration::from_secs(5);

/// Waits until nothing can follow the stream, and the command that it came from has ended well; for
/// at most `timeout` each.
///
/// Peers on a socket keep it open until they were answered, and so does a command whose source
/// waits for an answer: of these there is nothing to wait for yet ([`ReturnPath::settle`] does it
/// later).
pub(crate) fn wait(reader: &mut MainReader, return_path: &ReturnPath, timeout: Duration) -> Result<()> {
    let channel = reader.channel().clone();
    if channel.is_connection() {
        return Ok(());
    }
    let must_answer = return_path.is_open();
    if !must_answer {
        // A command that reads its standard input to the end, such as nc, ends after that only.
        channel.finish_sending().map_err(|error| failed(reader, error))?;
    }
    let more = !reader.buffered().is_empty();
    if more || (!must_answer && goes_on(reader, timeout)?) {
        let (position, behind) = (reader.position(), reader.buffered().len());
        let detail = format!("the stream ends at byte {position}, but {behind} bytes or more follow it");
        return Err(Error::new(ErrorKind::InvalidStream, Phase::Device, detail).on(reader.name()));
    }
    if must_answer {
        return Ok(());
    }
    channel.settle(timeout).map_err(|error| failed(reader, error))
}

/// False at the end of what comes in.
fn goes_on(reader: &mut MainReader, timeout: Duration) -> Result<bool> {
    let channel = reader.channel().clone();
    let is_command = channel.is_two_way();
    let limit = if is_command { timeout } else { timeout.min(HELD_OPEN) };
    channel.set_timeout(Some(limit)).map_err(|error| failed(reader, error))?;
    match reader.fill(Phase::Device, "the end of the stream") {
        Err(error) if error.kind() == ErrorKind::Deadline && is_command => {
            let detail = format!(
                "all of the guest is here, but the stream is still open after {limit:?}: the command has to close it"
            );
            Err(Error::new(ErrorKind::Deadline, Phase::Device, detail).on(reader.name()))
        }
        Err(error) if error.kind() == ErrorKind::Deadline => {
            tracing::warn!("all of the guest is here, but a process keeps the pipe open");
            Ok(false)
        }
        result => result,
    }
}

fn failed(reader: &MainReader, error: std::io::Error) -> Error {
    Error::io(Phase::Device, "at the end of the stream", error).on(reader.name())
}
