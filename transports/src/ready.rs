//! A listener for a channel that is there already: nobody has to connect.

use std::io::{self, ErrorKind};
use std::sync::{Mutex, PoisonError};

use crate::{Arrival, Channel, Listener, blocking};

/// The channel, until it is handed over.
#[derive(Debug)]
pub(crate) struct Ready(Mutex<Option<Channel>>);

impl Ready {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(Mutex::new(Some(channel)))
    }

    /// Reports the channel as the one that has arrived, then waits for the listener's stopper like any other.
    pub(crate) fn serve(
        &self,
        listener: &Listener,
        first_bytes: usize,
        on_arrival: &mut dyn FnMut(Arrival),
    ) -> io::Result<()> {
        if let Some(channel) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let (number, peer) = (listener.next_number(), channel.peer().to_owned());
            on_arrival(Arrival::Opened { number, peer: peer.clone() });
            let mut first = [0; 4];
            on_arrival(match look(&channel, first.get_mut(..first_bytes).unwrap_or_default()) {
                Ok(()) => Arrival::Identified { number, channel, first },
                Err(error) => Arrival::Failed { number, peer, error },
            });
        }
        blocking::runtime()?.block_on(listener.stopper().stopped());
        Ok(())
    }
}

/// The first bytes, which stay where they are.
fn look(channel: &Channel, first: &mut [u8]) -> io::Result<()> {
    let Some(file) = channel.file() else { return Ok(()) };
    file.read_exact_at(first, file.position()).map_err(|error| match (error.kind(), file.file_len()) {
        (ErrorKind::UnexpectedEof, Ok(len)) => {
            let text = format!("the file ends at byte {len}, a stream begins at byte {}", file.position());
            io::Error::new(ErrorKind::UnexpectedEof, text)
        }
        _ => error,
    })
}
