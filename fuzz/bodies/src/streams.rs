//! Streams of legal sources, altered in a few places.

use multifd_engine::Destination;
use multifd_tests::ZeroPages;
use multifd_tests::peer::{Codec, Lane, Memory, Recorder, Recording, Step, Style, SyncPackets, SyncPoints};

use crate::Input;
use crate::destination::{AnyMemory, TIMEOUT, give_back, receive};

/// The guest's blocks and their pages.
const GUEST: [(&str, usize); 2] = [("pc.ram", 24), ("pc.bios", 4)];

/// Alterations at most.
const MAX_CHANGES: usize = 8;

/// Bytes that change.
const CHANGE_LEN: usize = 6;

/// A whole stream of a legal source, with up to eight changes. Without any it is received, and
/// every byte of RAM is the source's. A connection that ends before its part of RAM has come makes
/// a failure.
///
/// Input: three bytes for the source's style (`style`); changes of six bytes each (`Change`).
pub fn streams(input: &[u8]) {
    let mut input = Input(input);
    let style = style([input.u8(), input.u8(), input.u8()]);
    let mut memory = Memory::zero(&GUEST);
    let all = memory.all();
    memory.refill(&all, 5);
    let mut recording = Recorder::migration(style.clone(), &mut memory);
    let changes = input.0.chunks_exact(CHANGE_LEN).take(MAX_CHANGES).map(|bytes| Change::of(Input(bytes)));
    let mut changed = false;
    let mut must_fail = false;
    for change in changes {
        must_fail |= !changed && change.cuts_ram(&recording);
        change.apply(&mut recording);
        changed = true;
    }
    let writes = recording.steps.iter().filter_map(|step| match step {
        Step::Send { lane, bytes, .. } => Some((number(*lane), bytes.as_slice())),
        _ => None,
    });
    let writes: Vec<_> = writes.collect();
    if !changed {
        return arrives(&memory, &style, writes);
    }
    let received = receive(Destination::builder(AnyMemory).timeout(TIMEOUT), writes, false, give_back);
    assert!(!(must_fail && received.is_ok()), "a part of RAM has not come");
}

/// A connection's number, 0 being main.
fn number(lane: Lane) -> usize {
    match lane {
        Lane::Main => 0,
        Lane::Channel(number) => usize::from(number) + 1,
    }
}

/// A guest is received whole.
fn arrives(memory: &Memory, style: &Style, writes: Vec<(usize, &[u8])>) {
    let blocks = memory.provide(0xa5).expect("memory for a small guest");
    let builder = Destination::builder(blocks.clone());
    // Without a description a destination waits a second for more, unless the connection ends.
    let hears = style.return_path && style.description;
    let received = receive(builder, writes, hears, |arrived| {
        memory.check(&blocks).expect("every byte is the source's");
        if hears { arrived.accept().map(drop) } else { give_back(arrived) }
    });
    received.unwrap_or_else(|error| panic!("{style:?} is legal: {}", error.chain()));
}

/// One of the legal ways of a source.
fn style([channels, packets, ends]: [u8; 3]) -> Style {
    let has = |byte: u8, bit: u8| byte >> bit & 1 == 1;
    let per_section = has(packets, 0);
    Style {
        machine: if per_section { "pc-i440fx-7.2" } else { "pc-q35-10.0" },
        channels: channels % 4,
        codec: Codec::ALL.into_iter().nth(usize::from(channels >> 2) % 8).unwrap_or_default(),
        packet_pages: 1 + usize::from(channels >> 5) * 5,
        sync: if per_section { SyncPoints::PerSection } else { SyncPoints::PerRound },
        sync_packets: match packets >> 1 & 3 {
            0 | 1 => SyncPackets::Clean,
            2 => SyncPackets::Stale,
            _ => SyncPackets::WithPages,
        },
        pages_alloc_factor: if has(packets, 3) { 100 } else { 1 },
        full_names: has(packets, 4),
        xbzrle: has(packets, 5),
        stray_flush: has(packets, 6) && !per_section,
        unmatched_sync: false,
        zero_pages: match ends & 3 {
            0 | 1 => ZeroPages::Multifd,
            2 => ZeroPages::Legacy,
            _ => ZeroPages::None,
        },
        return_path: has(ends, 2),
        advise: false,
        switchover_start: has(ends, 3),
        description: !has(ends, 4),
    }
}

/// A change of one write.
struct Change {
    /// Which of the recording's steps, and which byte of it: each modulo their number.
    step: u16,
    at: u16,
    kind: u8,
    value: u8,
}

impl Change {
    fn of(mut input: Input<'_>) -> Self {
        Self { step: input.u16(), at: input.u16(), kind: input.u8() % 9, value: input.u8() }
    }

    fn step(&self, recording: &Recording) -> usize {
        usize::from(self.step) % recording.steps.len().max(1)
    }

    /// Ends a connection before the last of its part of RAM: the SYNC of a channel, the end of
    /// main's section. A channel that never said its number may be one that never was: a source
    /// that has it sees it fail.
    fn cuts_ram(&self, recording: &Recording) -> bool {
        let step = self.step(recording);
        let lane = |step: &Step| if let Step::Send { lane, .. } = step { Some(*lane) } else { None };
        let Some(cut) = recording.steps.get(step).and_then(lane) else { return false };
        let is_ram = |step: &Step| match step {
            Step::Send { lane: Lane::Main, what, .. } => *what == "footer",
            Step::Send { lane, what, .. } => *lane == cut && ["sync", "packet", "payload"].contains(what),
            _ => false,
        };
        let last = recording.steps.iter().rposition(|step| lane(step) == Some(cut) && is_ram(step));
        let is_hello = matches!(recording.steps.get(step), Some(Step::Send { what: "hello", .. }));
        self.kind == 0 && !is_hello && last.is_some_and(|last| step <= last)
    }

    fn apply(&self, recording: &mut Recording) {
        let step = self.step(recording);
        let [next, count] = [step + 1, usize::from(self.value)];
        let Some(Step::Send { lane, bytes, .. }) = recording.steps.get_mut(step) else { return };
        let (lane, at) = (*lane, usize::from(self.at) % bytes.len().max(1));
        let end = bytes.len().min(at + count + 1);
        match self.kind {
            0 => {
                bytes.truncate(at);
                let is_other = |step: &Step| !matches!(step, Step::Send { lane: of, .. } if *of == lane);
                let later = recording.steps.split_off(next);
                recording.steps.extend(later.into_iter().filter(is_other));
            }
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes.get(at..end).unwrap_or_default().to_vec();
                bytes.splice(at..at, piece).for_each(drop);
            }
            3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = self.value),
            4 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (self.value % 8)),
            5 => self.overwrite_field(bytes, at),
            6 => drop(recording.steps.remove(step)),
            7 => {
                let twin = recording.steps.get(step).cloned();
                recording.steps.splice(next..next, twin).for_each(drop);
            }
            _ => {
                let other = (step + count) % recording.steps.len();
                recording.steps.swap(step, other);
            }
        }
    }

    /// A number in a header, with a value that has to be told from others.
    fn overwrite_field(&self, bytes: &mut [u8], at: usize) {
        const VALUES: [u32; 12] =
            [0, 1, 0x7f, 0x80, 0xff, 127, 128, 129, 0x1000, 1 << 20, u32::MAX >> 1, u32::MAX];
        let value = VALUES.into_iter().cycle().nth(self.value.into()).unwrap_or_default();
        let field = bytes.iter_mut().skip(at - at % 4);
        field.zip(value.to_be_bytes()).for_each(|(to, from)| *to = from);
    }
}
