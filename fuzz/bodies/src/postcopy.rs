//! Post-copy at each end: the commands of a source that switches, and what a destination asks for
//! and answers.

use std::thread;

use multifd_engine::vm_memory::Bytes;
use multifd_engine::{
    Destination, DeviceState, Error, HostMemory, Incoming, PostcopyEnd, PostcopyGuest, RamBlock, Result,
    Served, Source,
};
use multifd_transports::Channel;
use multifd_wire::{BlockName, Command, Configuration, Item, ReturnMessage};

use crate::Input;
use crate::destination::{AnyMemory, TIMEOUT, connected, give_back, refused};

const PAGE: usize = 4096;

/// Pages of a source's guest: no multiple of a bitmap's words.
const PAGES: usize = 70;

const BLOCK: &str = "pc.ram";

/// What stands behind a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// The first byte says which end, modulo 3. 0: a destination that keeps its guest at rest, 1: one
/// whose guest would run; the rest are the bytes on main.
///
/// 2: a source that switches. The rest are two counted links, the second for when the first is
/// gone: a byte whose lowest bit says that the destination hangs up when nothing is left of the
/// link; then what it says at each PING, RUN, request for a bitmap, RESUME and at the end, of a
/// byte whose lowest bit says that the right answer comes first, and counted bytes.
pub fn postcopy(input: &[u8]) {
    let mut input = Input(input);
    match input.u8() % 3 {
        0 => destination(input.0, |there| there.receive().and_then(give_back)),
        1 => destination(input.0, |there| match there.receive_live()? {
            Incoming::Arrived(arrived) => give_back(arrived),
            Incoming::Postcopy(guest) => follow(guest),
        }),
        _ => drop(source([input.counted(), input.counted()])),
    }
}

fn destination(main: &[u8], run: impl FnOnce(Destination) -> Result<()>) {
    let builder = Destination::builder(AnyMemory).postcopy(true).timeout(TIMEOUT);
    let _ = connected(builder, main, run).inspect_err(refused);
}

/// To the last page, or to where the source has gone.
fn follow(mut guest: PostcopyGuest) -> Result<()> {
    match guest.loaded().and_then(|()| guest.wait()) {
        Ok(PostcopyEnd::Completed(_)) => Ok(()),
        Ok(PostcopyEnd::Paused(error)) | Err(error) => guest.poison_missing().and(Err(error)),
    }
}

/// What a source sends that switches, to a destination that answers as it should: a seed for the
/// other end.
pub fn switched() -> Vec<u8> {
    let [first, _] = source([&[], &[]]);
    first
}

/// What it sent over each of the links.
fn source(links: [&[u8]; 2]) -> [Vec<u8>; 2] {
    let memory = HostMemory::anonymous(PAGES * PAGE).expect("memory for a small guest");
    for page in [3, 40, PAGES - 1] {
        let content = memory.slice(page * PAGE, PAGE).expect("a page of the guest");
        content.write_slice(&[0xa5; PAGE], 0).expect("a page of the guest");
    }
    let block = RamBlock::new(name(), memory);
    let builder = Source::builder(vec![block], Configuration::new("pc-q35-10.0"));
    let source = builder.paused_guest().postcopy(true).timeout(TIMEOUT).build().expect("a small guest");
    let pairs = links.map(|link| (Channel::pair().expect("a pair of sockets"), link));
    thread::scope(|scope| {
        let mut ours = Vec::new();
        let peers = pairs.map(|((one, other), link)| {
            ours.push(one);
            scope.spawn(move || Peer::new(link).answer(&other))
        });
        let _ = serve(source, ours).inspect_err(refused);
        peers.map(|peer| peer.join().expect("a peer that does not panic"))
    })
}

/// Over the first of the links, and over the next for as long as it is paused.
fn serve(source: Source, links: Vec<Channel>) -> Result<()> {
    let mut links = links.into_iter();
    let main = links.next().expect("a first link");
    let mut postcopy = source
        .connect_over(main, Vec::new())?
        .switch_to_postcopy(&DeviceState::opaque("cpu", 1, b"state"))?;
    loop {
        let paused: Error = match postcopy.serve()? {
            Served::Completed(_) => return Ok(()),
            Served::Paused(error) => error,
        };
        assert!(!paused.source_may_resume(), "paused, and the guest may run here: {}", paused.chain());
        let Some(link) = links.next() else { return Err(paused) };
        if let Err(error) = postcopy.recover_over(link, None) {
            refused(&error);
            return Err(paused);
        }
    }
}

/// A destination that reads nothing but what it answers to.
struct Peer<'a> {
    script: Input<'a>,
    hangs_up: bool,
    unread: Vec<u8>,
}

/// What a source says that has an answer, as it begins on the wire.
#[derive(Clone, Copy)]
enum Asked {
    Ping,
    Run,
    Bitmap,
    Resume,
    End,
}

impl Asked {
    const ALL: [Self; 5] = [Self::Ping, Self::Run, Self::Bitmap, Self::Resume, Self::End];

    /// What the first bytes on the wire must be, and how many there are with what follows them.
    /// Nothing else in the streams of that guest begins like that.
    fn form(self) -> (Vec<u8>, usize) {
        let command = |command: Command, fixed: usize| {
            let mut bytes = Vec::new();
            Item::Command(command).encode(&mut bytes);
            let len = bytes.len();
            bytes.truncate(fixed);
            (bytes, len)
        };
        match self {
            Self::Ping => command(Command::Ping(0), 5),
            Self::Run => command(Command::PostcopyRun, 5),
            Self::Bitmap => command(Command::RecvBitmap(name()), 6),
            Self::Resume => command(Command::PostcopyResume, 5),
            // The end of a section's records, its footer, EOF.
            Self::End => (vec![0x10, 0x7e], 7),
        }
    }

    fn fits(self, bytes: &[u8], begin: &[u8]) -> bool {
        bytes.starts_with(begin) && (!matches!(self, Self::End) || bytes.last() == Some(&0))
    }
}

fn name() -> BlockName {
    BLOCK.try_into().expect("a name")
}

impl<'a> Peer<'a> {
    fn new(link: &'a [u8]) -> Self {
        let mut script = Input(link);
        let hangs_up = script.u8() % 2 == 1;
        Self { script, hangs_up, unread: Vec::new() }
    }

    /// To the end of the link: gives what the source sent.
    fn answer(mut self, channel: &Channel) -> Vec<u8> {
        let (mut all, mut piece) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = channel.recv(&mut piece) {
            all.extend(piece.iter().take(read));
            self.unread.extend(piece.iter().take(read));
            while let Some((asked, value)) = self.next() {
                let over = self.script.is_empty();
                if over && self.hangs_up {
                    channel.closer().close();
                    return all;
                }
                let honest = over || self.script.u8() % 2 == 1;
                let right = if honest { right(asked, value) } else { Vec::new() };
                let _ = channel.send_all(&[&right, self.script.counted()].concat());
            }
        }
        all
    }

    /// What is asked for first in what has not been read yet, and the be32 behind it.
    fn next(&mut self) -> Option<(Asked, u32)> {
        let first = |asked: Asked| {
            let (begin, len) = asked.form();
            let at = self.unread.windows(len).position(|bytes| asked.fits(bytes, &begin))?;
            let value = Input(self.unread.get(at + begin.len()..at + len)?).u32();
            Some((at + len, asked, value))
        };
        let (read, asked, value) = Asked::ALL.into_iter().filter_map(first).min_by_key(|(at, ..)| *at)?;
        self.unread.drain(..read);
        Some((asked, value))
    }
}

/// What a destination answers that has none of the pages.
fn right(asked: Asked, value: u32) -> Vec<u8> {
    let message = match asked {
        Asked::Ping => ReturnMessage::Pong(value),
        Asked::Run => return Vec::new(),
        Asked::Bitmap => ReturnMessage::RecvBitmap(name()),
        Asked::Resume => ReturnMessage::ResumeAck(1),
        Asked::End => ReturnMessage::Shut(0),
    };
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    if matches!(asked, Asked::Bitmap) {
        let bits = [0; PAGES.div_ceil(64) * 8];
        bytes.extend([&(bits.len() as u64).to_be_bytes()[..], &bits, &BITMAP_END.to_be_bytes()].concat());
    }
    bytes
}
