//! A source that follows a script: pages of known content go before the switch, when they are asked
//! for, or at last.
#![allow(clippy::indexing_slicing, clippy::expect_used, reason = "test code may panic")]

use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::unix::net::UnixStream;

use multifd_engine::{HostMemory, PAGE, RamBlock};
use multifd_tests::{Failure, Outcome};
use multifd_wire::{
    Advise, BlockEntry, BlockRef, Command, Configuration, DiscardRange, Footer, Item, PageSize, RamRecord,
    ReturnMessage, SectionHead, SectionId, StreamHeader,
};

use crate::fixture::SOON;

const K4: PageSize = PageSize::K4;
const RAM: SectionId = SectionId(1);
const DEVICE: SectionId = SectionId(2);
pub(crate) const STATE: &[u8] = b"state of the only device";

/// A block of the guest, as the source has it.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) name: &'static str,
    pub(crate) pages: usize,
    /// Pages in a host page.
    pub(crate) host: usize,
}

/// The source's end of a migration.
pub(crate) struct Author {
    main: UnixStream,
    heard: Vec<u8>,
    blocks: Vec<Block>,
    /// Pages that need not go any more, of each block.
    sent: Vec<Vec<bool>>,
    last_asked: Option<usize>,
}

/// What a page holds when the source has let go of the guest. `stale`: an older content.
pub(crate) fn content(block: usize, page: usize, stale: bool) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if page % 7 == 3 {
        return bytes;
    }
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = (block << 40 | page << 16 | index) as u64 ^ if stale { 0x5a << 56 } else { 1 << 56 };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

impl Block {
    fn name(&self) -> multifd_wire::BlockName {
        self.name.try_into().expect("a block's name")
    }

    /// Memory for it at the destination.
    pub(crate) fn over(&self, memory: HostMemory) -> RamBlock {
        RamBlock::new(self.name(), memory)
    }
}

impl Author {
    pub(crate) fn new(main: UnixStream, blocks: &[Block]) -> Outcome<Self> {
        main.set_read_timeout(Some(SOON))?;
        main.set_write_timeout(Some(SOON))?;
        let sent = blocks.iter().map(|block| vec![false; block.pages]).collect();
        Ok(Self { main, heard: Vec::new(), blocks: blocks.to_vec(), sent, last_asked: None })
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Outcome {
        Ok(self.main.write_all(bytes)?)
    }

    pub(crate) fn item(&mut self, item: Item) -> Outcome {
        let mut bytes = Vec::new();
        item.encode(&mut bytes);
        self.send(&bytes)
    }

    pub(crate) fn command(&mut self, command: Command) -> Outcome {
        self.item(Item::Command(command))
    }

    /// From the header to the first round, in which every fifth host page goes with an old content.
    pub(crate) fn precopy(&mut self) -> Outcome {
        let mut bytes = Vec::new();
        StreamHeader.encode(&mut bytes);
        Configuration::new("pc-q35-10.0").encode(&mut bytes);
        self.send(&bytes)?;
        self.command(Command::OpenReturnPath)?;
        let page_sizes =
            self.blocks.iter().map(|block| (block.host * PAGE) as u64).fold(0, |all, one| all | one);
        self.command(Command::PostcopyAdvise(Some(Advise { page_sizes, target_page: PAGE as u64 })))?;
        let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
        self.item(Item::SectionStart(head))?;
        let total = self.blocks.iter().map(|block| (block.pages * PAGE) as u64).sum();
        let mut bytes = Vec::new();
        RamRecord::MemSize { total }.encode(K4, &mut bytes);
        for block in &self.blocks {
            let page_size = (block.host > 1).then_some((block.host * PAGE) as u64);
            let entry = BlockEntry {
                name: block.name(),
                used_len: (block.pages * PAGE) as u64,
                page_size,
                guest_address: None,
                mapped_ram: None,
            };
            entry.encode(&mut bytes);
        }
        self.send(&bytes)?;
        self.close()?;
        self.item(Item::SectionPart(RAM))?;
        for block in 0..self.blocks.len() {
            for page in self.early(block) {
                self.page(block, page, true)?;
            }
        }
        self.close()
    }

    /// Pages that go before the switch.
    fn early(&self, block: usize) -> Vec<usize> {
        let Block { pages, host, .. } = self.blocks[block];
        (0..pages).filter(|page| (page / host).is_multiple_of(5)).collect()
    }

    /// Discards all but every tenth host page of those that went, and sends that again: the rest
    /// was never sent. Then the package.
    pub(crate) fn switch(&mut self) -> Outcome {
        self.item(Item::SectionPart(RAM))?;
        for block in 0..self.blocks.len() {
            let host = self.blocks[block].host;
            for page in self.early(block).into_iter().filter(|page| (page / host).is_multiple_of(10)) {
                self.page(block, page, false)?;
                self.sent[block][page] = true;
            }
        }
        self.close()?;
        for block in 0..self.blocks.len() {
            self.discard(block)?;
        }
        let mut package = Vec::new();
        let head = SectionHead { id: DEVICE, idstr: "device".to_owned(), instance_id: 0, version_id: 3 };
        Item::Command(Command::PostcopyListen).encode(&mut package);
        Item::SectionFull(head).encode(&mut package);
        package.extend(STATE);
        package.extend(Footer(DEVICE).to_bytes());
        Item::Command(Command::Ping(0x42)).encode(&mut package);
        Item::Command(Command::PostcopyRun).encode(&mut package);
        let len = u32::try_from(package.len()).map_err(|error| Failure::new(error.to_string()))?;
        self.command(Command::Packaged(len))?;
        self.send(&package)
    }

    fn discard(&mut self, block: usize) -> Outcome {
        let name = self.blocks[block].name();
        let runs: Vec<Range<usize>> = runs(&self.sent[block]);
        for twelve in runs.chunks(12) {
            let range = |run: &Range<usize>| DiscardRange {
                offset: (run.start * PAGE) as u64,
                len: (run.len() * PAGE) as u64,
            };
            let ranges = twelve.iter().map(range).collect();
            self.command(Command::RamDiscard { block: name.clone(), ranges })?;
        }
        Ok(())
    }

    fn page(&mut self, block: usize, page: usize, stale: bool) -> Outcome {
        let content = content(block, page, stale);
        let (offset, block) = ((page * PAGE) as u64, BlockRef::Named(self.blocks[block].name()));
        let mut bytes = Vec::new();
        if content.iter().all(|byte| *byte == 0) {
            RamRecord::Zero { offset, block }.encode(K4, &mut bytes);
        } else {
            RamRecord::Page { offset, block }.encode(K4, &mut bytes);
            bytes.extend(content);
        }
        self.send(&bytes)
    }

    fn close(&mut self) -> Outcome {
        let mut bytes = Vec::new();
        RamRecord::EndOfSection.encode(K4, &mut bytes);
        bytes.extend(Footer(RAM).to_bytes());
        self.send(&bytes)
    }

    /// The host page of this page, unless it has gone.
    pub(crate) fn host_page(&mut self, block: usize, page: usize) -> Outcome {
        let host = self.blocks[block].host;
        let first = page / host * host;
        if self.sent[block][first] {
            return Ok(());
        }
        self.item(Item::SectionPart(RAM))?;
        for page in first..first + host {
            self.page(block, page, false)?;
            self.sent[block][page] = true;
        }
        self.close()
    }

    /// A page whatever has gone before, with an older content.
    pub(crate) fn stale_page(&mut self, block: usize, page: usize) -> Outcome {
        self.item(Item::SectionPart(RAM))?;
        self.page(block, page, true)?;
        self.close()
    }

    /// Records of RAM as they are, in a section of their own.
    pub(crate) fn records(&mut self, records: &[u8]) -> Outcome {
        self.item(Item::SectionPart(RAM))?;
        self.send(records)?;
        self.close()
    }

    /// Waits for a request: block and first page.
    pub(crate) fn request(&mut self) -> Outcome<(usize, usize)> {
        loop {
            match self.hear()? {
                ReturnMessage::RequestPages { block, offset, len } => {
                    if let Some(name) = block {
                        self.last_asked = self.blocks.iter().position(|block| block.name == name.as_str());
                    }
                    let block = self.last_asked.ok_or_else(|| Failure::new("a request without a block"))?;
                    let page = usize::try_from(offset)? / PAGE;
                    assert_eq!(len as usize, self.blocks[block].host * PAGE, "{offset:#x}");
                    assert!(page.is_multiple_of(self.blocks[block].host), "{offset:#x}");
                    return Ok((block, page));
                }
                ReturnMessage::Pong(_) | ReturnMessage::ResumeAck(_) => {}
                other => return Err(Failure::new(format!("{other:?}, a request was expected"))),
            }
        }
    }

    pub(crate) fn hear(&mut self) -> Outcome<ReturnMessage> {
        loop {
            let parsed =
                ReturnMessage::parse(&self.heard).map_err(|error| Failure::new(error.to_string()))?;
            match parsed {
                None => self.hear_more()?,
                Some((message, used)) => {
                    self.heard.drain(..used);
                    if message != ReturnMessage::SwitchoverAck {
                        return Ok(message);
                    }
                }
            }
        }
    }

    fn hear_more(&mut self) -> Outcome {
        let mut bytes = [0; 4096];
        let read = self.main.read(&mut bytes)?;
        if read == 0 {
            return Err(Failure::new("the destination has ended the connection"));
        }
        self.heard.extend(&bytes[..read]);
        Ok(())
    }

    /// All pages that have not gone, while nothing is heard.
    pub(crate) fn background(&mut self) -> Outcome {
        for block in 0..self.blocks.len() {
            for page in (0..self.blocks[block].pages).step_by(self.blocks[block].host) {
                self.host_page(block, page)?;
            }
        }
        Ok(())
    }

    /// END and EOF, and what the destination says at last.
    pub(crate) fn finish(mut self) -> Outcome {
        self.item(Item::SectionEnd(RAM))?;
        self.close()?;
        self.item(Item::Eof)?;
        loop {
            match self.hear()? {
                ReturnMessage::Shut(0) => return Ok(()),
                ReturnMessage::Shut(status) => return Err(Failure::new(format!("SHUT {status}"))),
                ReturnMessage::RequestPages { .. } | ReturnMessage::Pong(_) => {}
                other => return Err(Failure::new(format!("{other:?}, SHUT was expected"))),
            }
        }
    }

    /// The link breaks, and is made again over another. Gives what the destination says that it
    /// has.
    pub(crate) fn recover(self, main: UnixStream) -> Outcome<Self> {
        let mut next = Self::new(main, &self.blocks)?;
        for block in 0..next.blocks.len() {
            next.command(Command::RecvBitmap(next.blocks[block].name()))?;
            let bitmap = next.bitmap(block)?;
            next.sent[block] =
                (0..next.blocks[block].pages).map(|page| bitmap[page / 8] >> (page % 8) & 1 == 1).collect();
            // What has come has been sent, and what was never sent has not come.
            let invented =
                next.sent[block].iter().zip(&self.sent[block]).position(|(has, sent)| *has && !sent);
            assert_eq!(invented, None, "block {block}");
        }
        next.command(Command::PostcopyResume)?;
        loop {
            match next.hear()? {
                ReturnMessage::ResumeAck(1) => return Ok(next),
                ReturnMessage::RequestPages { .. } => return Err(Failure::new("asked before RESUME")),
                _ => {}
            }
        }
    }

    fn bitmap(&mut self, block: usize) -> Outcome<Vec<u8>> {
        match self.hear()? {
            ReturnMessage::RecvBitmap(name) if name.as_str() == self.blocks[block].name => {}
            other => return Err(Failure::new(format!("{other:?}, a bitmap was expected"))),
        }
        let len = self.blocks[block].pages.div_ceil(64) * 8;
        while self.heard.len() < len + 16 {
            self.hear_more()?;
        }
        let rest = self.heard.split_off(len + 16);
        let whole = std::mem::replace(&mut self.heard, rest);
        assert_eq!(whole[..8], (len as u64).to_be_bytes());
        assert_eq!(whole[8 + len..], 0x0123_4567_89ab_cdef_u64.to_be_bytes());
        Ok(whole[8..8 + len].to_vec())
    }

    /// Closes the link.
    pub(crate) fn cut(&self) -> Outcome {
        Ok(self.main.shutdown(std::net::Shutdown::Both)?)
    }
}

/// Runs of pages that are not `sent`.
fn runs(sent: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in (0..sent.len()).filter(|page| !sent[*page]) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}
