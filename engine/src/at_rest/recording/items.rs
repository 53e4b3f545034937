//! The items of a stream: RAM's are left to the caller, all others are read here.

use std::collections::HashMap;

use multifd_wire::{Command, Footer, Item, RAM_SECTION, SectionHead, SectionId};

use super::description::{self, Described};
use super::devices::{self, Devices, Layouts, RecordedSection, SectionContent};
use super::file::FileReader;
use super::invalid;
use super::opaque::{self, Known};
use crate::error::{Error, Phase, Result};

pub(super) struct Items<'f> {
    pub(super) reader: FileReader<'f>,
    ram: Option<SectionId>,
    sections: Vec<RecordedSection>,
    /// Of each number in `sections` the place of its live section, if it has one: a file may have a
    /// great many sections and pieces.
    places: HashMap<SectionId, Option<usize>>,
    layouts: Layouts,
    /// Bytes of payloads in `sections`.
    kept: usize,
    described: Option<Described>,
    trailing_bytes: u64,
}

/// What comes next that is not read here.
pub(super) enum Next {
    /// The RAM section begins: the list of blocks follows.
    RamStart(SectionHead),
    /// A further piece of RAM: records follow.
    RamPiece,
    /// The stream is over, and read to its end.
    End,
}

impl<'f> Items<'f> {
    /// Goes on where `reader` is. `ram` is the section that has begun, `sections` those that came
    /// before.
    pub(super) fn new(
        reader: FileReader<'f>,
        described: Option<Described>,
        ram: Option<SectionId>,
        sections: Vec<RecordedSection>,
    ) -> Self {
        let lens =
            sections.iter().map(|section| usize::try_from(section.payload_len()).unwrap_or(usize::MAX));
        let kept = lens.fold(0, usize::saturating_add);
        let layouts = described.as_ref().map(|all| Layouts::of(&all.description)).unwrap_or_default();
        let mut items = Self {
            reader,
            ram,
            sections: Vec::new(),
            places: HashMap::new(),
            layouts,
            kept,
            described,
            trailing_bytes: 0,
        };
        sections.into_iter().for_each(|section| items.push(section));
        items
    }

    fn push(&mut self, section: RecordedSection) {
        let live = matches!(section.content, SectionContent::Live(_)).then_some(self.sections.len());
        let place = self.places.entry(section.head.id).or_default();
        *place = place.or(live);
        self.sections.push(section);
    }

    pub(super) fn into_parts(self) -> (FileReader<'f>, Vec<RecordedSection>) {
        (self.reader, self.sections)
    }

    pub(super) fn into_devices(self) -> Devices {
        let Self { sections, described, trailing_bytes, .. } = self;
        let description = described.map(|described| described.description);
        Devices::new(sections, description, trailing_bytes)
    }

    /// Reads up to the next piece of RAM, or to the end.
    pub(super) fn next(&mut self) -> Result<Next> {
        loop {
            let position = self.reader.position();
            match self.reader.next(Phase::Active, "an item of the stream", Item::parse)? {
                Item::Command(command) => check_command(&command, position)?,
                Item::Eof => return self.end().map(|()| Next::End),
                Item::SectionFull(head) => self.device(head)?,
                Item::SectionStart(head) if head.idstr == RAM_SECTION => match self.ram {
                    None => return Ok(Next::RamStart(head)),
                    Some(_) => {
                        return Err(invalid(
                            Phase::Active,
                            format!("a second RAM section at byte {position}"),
                        ));
                    }
                },
                Item::SectionStart(head) => {
                    let index = self.sections.len();
                    self.push(RecordedSection { head, content: SectionContent::Live(0) });
                    self.live(index)?;
                }
                Item::SectionPart(id) | Item::SectionEnd(id) if Some(id) == self.ram => {
                    return Ok(Next::RamPiece);
                }
                Item::SectionPart(id) | Item::SectionEnd(id) => {
                    let begun = self.places.get(&id).copied().flatten();
                    let index = begun.ok_or_else(|| {
                        invalid(
                            Phase::Active,
                            format!("a piece of section {id} at byte {position}, it never began"),
                        )
                    })?;
                    self.live(index)?;
                }
            }
        }
    }

    /// The footer of a piece of RAM.
    pub(super) fn ram_footer(&mut self) -> Result<()> {
        let position = self.reader.position();
        match self.reader.next(Phase::Active, "the footer of a piece of RAM", Footer::parse)? {
            Footer(id) if Some(id) == self.ram => Ok(()),
            Footer(id) => Err(invalid(
                Phase::Active,
                format!("the footer at byte {position} is of section {id}, RAM was expected"),
            )),
        }
    }

    fn device(&mut self, head: SectionHead) -> Result<()> {
        let described = self.described.as_ref();
        let layouts = &self.layouts;
        let len = described.and_then(|all| layouts.find(&all.description, &head)?.payload_len());
        let known = Known { ram: self.ram, places: &self.places };
        let (mut payload, kept) = (Vec::new(), &mut self.kept);
        let keep = |bytes: &[u8]| devices::keep(&mut payload, kept, bytes);
        opaque::payload(&mut self.reader, &head, len, &known, keep)?;
        self.push(RecordedSection { head, content: SectionContent::Device(payload) });
        Ok(())
    }

    /// A piece of the live section at `index`.
    fn live(&mut self, index: usize) -> Result<()> {
        let section = self.sections.get(index);
        let section =
            section.ok_or_else(|| Error::bug(Phase::Active, format_args!("section {index} of a file")))?;
        let head = section.head.clone();
        let known = Known { ram: self.ram, places: &self.places };
        let mut len = 0;
        let count = |bytes: &[u8]| {
            len += bytes.len() as u64;
            Ok(())
        };
        opaque::payload(&mut self.reader, &head, None, &known, count)?;
        if let Some(RecordedSection { content: SectionContent::Live(total), .. }) =
            self.sections.get_mut(index)
        {
            *total += len;
        }
        Ok(())
    }

    /// After the EOF byte: the description, if there is one, and nothing more.
    fn end(&mut self) -> Result<()> {
        let (file, position) = (*self.reader.source(), self.reader.position());
        if self.described.as_ref().is_none_or(|described| described.start != position) {
            self.described = description::at(file, position)?;
        }
        let end = self.described.as_ref().map_or(position, |described| described.end);
        self.trailing_bytes = file.len().saturating_sub(end);
        Ok(())
    }
}

/// Lets pass commands that mean nothing to a reader of a file.
fn check_command(command: &Command, position: u64) -> Result<()> {
    match command {
        Command::OpenReturnPath
        | Command::Ping(_)
        | Command::PostcopyAdvise(_)
        | Command::SwitchoverStart => Ok(()),
        other => {
            let detail =
                format!("{other:?} at byte {position}: a stream with postcopy or COLO cannot be read");
            Err(Error::incompatible(Phase::Active, detail))
        }
    }
}
