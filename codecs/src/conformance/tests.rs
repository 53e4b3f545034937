//! The suite is only as good as the faults that it finds: for each of its checks there are codecs
//! that are wrong in one way, which only that check finds, so that no check can go, or look away in
//! part, without a test that says so.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::*;
use crate::codec::CodecId;
use crate::error::{CodecError, EncodeFailed};

/// What a copying codec does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// A name for people has no capital, and is there.
    Capital,
    Nameless,
    DescribesAnother,
    /// In all it does.
    ChangesPages,
    Fails,
    GoesOn,
    NoDecoder,
    NoEncoder,
    OverwritesOut,
    SkipsExcess,
    SkipsLack,
    WritesNothing,
    /// At batches without a page, the first or the second of a channel.
    PayloadForNothing,
    PayloadForNothingAgain,
    /// At a first packet of many pages.
    Padded,
    /// At a packet that is not among the first of its channel.
    Tires,
    /// At pages that are like earlier ones of their channel.
    MistakesTheRepeated,
    /// At a packet behind another channel's.
    SharesHistory,
    /// At other numbers of pages than were sent, if the channel is new or old.
    TakesFewerPages,
    TakesMorePages,
    TakesMorePagesLater,
    TakesFewerBytes,
    TakesMoreBytes,
    /// At payloads of another length than was sent.
    TakesNoPayload,
    TakesCutHead,
    TakesCutEnd,
    TakesCutMiddle,
    TakesPadding(u8),
    /// After bytes that are not those that were sent.
    GoesOnAfterDamage(Part),
    PanicsAtDamage(Part),
}

/// Where a payload is damaged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    Head,
    Middle,
    End,
}

impl Part {
    /// The bytes of a payload that belong to it.
    fn of(self, pages: &[u8]) -> &[u8] {
        let (head, rest) = pages.split_at(pages.len().min(40));
        let (middle, end) = rest.split_at(rest.len().saturating_sub(2));
        match self {
            Self::Head => head,
            Self::Middle => middle,
            Self::End => end,
        }
    }
}

#[derive(Debug)]
struct Faulty {
    fault: Fault,
    /// What the channels share, though they must not.
    last_byte: Arc<Mutex<u8>>,
}

impl Faulty {
    fn new(fault: Fault) -> Self {
        Self { fault, last_byte: Arc::default() }
    }

    fn half(&self) -> Half {
        *self.last_byte.lock().unwrap() = 0;
        let (seen, last_byte) = (HashMap::new(), Arc::clone(&self.last_byte));
        Half { fault: self.fault, dead: false, packets: 0, seen, last_byte, own_last_byte: 0 }
    }
}

impl Codec for Faulty {
    fn id(&self) -> CodecId {
        CodecId::new(0x3e).unwrap()
    }

    fn name(&self) -> &str {
        match self.fault {
            Fault::Capital => "Copy",
            Fault::Nameless => "",
            _ => "copy",
        }
    }

    fn describe(&self) -> String {
        if self.fault == Fault::DescribesAnother { "move".to_owned() } else { self.name().to_owned() }
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        if self.fault == Fault::NoEncoder {
            return Err(CodecError::encoder("copy", "none left"));
        }
        Ok(Box::new(self.half()))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        if self.fault == Fault::NoDecoder {
            return Err(CodecError::decoder("copy", "none left"));
        }
        Ok(Box::new(self.half()))
    }
}

/// An encoder or a decoder. The payload is the pages, and behind them two bytes that are their sum
/// and one that is the sum of these: damage is told from damage of the sum.
struct Half {
    fault: Fault,
    dead: bool,
    packets: usize,
    /// Batches, and in which packet they were.
    seen: HashMap<Vec<u8>, usize>,
    last_byte: Arc<Mutex<u8>>,
    own_last_byte: u8,
}

/// Bytes of a payload that are no pages.
const SUMS: usize = 6;

/// The sums of the three parts, each twice: if the two differ then the sum is damaged.
fn sums(pages: &[u8]) -> [u8; SUMS] {
    let sum = |part: Part| part.of(pages).iter().fold(0_u8, |sum, byte| sum.rotate_left(1) ^ byte);
    let (head, middle, end) = (sum(Part::Head), sum(Part::Middle), sum(Part::End));
    [head, middle, end, head, middle, end]
}

impl Encoder for Half {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        let packet = self.packets;
        self.packets += 1;
        match self.fault {
            Fault::Fails => return Err(EncodeFailed::library("no mood")),
            Fault::OverwritesOut => out.clear(),
            Fault::Padded if pages.len() == MAX_BATCH_LEN => out.resize(2 << 20, 0),
            Fault::PayloadForNothing if pages.is_empty() => out.push(0),
            Fault::PayloadForNothingAgain if pages.is_empty() && packet > 0 => out.push(0),
            _ => {}
        }
        if pages.is_empty() {
            return Ok(());
        }
        let mut pages = pages.to_vec();
        let earlier = self.seen.insert(pages.clone(), packet);
        let wrong = match self.fault {
            Fault::Tires => packet > 150,
            Fault::MistakesTheRepeated => earlier.is_some_and(|earlier| packet - earlier > 10),
            _ => false,
        };
        if wrong {
            pages[0] ^= 1;
        }
        let last = pages[pages.len() - 1];
        if self.fault == Fault::SharesHistory {
            pages[0] ^= std::mem::replace(&mut *self.last_byte.lock().unwrap(), last);
        }
        out.extend_from_slice(&pages);
        out.extend_from_slice(&sums(&pages));
        Ok(())
    }
}

impl Half {
    /// The pages of `payload` for `expected` bytes of pages, by the rules and by the fault.
    fn unpack<'a>(&self, payload: &'a [u8], expected: usize) -> Result<&'a [u8], DecodeFailed> {
        if payload.is_empty() && (expected == 0 || self.fault == Fault::TakesNoPayload) {
            return Ok(payload);
        }
        let (pages, found) = payload.split_at(payload.len().saturating_sub(SUMS));
        let produced = pages.len();
        let whole = |bytes: usize| bytes > 0 && bytes.is_multiple_of(PAGE_LEN);
        let taken = match self.fault {
            _ if produced == expected => true,
            Fault::SkipsExcess => produced > expected,
            Fault::SkipsLack => produced < expected,
            Fault::TakesFewerPages => whole(produced) && whole(expected) && produced > expected,
            Fault::TakesMorePages => whole(produced) && whole(expected) && produced < expected,
            Fault::TakesMorePagesLater => {
                self.packets > 2 && whole(produced) && whole(expected) && produced < expected
            }
            Fault::TakesFewerBytes => produced == expected + 1 && !whole(expected),
            Fault::TakesMoreBytes => produced + 1 == expected && !whole(expected),
            Fault::TakesCutHead => (1..20).contains(&payload.len()),
            Fault::TakesCutEnd => produced + 5 == expected && whole(expected),
            Fault::TakesCutMiddle => (100..2000).contains(&produced) && whole(expected),
            Fault::TakesPadding(with) => {
                produced == expected + 1 && whole(expected) && payload.ends_with(&[with])
            }
            _ => false,
        };
        match taken {
            true if produced != expected => Ok(pages),
            true => self.check_sums(pages, found).map(|()| pages),
            false if produced < expected => Err(DecodeFailed::TooShort { produced, expected }),
            false => Err(DecodeFailed::TooLong { expected }),
        }
    }

    fn check_sums(&self, pages: &[u8], found: &[u8]) -> Result<(), DecodeFailed> {
        let expected = sums(pages);
        if found == expected {
            return Ok(());
        }
        if found[..3] != found[3..] {
            return Err(DecodeFailed::corrupt("a sum is damaged"));
        }
        let parts = [Part::Head, Part::Middle, Part::End].into_iter().enumerate();
        for (_, part) in parts.filter(|(at, _)| found[*at] != expected[*at]) {
            assert!(self.fault != Fault::PanicsAtDamage(part), "damage in the {part:?}");
        }
        Err(DecodeFailed::corrupt("the pages are damaged"))
    }

    fn goes_on_after(&self, payload: &[u8]) -> bool {
        match self.fault {
            Fault::GoesOn => true,
            Fault::GoesOnAfterDamage(part) => {
                let (pages, found) = payload.split_at(payload.len().saturating_sub(SUMS));
                let at = part as usize;
                found.len() == SUMS
                    && pages.len().is_multiple_of(PAGE_LEN)
                    && found[..3] == found[3..]
                    && sums(pages)[at] != found[at]
            }
            _ => false,
        }
    }
}

impl Decoder for Half {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        self.packets += 1;
        let sent = match self.unpack(payload, pages.len()) {
            Ok(sent) => sent,
            Err(error) => {
                self.dead = !self.goes_on_after(payload);
                return Err(error);
            }
        };
        if self.fault != Fault::WritesNothing {
            pages.iter_mut().zip(sent).for_each(|(page, byte)| *page = *byte);
        }
        let Some(last) = sent.last() else { return Ok(()) };
        match self.fault {
            Fault::ChangesPages => pages[pages.len() - 1] ^= 1,
            Fault::SharesHistory => pages[0] ^= std::mem::replace(&mut self.own_last_byte, *last),
            _ => {}
        }
        Ok(())
    }
}

/// The complaint of a check about a codec with this fault.
fn complaint(check: Check, fault: Fault) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| check(&Faulty::new(fault)))).err()?;
    Some(match panic.downcast::<String>() {
        Ok(formatted) => *formatted,
        Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
    })
}

#[test]
fn a_codec_without_fault_passes() {
    check(&Faulty::new(Fault::None));
}

#[test]
fn every_fault_is_found_and_named() {
    for (fault, text) in [
        (Fault::ChangesPages, "one page after no pages: the pages came back changed"),
        (Fault::Fails, "prepare() of 0 bytes failed"),
        (Fault::GoesOn, "3 pages of Counters taken for 0: the decoder went on after its error"),
        (Fault::NoDecoder, "decoder() failed"),
        (Fault::NoEncoder, "encoder() failed"),
        (Fault::OverwritesOut, "prepare() touched what was in `out` before"),
        (Fault::SkipsExcess, "3 pages of Counters taken for 0: accepted, expected an error"),
        (Fault::SkipsLack, "3 pages of Counters taken for 4: accepted, expected an error"),
        (Fault::WritesNothing, "one page after no pages: the pages came back changed"),
    ] {
        let complaint = complaint(check, fault).unwrap_or_else(|| panic!("{fault:?} is not found"));
        assert!(complaint.contains(text), "{fault:?}: {complaint}");
    }
}

/// Fault, the one check that finds it, and what it says.
const FOUND_BY_ONE: [(Fault, &str, &str); 25] = [
    (Fault::Capital, "names_are_for_people", "name \"Copy\": expected lower case and no spaces"),
    (Fault::Nameless, "names_are_for_people", "name \"\": expected lower case and no spaces"),
    (Fault::DescribesAnother, "names_are_for_people", "description \"move\": expected \"copy\" at its start"),
    (Fault::PayloadForNothing, "no_pages_need_no_payload", "no pages gave a payload of 1 bytes"),
    (Fault::PayloadForNothingAgain, "no_pages_need_no_payload", "no pages gave a payload of 1 bytes"),
    (Fault::Padded, "every_batch_comes_back", "limit is 1048576"),
    (Fault::Tires, "streams_are_long", "packet 151, 11 pages of Zero: the pages came back changed"),
    (Fault::MistakesTheRepeated, "streams_are_long", "the pages came back changed"),
    (Fault::SharesHistory, "channels_are_independent", "three channels in turn: the pages came back changed"),
    (Fault::TakesFewerPages, "wrong_page_counts_are_refused", "3 pages of Counters taken for 1: accepted"),
    (Fault::TakesMorePages, "wrong_page_counts_are_refused", "3 pages of Counters taken for 4: accepted"),
    (
        Fault::TakesMorePagesLater,
        "wrong_page_counts_are_refused",
        "3 pages of Counters taken for 4: accepted",
    ),
    (Fault::TakesFewerBytes, "wrong_page_counts_are_refused", "taken for 12287 bytes: accepted"),
    (Fault::TakesMoreBytes, "wrong_page_counts_are_refused", "taken for 12289 bytes: accepted"),
    (Fault::TakesNoPayload, "wrong_lengths_are_refused", "first 0 of 8198 payload bytes"),
    (Fault::TakesCutHead, "wrong_lengths_are_refused", "first 1 of 8198 payload bytes"),
    (Fault::TakesCutEnd, "wrong_lengths_are_refused", "first 8193 of 8198 payload bytes"),
    (Fault::TakesCutMiddle, "wrong_lengths_are_refused", "first 509 of 8198 payload bytes"),
    (Fault::TakesPadding(0x00), "wrong_lengths_are_refused", "payload with 0x00 after its end"),
    (Fault::TakesPadding(0xff), "wrong_lengths_are_refused", "payload with 0xff after its end"),
    (Fault::GoesOnAfterDamage(Part::Head), "damage_is_contained", "byte 0 flipped: the decoder went on"),
    (Fault::GoesOnAfterDamage(Part::Middle), "damage_is_contained", "byte 40 flipped: the decoder went on"),
    (Fault::GoesOnAfterDamage(Part::End), "damage_is_contained", "byte 8190 flipped: the decoder went on"),
    (Fault::PanicsAtDamage(Part::Head), "damage_is_contained", "damage in the Head"),
    (Fault::PanicsAtDamage(Part::End), "damage_is_contained", "damage in the End"),
];

#[test]
fn each_check_finds_what_no_other_check_finds() {
    for (fault, finder, text) in FOUND_BY_ONE {
        let whole = complaint(check, fault).unwrap_or_else(|| panic!("{fault:?} is not found"));
        assert!(whole.contains(text), "{fault:?}: {whole}");
        for (name, check) in CHECKS {
            let found = complaint(check, fault);
            assert_eq!(found.is_some(), name == finder, "{fault:?} by {name}: {found:?}");
        }
    }
    for (name, _) in CHECKS {
        assert!(FOUND_BY_ONE.iter().any(|(_, finder, _)| *finder == name), "no fault for {name}");
    }
}

#[test]
fn a_byte_written_before_or_behind_the_pages_is_seen() {
    for len in [0, 1, 4096] {
        let mut memory = Guarded::new(len);
        assert_eq!(memory.pages(), vec![0x5a; len]);
        memory.pages().fill(0);
        assert!(memory.is_whole());
        for at in
            [0, Guarded::GUARD.len() - 1, Guarded::GUARD.len() + len, 2 * Guarded::GUARD.len() + len - 1]
        {
            let mut memory = Guarded::new(len);
            memory.memory[at] = 0;
            assert!(!memory.is_whole(), "byte {at} around {len} bytes");
        }
    }
}
