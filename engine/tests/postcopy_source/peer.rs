//! A destination of a post-copy that does what a script says: what it has of the guest, and where
//! it hangs up.

use std::collections::BTreeMap;

use multifd_engine::transports::Channel;
use multifd_engine::wire::{
    BlockEntry, BlockListFormat, BlockRef, Command, Configuration, Footer, Item, PageSize, Parsed, RamRecord,
    ReturnMessage, StreamHeader,
};
use multifd_engine::{PAGE, RamBlock};

/// The value of the PING behind the device state.
pub(crate) const LOADED: u32 = 0x42;

/// What a destination has after its links so far.
#[derive(Default)]
pub(crate) struct Peer {
    /// Pages by block and number; `None`: not there, or discarded.
    pub(crate) pages: BTreeMap<String, Vec<Option<Vec<u8>>>>,
    /// Blocks and pages in the order in which they came after the hand-over, on all channels.
    pub(crate) order: Vec<(String, usize)>,
    /// Page sizes of the blocks that have others than 4096.
    pub(crate) page_sizes: BTreeMap<String, u64>,
    /// Commands, in their order.
    pub(crate) commands: Vec<Command>,
    /// The guest runs.
    pub(crate) runs: bool,
    /// The stream has come to its end.
    pub(crate) ended: bool,
}

/// What a destination does on one link.
#[derive(Clone, Default)]
pub(crate) struct Script {
    /// Hangs up before it deals with this item or record, counted from 0; `None`: never.
    pub(crate) cut: Option<usize>,
    /// Asks for these pages when the guest starts, or goes on: block, first page, pages.
    pub(crate) requests: Vec<(String, usize, usize)>,
    /// Sends this instead.
    pub(crate) raw_answer: Option<Vec<u8>>,
    /// Sends this instead of the bitmap of the pages that have arrived.
    pub(crate) raw_bitmap: Option<Vec<u8>>,
    /// Gives the guest up with this status when it would start, or before.
    pub(crate) shut_at_run: Option<u32>,
    pub(crate) shut_before_devices: Option<u32>,
    /// Does not say that the devices are loaded.
    pub(crate) mute: bool,
    /// Runs no guest of huge pages, but knows this list of sizes: blocks whose entry has one.
    pub(crate) huge: Vec<String>,
}

/// Why a link has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkEnd {
    /// The script cut it.
    Cut,
    /// The source closed it.
    Closed,
    /// All is there.
    Done,
}

struct Reader<'c> {
    channel: &'c Channel,
    bytes: Vec<u8>,
}

impl Reader<'_> {
    /// `None`: the source has closed the connection.
    fn next<T>(&mut self, parse: impl Fn(&[u8]) -> Parsed<T>) -> Option<T> {
        loop {
            if let Some((value, used)) = parse(&self.bytes).unwrap() {
                self.bytes.drain(..used);
                return Some(value);
            }
            self.more()?;
        }
    }

    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        while self.bytes.len() < len {
            self.more()?;
        }
        Some(self.bytes.drain(..len).collect())
    }

    fn more(&mut self) -> Option<()> {
        let mut piece = vec![0; 1 << 16];
        let len = self.channel.recv(&mut piece).ok().filter(|len| *len > 0)?;
        self.bytes.extend_from_slice(&piece[..len]);
        Some(())
    }
}

impl Peer {
    pub(crate) fn new(blocks: &[RamBlock]) -> Self {
        let pages = |block: &RamBlock| (block.name().as_str().to_owned(), vec![None; block.pages()]);
        Self { pages: blocks.iter().map(pages).collect(), ..Self::default() }
    }

    /// Reads main to the end of the link. `resumed`: it replaces one that broke.
    pub(crate) fn link(&mut self, main: &Channel, script: &Script, resumed: bool) -> LinkEnd {
        let end = self.read_main(main, script, resumed);
        main.closer().close();
        match end {
            Some(end) => end,
            None => LinkEnd::Closed,
        }
    }

    /// Reads the channel of pages that are asked for to its end, or up to `cut` pages.
    pub(crate) fn urgent(&mut self, channel: &Channel, cut: Option<usize>) {
        let mut reader = Reader { channel, bytes: Vec::new() };
        let mut last = None;
        for count in 0.. {
            if cut == Some(count) {
                channel.closer().close();
                return;
            }
            let Some(record) = reader.next(|bytes| RamRecord::parse(bytes, PageSize::K4)) else { return };
            if self.page(record, &mut reader, &mut last).is_none() {
                return;
            }
        }
    }

    fn read_main(&mut self, main: &Channel, script: &Script, resumed: bool) -> Option<LinkEnd> {
        let mut reader = Reader { channel: main, bytes: Vec::new() };
        if !resumed {
            reader.next(StreamHeader::parse)?;
            reader.next(Configuration::parse)?;
        }
        let (mut last, mut count) = (None, 0);
        let mut cut = || {
            count += 1;
            script.cut.is_some_and(|cut| count > cut)
        };
        loop {
            if cut() {
                return Some(LinkEnd::Cut);
            }
            match reader.next(Item::parse)? {
                Item::Command(command) => self.command(command, main, script)?,
                Item::Eof => {
                    self.ended = true;
                    say(main, &[ReturnMessage::Shut(0)])?;
                    return Some(LinkEnd::Done);
                }
                Item::SectionFull(_) => {
                    reader.take(b"state".len())?;
                    reader.next(Footer::parse)?;
                }
                Item::SectionStart(_) | Item::SectionPart(_) | Item::SectionEnd(_) => loop {
                    if cut() {
                        return Some(LinkEnd::Cut);
                    }
                    match reader.next(|bytes| RamRecord::parse(bytes, PageSize::K4))? {
                        RamRecord::EndOfSection => {
                            reader.next(Footer::parse)?;
                            break;
                        }
                        RamRecord::MemSize { total } => self.list(total, &mut reader, script)?,
                        RamRecord::Flush => {}
                        record => self.page(record, &mut reader, &mut last)?,
                    }
                },
            }
        }
    }

    fn list(&mut self, total: u64, reader: &mut Reader<'_>, script: &Script) -> Option<()> {
        let mut left = total;
        while left > 0 {
            let plain = |bytes: &[u8]| BlockEntry::parse(bytes, BlockListFormat::default());
            // The name tells whether a size follows.
            let name = reader.bytes.get(1..1 + usize::from(*reader.bytes.first()?))?.to_vec();
            let huge = script.huge.iter().any(|huge| huge.as_bytes() == name);
            let with_size = BlockListFormat { page_sizes: true, ..BlockListFormat::default() };
            let entry = match huge {
                true => reader.next(|bytes| BlockEntry::parse(bytes, with_size))?,
                false => reader.next(plain)?,
            };
            if let Some(size) = entry.page_size {
                self.page_sizes.insert(entry.name.as_str().to_owned(), size);
            }
            left -= entry.used_len;
        }
        Some(())
    }

    fn command(&mut self, command: Command, main: &Channel, script: &Script) -> Option<()> {
        self.commands.push(command.clone());
        match command {
            Command::Ping(LOADED) if script.shut_before_devices.is_some() => {
                say(main, &[ReturnMessage::Shut(script.shut_before_devices?)])
            }
            Command::Ping(LOADED) if script.mute => Some(()),
            Command::Ping(value) => say(main, &[ReturnMessage::Pong(value)]),
            Command::RamDiscard { block, ranges } => {
                let pages = self.pages.get_mut(block.as_str()).unwrap();
                for range in ranges {
                    let (first, count) = (range.offset as usize / PAGE, range.len as usize / PAGE);
                    pages[first..first + count].fill(None);
                }
                Some(())
            }
            Command::PostcopyRun => {
                self.runs = true;
                match script.shut_at_run {
                    Some(status) => say(main, &[ReturnMessage::Shut(status)]),
                    None => ask(main, script),
                }
            }
            Command::RecvBitmap(block) => {
                let bytes = match &script.raw_bitmap {
                    Some(bytes) => bytes.clone(),
                    None => self.bitmap(&block),
                };
                main.send_all(&bytes).ok()
            }
            Command::PostcopyResume => {
                say(main, &[ReturnMessage::ResumeAck(1)])?;
                ask(main, script)
            }
            _ => Some(()),
        }
    }

    fn bitmap(&self, block: &multifd_engine::BlockName) -> Vec<u8> {
        let pages = &self.pages[block.as_str()];
        let mut bytes = Vec::new();
        ReturnMessage::RecvBitmap(block.clone()).encode(&mut bytes);
        let mut bits = vec![0_u8; pages.len().div_ceil(64) * 8];
        for (page, _) in pages.iter().enumerate().filter(|(_, content)| content.is_some()) {
            bits[page / 8] |= 1 << (page % 8);
        }
        bytes.extend((bits.len() as u64).to_be_bytes());
        bytes.extend(bits);
        bytes.extend(0x0123_4567_89ab_cdef_u64.to_be_bytes());
        bytes
    }

    fn page(&mut self, record: RamRecord, reader: &mut Reader<'_>, last: &mut Option<String>) -> Option<()> {
        let (offset, block, content) = match record {
            RamRecord::Page { offset, block } => (offset, block, reader.take(PAGE)?),
            RamRecord::Zero { offset, block } => (offset, block, vec![0; PAGE]),
            other => panic!("{other:?}"),
        };
        if let BlockRef::Named(name) = block {
            *last = Some(name.as_str().to_owned());
        }
        let name = last.clone().expect("a record names its block");
        let page = offset as usize / PAGE;
        let there = self.pages.get_mut(&name).unwrap();
        if self.runs {
            assert!(there[page].is_none(), "page {page} of {name} came twice");
            self.order.push((name, page));
        }
        there[page] = Some(content);
        Some(())
    }

    /// Fails unless every page is as the source has it.
    pub(crate) fn check(&self, blocks: &[RamBlock]) {
        let mut content = [0; PAGE];
        for block in blocks {
            for (page, there) in self.pages[block.name().as_str()].iter().enumerate() {
                assert!(block.read_page(page, &mut content));
                assert!(there.as_deref() == Some(&content[..]), "page {page} of {}", block.name());
            }
        }
    }
}

pub(crate) fn say(main: &Channel, messages: &[ReturnMessage]) -> Option<()> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    main.send_all(&bytes).ok()
}

fn ask(main: &Channel, script: &Script) -> Option<()> {
    if let Some(bytes) = &script.raw_answer {
        main.send_all(bytes).ok()?;
    }
    let requests = script.requests.iter().map(|(block, first, pages)| ReturnMessage::RequestPages {
        block: Some(block.as_str().try_into().unwrap()),
        offset: (first * PAGE) as u64,
        len: (pages * PAGE) as u32,
    });
    say(main, &requests.collect::<Vec<_>>())
}
