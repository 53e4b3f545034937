//! Serving connections that are there already: descriptors, a command, a file. No other can come.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::accept::client::Client;
use crate::accept::first_bytes::FirstBytes;
use crate::accept::{Arrival, Terms, check_first_bytes, shake_hands};
use crate::os::event_loop::{First, Tasks, first, ready, within};
use crate::{Channel, FileStream, Listener, TlsServer};

/// Reports the outcome of each channel, and then waits until the listener is stopped.
///
/// All are reported as opened before anything is received on any: that one of them is main shows
/// that the others are there.
pub(crate) async fn serve(
    listener: &Listener,
    channels: Vec<Channel>,
    terms: Terms,
    on_arrival: &mut dyn FnMut(Arrival),
) -> io::Result<()> {
    check_first_bytes(terms.first_bytes)?;
    let stopper = listener.stopper();
    let mut tasks = Tasks::new();
    for channel in channels {
        let number = listener.next_number();
        on_arrival(Arrival::Opened { number, peer: channel.peer().to_owned() });
        let (first, timeout) = (FirstBytes::new(terms.first_bytes, terms.opening), terms.timeout);
        match terms.tls.clone() {
            None => tasks.spawn(identify(number, channel, first, timeout)),
            Some(tls) => tasks.spawn(identify_tls(number, channel, tls, first, timeout)),
        };
    }
    while !tasks.is_empty() {
        match first(stopper.stopped(), tasks.next()).await {
            First::One(stopped) => return stopped,
            First::Other(arrival) => on_arrival(arrival),
        }
    }
    stopper.stopped().await
}

async fn identify(number: u64, channel: Channel, mut first: FirstBytes, timeout: Duration) -> Arrival {
    let (begun, peer) = (Instant::now(), channel.peer().to_owned());
    match within(timeout, receive(&channel, &mut first)).await {
        None => Arrival::TimedOut { number, peer, waited: begun.elapsed() },
        Some(Err(error)) => Arrival::Failed { number, peer, error },
        Some(Ok(())) if !first.missing().is_empty() => {
            Arrival::Closed { number, peer, received: first.received() }
        }
        Some(Ok(())) => {
            // Those of a file stay where they are.
            let taken = if channel.file().is_some() { &[] } else { first.so_far() };
            let channel = channel.push_back(taken);
            Arrival::Identified { number, channel, first: first.first() }
        }
    }
}

/// As [`identify`], behind a TLS handshake.
async fn identify_tls(
    number: u64,
    channel: Channel,
    tls: TlsServer,
    first: FirstBytes,
    timeout: Duration,
) -> Arrival {
    let peer = channel.peer().to_owned();
    match channel.into_socket().and_then(|(socket, _)| Client::new(socket)) {
        Ok(client) => {
            shake_hands(number, peer, client, &tls, first, (timeout, &AtomicBool::new(false))).await
        }
        Err(error) => Arrival::Failed { number, peer, error },
    }
}

/// Receives what is wanted, or gets as far as the other side goes.
async fn receive(channel: &Channel, first: &mut FirstBytes) -> io::Result<()> {
    if let Some(file) = channel.file() {
        let wanted = first.missing();
        let looked_at = wanted.len();
        look(file, wanted)?;
        first.note(looked_at);
        return Ok(());
    }
    let readable = Arc::new(channel.readable_end()?);
    while let missing @ [_, ..] = first.missing() {
        ready(&readable, PollFlags::IN).await?;
        match channel.recv(missing)? {
            0 => return Ok(()),
            received => first.note(received),
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
