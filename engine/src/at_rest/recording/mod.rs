//! A guest at rest: a stream that QEMU wrote to a file, or a checkpoint, read page by page.
//!
//! ```text
//!  Recording::open      header, configuration, list of RAM blocks; the description at the file's end   (description.rs)
//!    -> RecordedPages   mapped-ram: the stored pages, by the bitmaps                                   (mapped.rs)
//!                       the records of the RAM section, in the order of the stream                     (pages.rs)
//!                       between them commands and other sections                                       (items.rs)
//!    -> Devices         the device sections, and the description of their fields                       (devices.rs)
//!
//!  Checkpoint::pages    StoredPages: data and holes, block by block                                    (stored.rs)
//! ```
//!
//! A file is read forward through one buffer: memory does not grow with it. What is kept are the
//! device sections, up to half of the machine's memory, and their description, up to
//! [`MAX_VMDESC`](multifd_wire::MAX_VMDESC).

mod description;
mod devices;
mod file;
mod items;
mod mapped;
mod opaque;
mod pages;
mod stored;
#[cfg(test)]
mod tests;

use std::path::Path;

use multifd_wire::{
    BlockEntry, BlockListFormat, Configuration, MULTIFD_MAGIC, PageSize, RAM_SECTION_VERSION, STREAM_MAGIC,
    SectionId, StreamHeader,
};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::block_list;
use crate::stream::foreign;
use crate::stream::mapped_layout::CAPABILITY;
use description::Described;
use file::{FileReader, StreamFile};
use items::{Items, Next};

pub use devices::{Devices, RecordedSection, SectionContent};
pub use pages::{PageContent, PageRecord, RecordedPages};
pub use stored::StoredPages;

/// A migration stream in a file, as QEMU writes it for `exec:cat>FILE` and `file:FILE`: plain or
/// with `mapped-ram`.
///
/// ```no_run
/// # fn main() -> multifd_engine::Result<()> {
/// use multifd_engine::{PageContent, Recording};
///
/// let recording = Recording::open("vm.stream".as_ref())?;
/// let mut bytes = 0;
/// let mut pages = recording.pages();
/// while let Some(record) = pages.next_page()? {
///     if let PageContent::Data(page) = record.content {
///         bytes += page.len();
///     }
/// }
/// println!("{bytes} bytes of data, {} devices", pages.devices()?.sections.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Recording {
    file: StreamFile,
    configuration: Configuration,
    page_size: PageSize,
    blocks: Vec<BlockEntry>,
    described: Option<Described>,
    ram: Start,
}

/// Where reading goes on after the list of RAM blocks.
#[derive(Debug)]
struct Start {
    position: u64,
    section: SectionId,
    /// Devices that are saved early come before RAM.
    early: Vec<RecordedSection>,
}

impl Recording {
    /// Opens a recorded stream and reads as far as the list of RAM blocks.
    ///
    /// # Errors
    /// `Storage` if the file cannot be read, `InvalidStream` if it is no stream or ends too early,
    /// `Incompatible` for a stream of a kind that cannot be read. They name the byte.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_at(path, 0)
    }

    /// The same for a stream that begins at byte `offset` of the file, as in `file:PATH,offset=N`.
    ///
    /// # Errors
    /// As [`Recording::open`].
    pub fn open_at(path: &Path, offset: u64) -> Result<Self> {
        let file = StreamFile::open(path)?;
        Self::read(&file, offset).map_err(|error| error.on(file.name())).map(|parts| parts.of(file))
    }

    fn read(file: &StreamFile, offset: u64) -> Result<Parts> {
        let mut reader = file.reader(offset);
        check_first_bytes(&mut reader)?;
        reader.next(Phase::Setup, "the stream header", StreamHeader::parse)?;
        let configuration = reader.next(Phase::Setup, "the configuration section", Configuration::parse)?;
        let described = description::at_end(file)?;
        let page_size = page_size(&configuration, described.as_ref())?;
        let mut items = Items::new(reader, described.clone(), None, Vec::new());
        let section = match items.next()? {
            Next::RamStart(head) if head.version_id == RAM_SECTION_VERSION => head.id,
            Next::RamStart(head) => {
                let detail =
                    format!("version {} of the RAM section, expected {RAM_SECTION_VERSION}", head.version_id);
                return Err(Error::incompatible(Phase::Setup, detail));
            }
            Next::RamPiece | Next::End => {
                return Err(invalid(Phase::Setup, "a stream without a RAM section"));
            }
        };
        let (mut reader, early) = items.into_parts();
        let blocks = block_list::read(&mut reader, page_size, block_list_format(&configuration))?;
        let ram = Start { position: reader.position(), section, early };
        Ok(Parts { configuration, page_size, blocks, described, ram })
    }

    /// Machine type, and what else the source said of itself.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// The target page.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The RAM blocks, in the order of the stream. [`PageRecord::block`] counts them.
    pub fn blocks(&self) -> &[BlockEntry] {
        &self.blocks
    }

    /// Pages lie at fixed places of the file (`mapped-ram`), each at most once.
    pub fn is_mapped(&self) -> bool {
        self.blocks.iter().any(|block| block.mapped_ram.is_some())
    }

    /// Bytes of the file. [`RecordedPages::position`] gets there.
    pub fn file_len(&self) -> u64 {
        self.file.len()
    }

    /// Reads the pages from the first one on. Any number of readers may be at work.
    pub fn pages(&self) -> RecordedPages<'_> {
        RecordedPages::new(self)
    }
}

/// A [`Recording`] less its file.
struct Parts {
    configuration: Configuration,
    page_size: PageSize,
    blocks: Vec<BlockEntry>,
    described: Option<Described>,
    ram: Start,
}

impl Parts {
    fn of(self, file: StreamFile) -> Recording {
        let Self { configuration, page_size, blocks, described, ram } = self;
        Recording { file, configuration, page_size, blocks, described, ram }
    }
}

/// Says what a file is that is something else than a stream, where that is easy to tell.
fn check_first_bytes(reader: &mut FileReader<'_>) -> Result<()> {
    let first = reader.peek(Phase::Setup, "the stream header", foreign::LEN)?;
    if first.is_empty() {
        return Err(invalid(Phase::Setup, "the file is empty"));
    }
    if let Some(what) = foreign::what_it_is(first) {
        return Err(invalid(Phase::Setup, format!("no migration stream, it is {what}")));
    }
    if first.starts_with(&MULTIFD_MAGIC.to_be_bytes()) {
        return Err(invalid(
            Phase::Setup,
            "what went over a parallel multifd channel, only the main channel's stream can be read",
        ));
    }
    let (magic, first) = (STREAM_MAGIC.to_be_bytes(), first.get(..4).unwrap_or(first));
    if !magic.starts_with(first) {
        let detail =
            format!("no migration stream: it begins with {first:02x?}, expected {magic:02x?} (QEVM)");
        return Err(invalid(Phase::Setup, detail));
    }
    Ok(())
}

/// The configuration says it for a CPU family that has several, the description does in any case.
fn page_size(configuration: &Configuration, described: Option<&Described>) -> Result<PageSize> {
    if let Some(bits) = configuration.page_bits {
        return PageSize::from_bits(bits).map_err(|error| Error::invalid(Phase::Setup, error));
    }
    let bytes = described.and_then(|described| u32::try_from(described.description.page_size?).ok());
    Ok(bytes.and_then(|bytes| PageSize::new(bytes).ok()).unwrap_or(PageSize::K4))
}

/// What the entries of the list of blocks have, by the capabilities of the source.
fn block_list_format(configuration: &Configuration) -> BlockListFormat {
    let has = |name: &str| configuration.capabilities.iter().any(|capability| capability == name);
    BlockListFormat {
        page_sizes: false,
        guest_addresses: has("x-ignore-shared"),
        mapped_ram: has(CAPABILITY),
    }
}

fn invalid(phase: Phase, detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidStream, phase, detail)
}
