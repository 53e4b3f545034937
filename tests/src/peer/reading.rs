//! Follows the section stream just far enough to know where it is.

use multifd_wire::{
    BlockEntry, BlockListFormat, Command, Configuration, Footer, Invalid, Item, PageSize, Parsed, RamRecord,
    StreamHeader, TailScanner,
};

use crate::Outcome;

/// How far a stream has come.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum Stage {
    /// Nothing of it yet.
    #[default]
    Nothing,
    /// Stream header and configuration.
    Configured,
    /// START of the RAM section is over: all blocks are known.
    Started,
    /// The first PART has begun.
    Moving,
    /// END of the RAM section is over.
    RamSent,
    /// All of it.
    Finished,
}

/// The section stream as far as it has been read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    bytes: Vec<u8>,
    stage: Stage,
    place: Place,
    /// Bytes to be passed over: the content of a page.
    skip: usize,
    last_section: bool,
    digests: usize,
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Header,
    Configuration,
    Items,
    /// So many bytes of blocks are still to be listed.
    Blocks(u64),
    Records,
    Footer,
    Tail(TailScanner),
}

impl Reading {
    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    pub(super) fn digests(&self) -> usize {
        self.digests
    }

    /// Takes the next bytes; gives the PINGs in them.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Outcome<Vec<u32>> {
        self.bytes.extend_from_slice(bytes);
        let mut pings = Vec::new();
        while self.step(&mut pings)? {}
        Ok(pings)
    }

    /// As [`Reading::push`]; gives the lengths of what was read, one message after the other.
    pub(super) fn push_cutting(&mut self, bytes: &[u8]) -> Outcome<Vec<usize>> {
        self.bytes.extend_from_slice(bytes);
        let mut lens = Vec::new();
        loop {
            let before = self.bytes.len();
            let more = self.step(&mut Vec::new())?;
            let read = before - self.bytes.len();
            lens.extend(Some(read).filter(|read| *read > 0));
            if !more && read == 0 {
                return Ok(lens);
            }
        }
    }

    /// False when more bytes are needed.
    fn step(&mut self, pings: &mut Vec<u32>) -> Outcome<bool> {
        if self.skip > 0 {
            let skipped = self.skip.min(self.bytes.len());
            self.bytes.drain(..skipped);
            self.skip -= skipped;
            return Ok(self.skip == 0);
        }
        let used = match &mut self.place {
            Place::Header => {
                used(StreamHeader::parse(&self.bytes))?.inspect(|_| self.place = Place::Configuration)
            }
            Place::Configuration => used(Configuration::parse(&self.bytes))?.inspect(|_| {
                self.stage = Stage::Configured;
                self.place = Place::Items;
            }),
            Place::Items => self.item(pings)?,
            Place::Blocks(left) => match BlockEntry::parse(&self.bytes, BlockListFormat::default())? {
                Some((entry, used)) => {
                    *left = left.saturating_sub(entry.used_len);
                    if *left == 0 {
                        self.place = Place::Records;
                    }
                    Some(used)
                }
                None => None,
            },
            Place::Records => self.record()?,
            Place::Footer => used(Footer::parse(&self.bytes))?.inspect(|_| {
                self.stage = self.stage.max(if self.last_section { Stage::RamSent } else { Stage::Started });
                self.place = Place::Items;
            }),
            Place::Tail(scanner) => {
                if scanner.push(&std::mem::take(&mut self.bytes))?.is_some() {
                    self.stage = Stage::Finished;
                }
                None
            }
        };
        self.bytes.drain(..used.unwrap_or(0));
        Ok(used.is_some())
    }

    fn item(&mut self, pings: &mut Vec<u32>) -> Outcome<Option<usize>> {
        let Some((item, used)) = Item::parse(&self.bytes)? else { return Ok(None) };
        match item {
            Item::Command(Command::Ping(value)) => pings.push(value),
            Item::Command(Command::Digest { .. }) => self.digests += 1,
            Item::Command(_) => {}
            Item::SectionStart(_) => self.place = Place::Records,
            Item::SectionPart(_) => {
                self.stage = Stage::Moving;
                self.place = Place::Records;
            }
            Item::SectionEnd(_) => {
                self.last_section = true;
                self.place = Place::Records;
            }
            Item::SectionFull(_) | Item::Eof => {
                self.place = Place::Tail(TailScanner::new());
                return Ok(Some(0));
            }
        }
        Ok(Some(used))
    }

    fn record(&mut self) -> Outcome<Option<usize>> {
        let Some((record, used)) = RamRecord::parse(&self.bytes, PageSize::K4)? else { return Ok(None) };
        match record {
            RamRecord::EndOfSection => self.place = Place::Footer,
            RamRecord::MemSize { total } => self.place = Place::Blocks(total),
            RamRecord::Page { .. } => self.skip = PageSize::K4.bytes(),
            RamRecord::Xbzrle { len, .. } => self.skip = len.into(),
            RamRecord::Compressed { len, .. } => self.skip = usize::try_from(len)?,
            RamRecord::Flush | RamRecord::Zero { .. } => {}
        }
        Ok(Some(used))
    }
}

fn used<T>(parsed: Parsed<T>) -> Result<Option<usize>, Invalid> {
    Ok(parsed?.map(|(_, used)| used))
}
