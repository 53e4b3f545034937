//! Cuts what goes over a connection into its messages, as it goes.

use multifd_wire::{InitialPacket, MULTIFD_MAGIC, PageSize, ReturnMessage, StreamHeader, header_len};

use super::packets::field;
use super::reading::{Reading, Stage};

/// Bytes in a piece of device state, which has messages that only devices know.
const PIECE: usize = 200;

/// A record's type, version and length (RFC 8446, 5.1).
const RECORD_HEADER: usize = 5;

/// One direction of a connection.
#[derive(Debug)]
pub struct Messages {
    format: Format,
    /// Bytes of messages that are not whole yet.
    rest: Vec<u8>,
}

#[derive(Debug)]
enum Format {
    /// A source's, of which too little has come.
    Source,
    Main(Reading),
    Channel {
        hello: bool,
    },
    Return,
    /// TLS.
    Records,
    /// Not what it should be: passed on as it comes.
    Broken,
}

impl Messages {
    /// What a source sends.
    pub fn of_source() -> Self {
        Self { format: Format::Source, rest: Vec::new() }
    }

    /// What a destination sends.
    pub fn of_destination() -> Self {
        Self { format: Format::Return, rest: Vec::new() }
    }

    /// Either, under TLS.
    pub fn encrypted() -> Self {
        Self { format: Format::Records, rest: Vec::new() }
    }

    /// Whether it is main; `None` where that cannot be seen, or not yet.
    pub fn is_main(&self) -> Option<bool> {
        match self.format {
            Format::Main(_) => Some(true),
            Format::Channel { .. } => Some(false),
            Format::Source | Format::Return | Format::Records | Format::Broken => None,
        }
    }

    /// How far main has come.
    pub fn stage(&self) -> Stage {
        match &self.format {
            Format::Main(reading) => reading.stage(),
            _ => Stage::Nothing,
        }
    }

    /// Takes the next bytes; gives the messages that are whole now.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.rest.extend_from_slice(bytes);
        if matches!(self.format, Format::Source) {
            self.format = match self.rest.first_chunk() {
                Some(magic) if *magic == MULTIFD_MAGIC.to_be_bytes() => Format::Channel { hello: true },
                Some(magic) if magic.as_slice() == start_of_main() => {
                    let lens = Reading::default();
                    self.format = Format::Main(lens);
                    return self.of_main(&self.rest.clone());
                }
                Some(_) => Format::Broken,
                None => return Vec::new(),
            };
        }
        match self.format {
            Format::Main(_) => self.of_main(bytes),
            _ => std::iter::from_fn(|| self.next()).collect(),
        }
    }

    fn of_main(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let Format::Main(reading) = &mut self.format else { return Vec::new() };
        let Ok(lens) = reading.push_cutting(bytes) else {
            self.format = Format::Broken;
            return self.next().into_iter().collect();
        };
        let devices = reading.stage() >= Stage::RamSent;
        let messages = lens.into_iter().flat_map(|len| {
            let message: Vec<u8> = self.rest.drain(..len).collect();
            let piece = if devices { PIECE } else { len };
            message.chunks(piece).map(<[u8]>::to_vec).collect::<Vec<_>>()
        });
        messages.collect()
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let be16 = |at: usize| Some(usize::from(u16::from_be_bytes(*self.rest.get(at..)?.first_chunk()?)));
        let be32 = |at: usize| usize::try_from(u32::from_be_bytes(*self.rest.get(at..)?.first_chunk()?)).ok();
        let len = match self.format {
            Format::Channel { hello: true } => InitialPacket::LEN,
            Format::Channel { hello: false } => header_len(PageSize::K4) + be32(field::PAYLOAD_LEN)?,
            Format::Records => RECORD_HEADER + be16(3)?,
            Format::Return => match ReturnMessage::parse(&self.rest) {
                Ok(whole) => whole?.1,
                Err(_) => self.rest.len(),
            },
            Format::Source | Format::Main(_) | Format::Broken => self.rest.len(),
        };
        if len == 0 || self.rest.len() < len {
            return None;
        }
        if let Format::Channel { hello } = &mut self.format {
            *hello = false;
        }
        Some(self.rest.drain(..len).collect())
    }
}

fn start_of_main() -> Vec<u8> {
    let mut header = Vec::new();
    StreamHeader.encode(&mut header);
    header.truncate(4);
    header
}

#[cfg(test)]
mod tests {
    use super::super::{Lane, Memory, Recorder, Style};
    use super::*;

    #[test]
    fn messages_are_the_bytes_whatever_pieces_they_come_in() {
        let recording = Recorder::migration(Style::multifd(2), &mut Memory::small(1));
        for lane in [Lane::Main, Lane::Channel(0), Lane::Channel(1)] {
            let bytes = recording.bytes(lane);
            for piece in [1, 7, 4096, bytes.len()] {
                let mut messages = Messages::of_source();
                let cut: Vec<_> = bytes.chunks(piece).flat_map(|piece| messages.push(piece)).collect();
                assert_eq!(cut.concat(), bytes, "{lane:?} in pieces of {piece}");
                assert_eq!(messages.is_main(), Some(lane == Lane::Main));
                assert!(cut.len() > 10, "{} messages", cut.len());
            }
        }
        let mut main = Messages::of_source();
        main.push(&recording.bytes(Lane::Main));
        assert_eq!(main.stage(), Stage::Finished);
    }

    #[test]
    fn answers_and_records_are_cut_by_their_lengths() {
        let mut answers = Vec::new();
        ReturnMessage::Pong(1).encode(&mut answers);
        ReturnMessage::Shut(0).encode(&mut answers);
        assert_eq!(Messages::of_destination().push(&answers).len(), 2);
        let records = [&[22, 3, 3, 0, 2, 7, 7][..], &[23, 3, 3, 0, 1, 9]].concat();
        assert_eq!(Messages::encrypted().push(&records).len(), 2);
        assert!(Messages::encrypted().push(&records[..6]).is_empty());
    }

    #[test]
    fn what_is_no_migration_is_passed_on() {
        assert_eq!(Messages::of_source().push(b"GET / HTTP"), [b"GET / HTTP".to_vec()]);
    }
}
