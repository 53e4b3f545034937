//! The memory in a recorded stream, which is read twice: to count the pages, and to pick the
//! sample. Of a page sent more than once, the last record counts.

use std::collections::BTreeMap;
use std::path::Path;

use multifd_codecs::{xbzrle, zero};
use multifd_engine::{PageContent, PageRecord, Recording};

use super::{BATCH_PAGES, Batch, Extent, MAX_PAIRS, Memory, PAGE, Rewrites};
use crate::page_states::PageStates;
use crate::{Error, Result};

pub(super) struct Stream {
    name: String,
    recording: Recording,
    extent: Extent,
    /// Pages of the sample that were sent again, in two versions.
    pairs: Vec<[Box<[u8; PAGE]>; 2]>,
}

type Pages = BTreeMap<u64, Box<[u8; PAGE]>>;

/// The wanted batches, by block and number, with their pages as far as found.
struct Picked {
    pages: BTreeMap<(usize, u64), Pages>,
    pairs: Vec<[Box<[u8; PAGE]>; 2]>,
    bytes: u64,
}

impl Stream {
    pub(super) fn open(path: &Path, offset: u64, progress: &dyn Fn(u64, u64)) -> Result<Self> {
        let recording = Recording::open_at(path, offset)?;
        let page = recording.page_size().bytes();
        if page != PAGE {
            return Err(Error::PageSize { path: path.to_owned(), found: page });
        }
        let extent = count(&recording, progress)?;
        Ok(Self { name: format!("stream {}", path.display()), recording, extent, pairs: Vec::new() })
    }
}

impl Memory for Stream {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn extent(&self) -> &Extent {
        &self.extent
    }

    fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>> {
        let pages = wanted.iter().map(|batch| ((batch.block, batch.number), Pages::new())).collect();
        let mut picked = Picked { pages, pairs: Vec::new(), bytes: 0 };
        let mut records = self.recording.pages();
        while let Some(record) = records.next_page()? {
            picked.pick(&record)?;
            progress(picked.bytes);
        }
        self.pairs = picked.pairs;
        let batches = picked.pages.into_values();
        Ok(batches.map(|pages| pages.into_values().flat_map(|page| *page).collect()).collect())
    }

    /// A stream does not tell when its pages were written.
    fn rewrites(&mut self) -> Result<Option<Rewrites>> {
        let pairs = std::mem::take(&mut self.pairs);
        Ok((!pairs.is_empty()).then(|| Rewrites { changed: Vec::new(), pairs }))
    }
}

/// Counts the pages that are not zero by their last record.
fn count(recording: &Recording, progress: &dyn Fn(u64, u64)) -> Result<Extent> {
    let mut states = PageStates::default();
    let mut held: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    let mut pages = recording.pages();
    loop {
        progress(pages.position(), recording.file_len());
        let Some(record) = pages.next_page()? else { break };
        let is_zero = match record.content {
            PageContent::Data(page) => zero::is_zero(page),
            PageContent::Xbzrle(_) => false,
            // A run is of pages that come once, and that are zero for good.
            PageContent::Zero { pages } if pages > 1 => continue,
            PageContent::Zero { .. } => true,
        };
        let before = states.note(record.block, record.page, is_zero)?;
        let was_held = before.seen && !before.zero;
        let count = held.entry((record.block, record.page / BATCH_PAGES)).or_default();
        *count = *count + u64::from(!is_zero) - u64::from(was_held);
    }
    let devices = pages.devices()?;
    let batch = |((block, number), held)| Batch { block, number, held };
    Ok(Extent {
        blocks: recording.blocks().iter().map(|block| block.used_len).collect(),
        batches: held.into_iter().filter(|(_, held)| *held > 0).map(batch).collect(),
        device_bytes: devices.sections.iter().map(|section| section.payload_len()).sum(),
    })
}

impl Picked {
    fn pick(&mut self, record: &PageRecord<'_>) -> Result<()> {
        let key = (record.block, record.page / BATCH_PAGES);
        let Some(pages) = self.pages.get_mut(&key) else { return Ok(()) };
        let before = pages.remove(&record.page);
        let mut page = Box::new([0; PAGE]);
        match record.content {
            PageContent::Zero { .. } => return Ok(()),
            PageContent::Data(content) if zero::is_zero(content) => return Ok(()),
            PageContent::Data(content) => page.copy_from_slice(content),
            PageContent::Xbzrle(delta) => {
                // A page never sent, or sent as zero, is zero.
                if let Some(before) = &before {
                    page.clone_from(before);
                }
                xbzrle::decode(delta, &mut *page)
                    .map_err(|source| Error::Xbzrle { page: record.page, source })?;
            }
        }
        match before {
            Some(before) if self.pairs.len() < MAX_PAIRS => self.pairs.push([before, page.clone()]),
            Some(_) => {}
            None => self.bytes += PAGE as u64,
        }
        pages.insert(record.page, page);
        Ok(())
    }
}
