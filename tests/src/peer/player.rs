//! Plays a recording to a destination, over bare sockets.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use multifd_transports::Endpoint;
use multifd_wire::ReturnMessage;

use super::socket::LONG;
use super::{Ending, Lane, Recording, Socket, Step};

/// A source in the middle of its script.
pub struct Player<'a> {
    endpoint: &'a Endpoint,
    lanes: Vec<(Lane, Option<Socket>)>,
    replies: Vec<u8>,
}

/// What a source heard, and whether anything ended it.
#[derive(Debug)]
pub struct Heard {
    /// The return path's messages.
    pub replies: Vec<ReturnMessage>,
    /// The other side was still there long after it should have given up.
    pub hung: bool,
}

impl<'a> Player<'a> {
    /// Nothing is connected yet.
    pub fn new(endpoint: &'a Endpoint) -> Self {
        Self { endpoint, lanes: Vec::new(), replies: Vec::new() }
    }

    /// Does what the recording says, as far as the other side lets it. `over` says, by a message or
    /// its end, that the other side is done.
    pub fn play(mut self, recording: &Recording, over: &Receiver<()>) -> Heard {
        for step in &recording.steps {
            // A destination that has seen enough hangs up, and then nothing can be sent.
            if self.step(step, over).is_err() {
                break;
            }
        }
        if recording.ending == Ending::Wait {
            self.listen(over);
        }
        self.lanes.clear();
        let hung = matches!(over.recv_timeout(LONG), Err(RecvTimeoutError::Timeout));
        Heard { replies: messages(&self.replies), hung }
    }

    fn step(&mut self, step: &Step, over: &Receiver<()>) -> io::Result<()> {
        match step {
            Step::Connect(lane) => self.lane(*lane).map(|_| ()),
            Step::HangUp(lane) => {
                self.lane(*lane)?;
                for (_, socket) in self.lanes.iter_mut().filter(|(of, _)| of == lane) {
                    socket.take().into_iter().for_each(Socket::hang_up);
                }
                Ok(())
            }
            Step::Pause(time) => match over.recv_timeout(*time) {
                Err(RecvTimeoutError::Timeout) => Ok(()),
                _ => Err(ErrorKind::BrokenPipe.into()),
            },
            Step::UntilAcknowledged(bytes) => self.until_acknowledged(bytes),
            Step::Send { lane, bytes, .. } => match self.lane(*lane)? {
                Some(socket) => socket.write_all(bytes),
                None => Ok(()),
            },
        }
    }

    fn until_acknowledged(&mut self, bytes: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + LONG;
        let mut piece = [0; 256];
        while !messages(&self.replies).contains(&ReturnMessage::SwitchoverAck) {
            if Instant::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            let Some(main) = self.lane(Lane::Main)? else { return Err(ErrorKind::NotConnected.into()) };
            main.write_all(bytes)?;
            main.limit(Duration::from_millis(10))?;
            match main.read(&mut piece) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.replies.extend(piece.iter().take(read)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
        self.lane(Lane::Main)?.map_or(Ok(()), |main| main.limit(LONG))
    }

    /// The lane's socket; `None` after it was hung up.
    fn lane(&mut self, lane: Lane) -> io::Result<Option<&mut Socket>> {
        let known = self.lanes.iter().position(|(of, _)| *of == lane);
        let index = match known {
            Some(index) => index,
            None => {
                self.lanes.push((lane, Some(Socket::connect(self.endpoint)?)));
                self.lanes.len() - 1
            }
        };
        Ok(self.lanes.get_mut(index).and_then(|(_, socket)| socket.as_mut()))
    }

    /// Hears the return path to its end: SHUT, or the other side hangs up.
    fn listen(&mut self, over: &Receiver<()>) {
        let main = self.lanes.iter_mut().find(|(lane, _)| *lane == Lane::Main);
        let Some((_, Some(main))) = main else {
            // The channels stay until the other side is done.
            let _ = over.recv_timeout(LONG);
            return;
        };
        let deadline = Instant::now() + LONG;
        let mut piece = [0; 4096];
        let _ = main.limit(Duration::from_millis(100));
        while Instant::now() < deadline && !ends_in_shut(&self.replies) {
            match main.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => self.replies.extend(piece.iter().take(read)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
        }
    }
}

fn ends_in_shut(replies: &[u8]) -> bool {
    matches!(messages(replies).last(), Some(ReturnMessage::Shut(_)))
}

/// What a destination said, as far as it makes sense.
pub(super) fn messages(mut bytes: &[u8]) -> Vec<ReturnMessage> {
    let mut messages = Vec::new();
    while let Ok(Some((message, used))) = ReturnMessage::parse(bytes) {
        messages.push(message);
        bytes = bytes.get(used..).unwrap_or_default();
    }
    messages
}
