//! Serving a channel that is ready from the start: a descriptor, a command or a file.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::accept::{Arrival, check_first_bytes};
use crate::os::event_loop::{First, first, ready, within};
use crate::{Channel, FileStream, Listener};

/// Reports the outcome of the channel, and then waits until the listener is stopped.
pub(crate) async fn serve(
    listener: &Listener,
    channel: Option<Channel>,
    first_bytes: usize,
    timeout: Duration,
    on_arrival: &mut dyn FnMut(Arrival),
) -> io::Result<()> {
    check_first_bytes(first_bytes)?;
    let stopper = listener.stopper();
    if let Some(channel) = channel {
        let number = listener.next_number();
        on_arrival(Arrival::Opened { number, peer: channel.peer().to_owned() });
        match first(stopper.stopped(), identify(number, channel, first_bytes, timeout)).await {
            First::One(stopped) => return stopped,
            First::Other(arrival) => on_arrival(arrival),
        }
    }
    stopper.stopped().await
}

async fn identify(number: u64, channel: Channel, wanted: usize, timeout: Duration) -> Arrival {
    let (begun, peer) = (Instant::now(), channel.peer().to_owned());
    let (mut first, mut received) = ([0; 4], 0);
    let outcome =
        within(timeout, first_bytes(&channel, first.get_mut(..wanted).unwrap_or_default(), &mut received));
    match outcome.await {
        None => Arrival::TimedOut { number, peer, waited: begun.elapsed() },
        Some(Err(error)) => Arrival::Failed { number, peer, error },
        Some(Ok(())) if received < wanted => Arrival::Closed { number, peer, received },
        Some(Ok(())) => {
            let looked_at = channel.file().is_some();
            let first_bytes = first.get(..received).filter(|_| !looked_at);
            let channel = channel.push_back(first_bytes.unwrap_or_default());
            Arrival::Identified { number, channel, first }
        }
    }
}

/// Fills `into`, or gets as far as the other side goes.
async fn first_bytes(channel: &Channel, into: &mut [u8], received: &mut usize) -> io::Result<()> {
    if let Some(file) = channel.file() {
        *received = into.len();
        return look(file, into);
    }
    let readable = Arc::new(channel.readable_end()?);
    while let Some(missing @ [_, ..]) = into.get_mut(*received..) {
        ready(&readable, PollFlags::IN).await?;
        match channel.recv(missing)? {
            0 => return Ok(()),
            got => *received += got,
        }
    }
    Ok(())
}

/// The first bytes, which stay where they are: a file's position is the place of its next byte.
fn look(file: &FileStream, first: &mut [u8]) -> io::Result<()> {
    file.read_exact_at(first, file.position()).map_err(|error| match (error.kind(), file.file_len()) {
        (ErrorKind::UnexpectedEof, Ok(len)) => {
            let text = format!("the file ends at byte {len}, a stream begins at byte {}", file.position());
            io::Error::new(ErrorKind::UnexpectedEof, text)
        }
        _ => error,
    })
}
