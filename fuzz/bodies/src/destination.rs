//! A destination, fed from memory.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use multifd_engine::{
    Arrived, Destination, DestinationBuilder, Error, ErrorKind, HostMemory, IncomingRam, RamBlock, Result,
};
use multifd_tests::{Inherited, Scratch};
use multifd_transports::Endpoint;
use multifd_wire::{BlockEntry, Configuration, ReturnMessage};

use crate::Input;

/// How long a destination waits for what does not come, where nothing depends on its success.
pub const TIMEOUT: Duration = Duration::from_millis(50);

/// Parallel channels at most.
const MAX_CHANNELS: usize = 3;

/// The bytes as the main channel of a migration, over a socket that the destination has inherited.
/// They are the input. True: a whole guest has arrived.
pub fn destination(input: &[u8], timeout: Duration) -> bool {
    let builder = Destination::builder(AnyMemory).timeout(timeout);
    connected(builder, input, |there| there.receive().and_then(give_back)).inspect_err(refused).is_ok()
}

/// A destination on an inherited socket, on which the bytes come.
pub(crate) fn connected(
    builder: DestinationBuilder,
    main: &[u8],
    run: impl FnOnce(Destination) -> Result<()>,
) -> Result<()> {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let endpoint = Inherited::new(theirs).expect("a descriptor can be inherited").give_away();
    let there = builder.listen(&endpoint).expect("a connected socket can be listened on");
    Peer { sockets: vec![ours], writes: vec![(0, main)], hears: false }.with(there, run)
}

/// The bytes on main and up to three channels.
///
/// Input: pieces of a byte (the connection: main is 0 modulo 4) and counted bytes. All connections
/// that are written to are there before the first byte. True: a whole guest has arrived.
pub fn channels(input: &[u8], timeout: Duration) -> bool {
    let mut input = Input(input);
    let mut writes = Vec::new();
    while !input.is_empty() {
        writes.push((usize::from(input.u8() % 4), input.counted()));
    }
    receive(Destination::builder(AnyMemory).timeout(timeout), writes, false, give_back).is_ok()
}

/// The source keeps its guest.
pub(crate) fn give_back(arrived: Arrived) -> Result<()> {
    drop(arrived);
    Ok(())
}

/// Receives `writes`, each to the connection with that number, 0 being main, by a destination on a
/// unix socket. With `hears` the source waits for the answer; without, it says at once that no more
/// will come.
pub(crate) fn receive(
    builder: DestinationBuilder,
    writes: Vec<(usize, &[u8])>,
    hears: bool,
    then: impl FnOnce(Arrived) -> Result<()>,
) -> Result<()> {
    let scratch = Scratch::new().expect("a folder");
    let endpoint = Endpoint::Unix(scratch.path("socket"));
    let there = builder.listen(&endpoint).expect("a socket in an empty folder");
    let lanes = writes.iter().map(|(lane, _)| lane + 1).max().unwrap_or(1).min(MAX_CHANNELS + 1);
    let connect = |_| UnixStream::connect(scratch.path("socket")).expect("the destination listens");
    let peer = Peer { sockets: (0..lanes).map(connect).collect(), writes, hears };
    peer.with(there, |there| there.receive().and_then(then)).inspect_err(refused)
}

/// A source that sends what it is told.
struct Peer<'a> {
    sockets: Vec<UnixStream>,
    writes: Vec<(usize, &'a [u8])>,
    hears: bool,
}

impl Peer<'_> {
    fn with(self, there: Destination, run: impl FnOnce(Destination) -> Result<()>) -> Result<()> {
        thread::scope(|scope| {
            scope.spawn(|| self.play());
            run(there)
        })
    }

    /// A destination that has seen enough hangs up: then the rest of that connection is not sent.
    fn play(mut self) {
        for (lane, bytes) in &self.writes {
            if let Some(socket) = self.sockets.get_mut(*lane) {
                let _ = socket.write_all(bytes);
            }
        }
        if !self.hears {
            self.sockets.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Write)));
        }
        if let Some(main) = self.sockets.first_mut() {
            wait_for_shut(main);
        }
    }
}

/// Reads the return path up to its last message, or to its end.
fn wait_for_shut(main: &mut UnixStream) {
    let (mut heard, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = main.read(&mut piece) {
        heard.extend(piece.iter().take(read));
        while let Ok(Some((message, used))) = ReturnMessage::parse(&heard) {
            heard.drain(..used);
            if matches!(message, ReturnMessage::Shut(_)) {
                return;
            }
        }
    }
}

/// A bad stream has to be refused for what it is.
pub(crate) fn refused(error: &Error) {
    let ours = matches!(error.kind(), ErrorKind::ApiMisuse | ErrorKind::Bug | ErrorKind::Panicked);
    assert!(!ours, "{}", error.chain());
}

/// Memory for whatever is announced, up to 8 MiB.
pub(crate) struct AnyMemory;

impl IncomingRam for AnyMemory {
    fn open(
        &mut self,
        _configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        const LIMIT: u64 = 8 << 20;
        let total = announced.iter().fold(0_u64, |sum, block| sum.saturating_add(block.used_len));
        if total > LIMIT {
            return Err(format!("{total} bytes of RAM, expected at most {LIMIT}").into());
        }
        let block = |entry: &BlockEntry| {
            let memory = HostMemory::anonymous(usize::try_from(entry.used_len)?)?;
            Ok(RamBlock::new(entry.name.clone(), memory))
        };
        announced.iter().map(block).collect()
    }
}
