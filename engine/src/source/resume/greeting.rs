//! What is said over a new link before its stream: which migration it is, that both ends are those
//! that have it, and what has come.

use multifd_transports::Channel;
use multifd_wire::{BlockName, Command, Item, ResumeOpening, ReturnMessage};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGES_PER_WORD;
use crate::run::secret::{Nonces, Prover, Secret, random};
use crate::source::outgoing::OutgoingRam;
use crate::source::return_path::received_pages;
use crate::work::{BlockIndex, PerBlock};

/// What the destination has.
pub(super) struct Standing {
    /// The value of the last PING behind a round that it has answered.
    pub(super) settled: u32,
    /// The pages of each block that have come since.
    arrived: PerBlock<Vec<u8>>,
}

impl Standing {
    /// 64 pages of a block.
    pub(super) fn word(&self, block: BlockIndex, word: usize) -> u64 {
        let bytes = self.arrived.at(block).chunks_exact(PAGES_PER_WORD / 8).nth(word);
        bytes.and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Introduces this end to the destination at the other end of `channel`. `None`: it does not know
/// the migration, and has said so.
///
/// # Errors
/// The connection broke, or the other end is not the destination of this migration.
pub(super) fn greet(channel: &Channel, secret: &Secret, ram: &OutgoingRam) -> Result<Option<Standing>> {
    greet_over(channel, secret, ram).map_err(|error| error.on(format!("main ({})", channel.peer())))
}

fn greet_over(channel: &Channel, secret: &Secret, ram: &OutgoingRam) -> Result<Option<Standing>> {
    let mut answers = Answers { channel, unparsed: Vec::new() };
    let source = random()?;
    let opening = ResumeOpening { id: secret.id(), nonce: source };
    send(channel, &opening.encode())?;
    let (nonces, proof) = match answers.next()? {
        ReturnMessage::NotKnown => return Ok(None),
        ReturnMessage::Challenge { nonce, proof } => (Nonces { source, destination: nonce }, proof),
        other => return Err(unexpected(&other, "a challenge")),
    };
    if !secret.is_proved(Prover::Destination, nonces, &proof)? {
        let detail =
            "what listens there is not the destination of this migration: it does not know its secret";
        return Err(Error::misbehaved(Phase::Setup, detail));
    }
    let mut said = Vec::new();
    Item::Command(Command::Proof(secret.proof(Prover::Source, nonces)?)).encode(&mut said);
    send(channel, &said)?;
    let settled = match answers.next()? {
        ReturnMessage::Standing(settled) => settled,
        other => return Err(unexpected(&other, "what has come")),
    };
    Ok(Some(Standing { settled, arrived: answers.bitmaps(ram)? }))
}

fn send(channel: &Channel, bytes: &[u8]) -> Result<()> {
    channel.send_all(bytes).map_err(|error| Error::io(Phase::Setup, "introducing this end", error))
}

fn unexpected(seen: &ReturnMessage, expected: &str) -> Error {
    Error::misbehaved(Phase::Setup, format!("{seen:?} over a new link, expected {expected}"))
}

/// What the destination says, in its order.
struct Answers<'c> {
    channel: &'c Channel,
    unparsed: Vec<u8>,
}

impl Answers<'_> {
    fn next(&mut self) -> Result<ReturnMessage> {
        loop {
            let parsed = ReturnMessage::parse(&self.unparsed);
            if let Some((message, used)) = parsed.map_err(|invalid| Error::invalid(Phase::Setup, invalid))? {
                self.unparsed.drain(..used);
                return Ok(message);
            }
            self.receive()?;
        }
    }

    /// One of each block, in any order.
    fn bitmaps(&mut self, ram: &OutgoingRam) -> Result<PerBlock<Vec<u8>>> {
        let mut all: Vec<Option<Vec<u8>>> = ram.blocks.iter().map(|_| None).collect();
        for _ in 0..ram.blocks.len() {
            let name = match self.next()? {
                ReturnMessage::RecvBitmap(name) => name,
                other => return Err(unexpected(&other, "the bitmap of a RAM block")),
            };
            let place = ram.blocks.iter().zip(&mut all).find(|(block, _)| *block.block.name() == name);
            let Some((block, place @ None)) = place else {
                let detail =
                    format!("a bitmap of RAM block {name}, which is not in this guest, or a second one");
                return Err(Error::misbehaved(Phase::Setup, detail));
            };
            *place = Some(self.bitmap(&name, block.block.pages())?);
        }
        let none = || Error::bug(Phase::Setup, "a RAM block without its bitmap");
        all.into_iter().map(|bitmap| bitmap.ok_or_else(none)).collect()
    }

    /// The raw bytes behind RECV_BITMAP.
    fn bitmap(&mut self, name: &BlockName, pages: usize) -> Result<Vec<u8>> {
        let expected = received_pages::len(pages);
        let whole = received_pages::HEAD + expected + received_pages::MARK;
        while self.unparsed.len() < whole {
            received_pages::check_head(&self.unparsed, expected, name)?;
            self.receive()?;
        }
        received_pages::check_head(&self.unparsed, expected, name)?;
        received_pages::content(self.unparsed.drain(..whole).collect(), name)
    }

    fn receive(&mut self) -> Result<()> {
        let mut piece = [0; 4096];
        let len = self
            .channel
            .recv(&mut piece)
            .map_err(|error| Error::io(Phase::Setup, "waiting for what the destination has", error))?;
        if len == 0 {
            let detail = "the destination ended a new link before its stream";
            return Err(Error::new(ErrorKind::Transport, Phase::Setup, detail));
        }
        let piece = piece.get(..len);
        let piece = piece.ok_or_else(|| Error::bug(Phase::Setup, "more was received than asked for"))?;
        self.unparsed.extend_from_slice(piece);
        Ok(())
    }
}
