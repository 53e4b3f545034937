//! Writes a source's script: the stream of main, piece by piece. What goes on the channels is in
//! `packets.rs`.

use multifd_wire::{
    Advise, BlockRef, Command, Configuration, Footer, Item, PageSize, RamRecord, SectionHead, SectionId,
    StreamHeader,
};

use super::codec::xbzrle;
use super::packets::Packets;
use super::{Ending, Lane, Memory, PAGE, PageAt, Recording, Step, Style, SyncPoints, devices};
use crate::ZeroPages;

const K4: PageSize = PageSize::K4;

/// The number of the RAM section. Any will do; QEMU's is 1 on most machines.
const RAM: SectionId = SectionId(7);

/// Makes a [`Recording`], one call for each thing that a source does.
pub struct Recorder {
    style: Style,
    steps: Vec<Step>,
    packets: Packets,
    /// What the destination has of each page by now.
    sent: Option<Memory>,
    /// The block that CONTINUE refers to.
    last_block: Option<usize>,
}

impl Recorder {
    /// Nothing but the channels' hellos.
    pub fn new(style: Style) -> Self {
        let mut steps = Vec::new();
        let packets = Packets::new(&style, &mut steps);
        Self { style, steps, packets, sent: None, last_block: None }
    }

    /// The whole stream for a guest that writes its memory while it moves: all pages, two further
    /// rounds, the end. `memory` is what the destination must have then.
    pub fn migration(style: Style, memory: &mut Memory) -> Recording {
        let mut recorder = Self::new(style);
        recorder.setup(memory);
        let all = memory.all();
        recorder.part(memory, &all);
        let some = memory.every(3, 1);
        memory.refill(&some, 1001);
        recorder.part(memory, &some);
        let others = memory.every(7, 2);
        memory.touch(&others, 1);
        recorder.part(memory, &others);
        let last = memory.every(5, 3);
        memory.refill(&last, 1002);
        recorder.end(memory, &last);
        recorder.finish()
    }

    /// From the stream header to START.
    pub fn setup(&mut self, memory: &Memory) {
        self.header();
        self.start(memory);
    }

    /// Stream header, configuration, and the commands that come before any section.
    pub fn header(&mut self) {
        let mut header = Vec::new();
        StreamHeader.encode(&mut header);
        self.main("header", header);
        let (machine, capabilities) = (self.style.machine.to_owned(), Vec::new());
        let mut configuration = Vec::new();
        Configuration::new(machine).with_capabilities(capabilities).encode(&mut configuration);
        self.main("configuration", configuration);
        if self.style.return_path {
            self.command(Command::OpenReturnPath);
            self.command(Command::Ping(1));
        }
        if self.style.advise {
            let page = K4.bytes_u64();
            self.command(Command::PostcopyAdvise(Some(Advise { page_sizes: page, target_page: page })));
        }
    }

    /// START of the RAM section: the list of blocks and the first sync point.
    pub fn start(&mut self, memory: &Memory) {
        let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
        self.item("start", Item::SectionStart(head));
        self.record("total", RamRecord::MemSize { total: memory.total() });
        for entry in memory.list() {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            self.main("block", bytes);
        }
        self.sync_point();
        self.close();
        self.sent = Some(memory.clone());
    }

    /// One PART with these pages and a sync point: a round.
    pub fn part(&mut self, memory: &Memory, pages: &[PageAt]) {
        self.item("part", Item::SectionPart(RAM));
        self.pages(memory, pages);
        self.sync_point();
        self.close();
    }

    /// A PART with nothing in it.
    pub fn empty_part(&mut self) {
        self.item("part", Item::SectionPart(RAM));
        self.close();
    }

    /// A PART with these rounds in it.
    pub fn rounds(&mut self, rounds: &[(Memory, Vec<PageAt>)]) {
        self.item("part", Item::SectionPart(RAM));
        for (memory, pages) in rounds {
            self.pages(memory, pages);
            self.sync_point();
        }
        self.close();
    }

    /// END of the RAM section, with the last pages and a sync point.
    pub fn end(&mut self, memory: &Memory, pages: &[PageAt]) {
        if self.style.switchover_start {
            self.command(Command::SwitchoverStart);
        }
        self.item("end", Item::SectionEnd(RAM));
        self.pages(memory, pages);
        self.sync_point();
        self.close();
        if self.style.unmatched_sync {
            self.packets.sync(&mut self.steps);
        }
    }

    /// Pages, wherever they go in this style.
    pub fn pages(&mut self, memory: &Memory, pages: &[PageAt]) {
        if self.style.channels == 0 {
            for at in pages {
                self.page_on_main(memory, *at);
            }
            return;
        }
        let zero = |at: &PageAt| memory.page(*at).iter().all(|byte| *byte == 0);
        match self.style.zero_pages {
            ZeroPages::Legacy => {
                let (zero, data): (Vec<_>, Vec<_>) = pages.iter().copied().partition(zero);
                zero.into_iter().for_each(|at| self.zero_page(memory, at));
                self.packets.pages(memory, &data, &|_| false, &mut self.steps);
            }
            ZeroPages::Multifd => self.packets.pages(memory, pages, &zero, &mut self.steps),
            ZeroPages::None => self.packets.pages(memory, pages, &|_| false, &mut self.steps),
        }
    }

    /// SYNC on every channel and FLUSH on main; nothing in a style where ends of sections are sync
    /// points.
    pub fn sync_point(&mut self) {
        let per_round = self.style.sync == SyncPoints::PerRound;
        if per_round && self.style.channels > 0 {
            self.packets.sync(&mut self.steps);
        }
        if per_round && self.style.channels > 0 || self.style.stray_flush {
            self.record("flush", RamRecord::Flush);
        }
    }

    /// Ends the piece of the RAM section that is open.
    pub fn close(&mut self) {
        if self.style.sync == SyncPoints::PerSection {
            self.packets.sync(&mut self.steps);
        }
        self.record("end of section", RamRecord::EndOfSection);
        self.main("footer", Footer(RAM).to_bytes().to_vec());
    }

    /// Opaque state of a device, on a channel.
    pub fn device_packet(&mut self, channel: u8, idstr: &str, data: &[u8]) {
        self.packets.device_state(channel, idstr, data, &mut self.steps);
    }

    /// Device sections and the end of the stream.
    pub fn finish(mut self) -> Recording {
        self.main("devices", devices::sections());
        self.main("eof", vec![0]);
        if self.style.description {
            self.main("description", devices::description());
        }
        self.recording()
    }

    /// The script as it stands.
    pub fn recording(self) -> Recording {
        let ending = if self.style.return_path { Ending::Wait } else { Ending::HangUp };
        Recording { steps: self.steps, ending }
    }

    /// A zero page, on main.
    pub fn zero_page(&mut self, memory: &Memory, at: PageAt) {
        let block = self.refer(memory, at.block);
        self.record("zero page", RamRecord::Zero { offset: at.offset(), block });
        self.note(at, &[0; PAGE]);
    }

    /// A command, on main.
    pub fn command(&mut self, command: Command) {
        self.item("command", Item::Command(command));
    }

    /// Bytes on main, called `what`.
    pub fn main(&mut self, what: &'static str, bytes: Vec<u8>) {
        self.steps.push(Step::Send { lane: Lane::Main, what, bytes });
    }

    fn page_on_main(&mut self, memory: &Memory, at: PageAt) {
        let content = memory.page(at);
        let old = self.sent.as_ref().filter(|_| self.style.xbzrle).map(|sent| sent.page(at));
        let delta = old.map(|old| xbzrle(old, content));
        if self.style.zero_pages != ZeroPages::None && content.iter().all(|byte| *byte == 0) {
            return self.zero_page(memory, at);
        }
        let offset = at.offset();
        match delta {
            Some(Some(delta)) if delta.len() <= PAGE => {
                let block = self.refer(memory, at.block);
                let len = u16::try_from(delta.len()).expect("no longer than a page");
                self.record("delta", RamRecord::Xbzrle { offset, block, len });
                self.main("difference", delta);
            }
            _ => {
                let block = self.refer(memory, at.block);
                self.record("page", RamRecord::Page { offset, block });
                self.main("content", content.to_vec());
            }
        }
        self.note(at, content);
    }

    fn note(&mut self, at: PageAt, content: &[u8]) {
        if let Some(sent) = &mut self.sent {
            sent.set(at, content);
        }
    }

    fn refer(&mut self, memory: &Memory, block: usize) -> BlockRef {
        let known = self.last_block.replace(block) == Some(block);
        if known && !self.style.full_names {
            BlockRef::Same
        } else {
            BlockRef::Named(memory.name(block).clone())
        }
    }

    fn item(&mut self, what: &'static str, item: Item) {
        let mut bytes = Vec::new();
        item.encode(&mut bytes);
        self.main(what, bytes);
    }

    fn record(&mut self, what: &'static str, record: RamRecord) {
        let mut bytes = Vec::new();
        record.encode(K4, &mut bytes);
        self.main(what, bytes);
    }
}
