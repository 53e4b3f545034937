//! A scripted destination: reads what a source sends as far as the test likes, and answers what the
//! test likes.

use std::io::{Read, Write};

use multifd_transports::Endpoint;
use multifd_wire::ReturnMessage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::reading::{Reading, Stage};
use super::socket::{LONG, Listening, Socket};
use crate::{Failure, Outcome, Scratch};

/// Waits for a source.
#[derive(Debug)]
pub struct Sink {
    listener: Listening,
    endpoint: Endpoint,
    _scratch: Scratch,
}

/// A source that came in.
#[derive(Debug)]
pub struct Incoming {
    main: Option<Socket>,
    channels: Vec<Option<Socket>>,
    reading: Reading,
    /// Bytes read from all channels.
    pub channel_bytes: usize,
    /// What each channel has brought, if it is to be kept.
    pub kept: Option<Vec<Vec<u8>>>,
    /// Answers PINGs while it reads.
    pub polite: bool,
}

impl Sink {
    /// Listens on a unix socket, whose buffers are small.
    ///
    /// # Errors
    /// When it cannot.
    pub fn unix() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        Self::listen(&Endpoint::Unix(scratch.path("sink")), scratch)
    }

    /// Listens on a local TCP port.
    ///
    /// # Errors
    /// When it cannot.
    pub fn tcp() -> Outcome<Self> {
        Self::listen(&Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 }, Scratch::new()?)
    }

    fn listen(endpoint: &Endpoint, scratch: Scratch) -> Outcome<Self> {
        let listener = Listening::open(endpoint)?;
        Ok(Self { endpoint: listener.endpoint(endpoint)?, listener, _scratch: scratch })
    }

    /// Where the source has to go.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Takes main, which comes first, and this many channels.
    ///
    /// # Errors
    /// When they do not come.
    pub fn accept(&self, channels: usize) -> Outcome<Incoming> {
        let accept = || {
            wait(&mut [PollFd::new(&self.listener, PollFlags::IN)], "a connection")?;
            self.listener.accept()
        };
        let main = Some(accept()?);
        let channels = (0..channels).map(|_| Ok(Some(accept()?))).collect::<Outcome<_>>()?;
        Ok(Incoming {
            main,
            channels,
            reading: Reading::default(),
            channel_bytes: 0,
            kept: None,
            polite: true,
        })
    }
}

impl Incoming {
    /// Reads all lanes until main has come so far.
    ///
    /// # Errors
    /// When it ends before that.
    pub fn read_to(&mut self, stage: Stage) -> Outcome {
        while self.reading.stage() < stage {
            self.read_some()?;
        }
        Ok(())
    }

    /// Reads all lanes for as long as the source keeps main.
    pub fn read_on(&mut self) {
        while self.read_some().is_ok() {}
    }

    /// Reads all lanes until the channels have brought that many bytes.
    ///
    /// # Errors
    /// When main ends before that.
    pub fn read_channel_bytes(&mut self, bytes: usize) -> Outcome {
        while self.channel_bytes < bytes {
            self.read_some()?;
        }
        Ok(())
    }

    /// Digests of blocks that main has brought.
    pub fn digests(&self) -> usize {
        self.reading.digests()
    }

    /// Says something on the return path. What the source does not hear any more is lost.
    pub fn say(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.say_bytes(&bytes);
    }

    /// Says any bytes on the return path.
    pub fn say_bytes(&mut self, bytes: &[u8]) {
        if let Some(main) = &mut self.main {
            let _ = main.write_all(bytes);
        }
    }

    /// Hangs up main.
    pub fn cut_main(&mut self) {
        self.main.take().into_iter().for_each(Socket::hang_up);
    }

    /// Hangs up a channel, by the order of arrival.
    pub fn cut_channel(&mut self, index: usize) {
        self.channels.get_mut(index).and_then(Option::take).into_iter().for_each(Socket::hang_up);
    }

    /// Keeps all connections, reads nothing, until the source has ended main.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_for_the_end(&mut self) -> Outcome {
        let Some(main) = &self.main else { return Ok(()) };
        // The other end's shutdown shows without reading.
        wait(&mut [PollFd::new(main, PollFlags::RDHUP)], "the source's end")
    }

    fn read_some(&mut self) -> Outcome {
        if self.main.is_none() && self.channels.iter().all(Option::is_none) {
            return Err(Failure::new("no lane is left to be read"));
        }
        let main_is_ready = self.wait_readable()?;
        let mut piece = vec![0; 64 << 10];
        for (index, channel) in self.channels.iter_mut().enumerate() {
            let Some(socket) = channel.as_mut().filter(|socket| readable(socket)) else { continue };
            match socket.read(&mut piece) {
                Ok(read @ 1..) => {
                    self.channel_bytes += read;
                    if let Some(kept) = self.kept.as_mut() {
                        kept.resize(kept.len().max(index + 1), Vec::new());
                        let kept = kept.get_mut(index).into_iter();
                        kept.for_each(|kept| kept.extend(piece.iter().take(read)));
                    }
                }
                _ => *channel = None,
            }
        }
        let Some(main) = self.main.as_mut().filter(|_| main_is_ready) else { return Ok(()) };
        let read = main.read(&mut piece)?;
        if read == 0 {
            return Err(Failure::new(format!("the source ended main at {:?}", self.reading.stage())));
        }
        let pings = self.reading.push(piece.get(..read).unwrap_or_default())?;
        // As QEMU does: a PONG for each, whatever its value.
        let answers = if self.polite { pings } else { Vec::new() };
        answers.into_iter().for_each(|value| self.say(&ReturnMessage::Pong(value)));
        Ok(())
    }

    /// Waits until any lane can be read; whether main is one.
    fn wait_readable(&self) -> Outcome<bool> {
        let lanes = self.main.iter().chain(self.channels.iter().flatten());
        let mut lanes: Vec<_> = lanes.map(|lane| PollFd::new(lane, PollFlags::IN)).collect();
        wait(&mut lanes, "anything")?;
        Ok(self.main.is_some() && lanes.first().is_some_and(|main| !main.revents().is_empty()))
    }
}

fn readable(socket: &Socket) -> bool {
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn wait(lanes: &mut [PollFd<'_>], what: &str) -> Outcome {
    let limit = Timespec::try_from(LONG)?;
    match poll(lanes, Some(&limit))? {
        0 => Err(Failure::new(format!("no {what} within {LONG:?}"))),
        _ => Ok(()),
    }
}
