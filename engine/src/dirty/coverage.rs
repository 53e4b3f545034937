//! Whether every page that may be written has a log.

use std::ops::Range;

use multifd_wire::BlockName;

use super::DirtyLog;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{DirtyBitmap, RamBlock};

/// How much of a block's memory a dirty log covers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Coverage {
    /// No page, or only what some of its writers write: a device's log beside the vCPUs'.
    Nothing,
    /// These pages of the block, counted from its first.
    Pages(Vec<Range<usize>>),
    /// Every page.
    Whole,
}

/// What the embedder vouches for: memory that needs no log, because nothing writes to it.
#[derive(Debug, Default)]
pub(crate) struct Unwritten {
    /// No vCPU and no device runs while the migration does.
    pub(crate) guest_paused: bool,
    /// Blocks that are read-only for vCPUs and devices.
    pub(crate) blocks: Vec<BlockName>,
}

impl Unwritten {
    /// Refuses a name that none of the blocks has.
    pub(crate) fn check_names(&self, ram: &[RamBlock]) -> Result<(), String> {
        match self.blocks.iter().find(|name| ram.iter().all(|block| block.name() != *name)) {
            Some(name) => Err(format!("read-only block {name}, which is none of the RAM blocks")),
            None => Ok(()),
        }
    }

    /// Refuses a page that may be written and that no log covers.
    pub(crate) fn check_logs(&self, logs: &[Box<dyn DirtyLog>], ram: &[RamBlock]) -> Result<()> {
        if self.guest_paused {
            return Ok(());
        }
        let written = ram.iter().filter(|block| !self.blocks.contains(block.name()));
        for block in written {
            let covered = DirtyBitmap::new(block.pages());
            for log in logs {
                for pages in pages_covered(&**log, block)
                    .map_err(|detail| Error::new(ErrorKind::ApiMisuse, Phase::Setup, detail))?
                {
                    covered.set_range(pages.start, pages.len());
                }
            }
            if let Some(first) = (0..block.pages()).find(|page| !covered.test(*page)) {
                return Err(uncovered(block, &covered, first));
            }
        }
        Ok(())
    }
}

/// The pages of `block` that `log` covers, or what is wrong with its answer.
pub(super) fn pages_covered(log: &dyn DirtyLog, block: &RamBlock) -> Result<Vec<Range<usize>>, String> {
    match log.covers(block) {
        Coverage::Nothing => Ok(Vec::new()),
        Coverage::Whole => Ok(std::iter::once(0..block.pages()).collect()),
        Coverage::Pages(ranges) => {
            match ranges.iter().find(|range| range.start > range.end || range.end > block.pages()) {
                Some(Range { start, end }) => Err(format!(
                    "dirty log {} says that it covers pages {start}..{end} of RAM block {}, which has {}",
                    log.name(),
                    block.name(),
                    block.pages()
                )),
                None => Ok(ranges),
            }
        }
    }
}

fn uncovered(block: &RamBlock, covered: &DirtyBitmap, first: usize) -> Error {
    let end = (first..block.pages()).find(|page| covered.test(*page)).unwrap_or(block.pages());
    let missing = block.pages() - covered.count();
    let detail = format!(
        "RAM block {}: {missing} of {} pages are in no dirty log ({first}..{end} first), and what is written there while \
         the guest moves would be lost; add a log that covers them, or say that nothing writes there \
         (SourceBuilder::read_only_block, SourceBuilder::paused_guest)",
        block.name(),
        block.pages()
    );
    Error::new(ErrorKind::ApiMisuse, Phase::Setup, detail)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::dirty::DirtyLogError;
    use crate::guest::{HostMemory, PAGE};

    struct Says(fn(&RamBlock) -> Coverage);

    impl DirtyLog for Says {
        fn name(&self) -> &str {
            "test"
        }
        fn start(&mut self, _: &[RamBlock]) -> Result<(), DirtyLogError> {
            Ok(())
        }
        fn covers(&self, block: &RamBlock) -> Coverage {
            (self.0)(block)
        }
        fn sync(&mut self, _: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
            Ok(())
        }
        fn stop(&mut self) {}
    }

    fn ram() -> Vec<RamBlock> {
        let block = |name: &str, pages| {
            RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
        };
        vec![block("low", 8), block("high", 100)]
    }

    fn checked(unwritten: &Unwritten, logs: &[fn(&RamBlock) -> Coverage]) -> Result<()> {
        let logs: Vec<Box<dyn DirtyLog>> =
            logs.iter().map(|says| Box::new(Says(*says)) as Box<dyn DirtyLog>).collect();
        unwritten.check_logs(&logs, &ram())
    }

    fn low_only(block: &RamBlock) -> Coverage {
        if block.name().as_str() == "low" { Coverage::Whole } else { Coverage::Nothing }
    }

    #[test]
    fn a_block_that_no_log_covers_is_named() {
        let error = checked(&Unwritten::default(), &[low_only]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        assert!(
            error.to_string().contains("RAM block high: 100 of 100 pages are in no dirty log"),
            "{error}"
        );
        let error = checked(&Unwritten::default(), &[]).unwrap_err();
        assert!(error.to_string().contains("RAM block low: 8 of 8 pages are in no dirty log"), "{error}");
    }

    #[test]
    fn logs_cover_a_block_together() {
        let some: fn(&RamBlock) -> Coverage = |_| Coverage::Pages(vec![0..5, 70..100]);
        let rest: fn(&RamBlock) -> Coverage = |_| Coverage::Pages(vec![5..68, 69..70]);
        let error = checked(
            &Unwritten::default(),
            &[low_only, |block| match block.pages() {
                100 => Coverage::Pages(vec![0..5, 70..100]),
                _ => Coverage::Nothing,
            }],
        )
        .unwrap_err();
        assert!(error.to_string().contains("65 of 100 pages are in no dirty log (5..70 first)"), "{error}");
        let high: &[fn(&RamBlock) -> Coverage] = &[some, rest];
        let logs: Vec<Box<dyn DirtyLog>> =
            high.iter().map(|says| Box::new(Says(*says)) as Box<dyn DirtyLog>).collect();
        let error = Unwritten::default().check_logs(&logs, &ram()[1..]).unwrap_err();
        assert!(error.to_string().contains("1 of 100 pages are in no dirty log (68..69 first)"), "{error}");
    }

    #[test]
    fn what_nothing_writes_needs_no_log() {
        let high = Unwritten { blocks: vec!["high".try_into().unwrap()], guest_paused: false };
        checked(&high, &[low_only]).unwrap();
        checked(&Unwritten { guest_paused: true, blocks: Vec::new() }, &[]).unwrap();
        high.check_names(&ram()).unwrap();
        let other = Unwritten { blocks: vec!["bios".try_into().unwrap()], guest_paused: false };
        assert_eq!(
            other.check_names(&ram()).unwrap_err(),
            "read-only block bios, which is none of the RAM blocks"
        );
    }

    #[test]
    fn a_log_that_covers_more_than_there_is_is_refused() {
        let error = checked(&Unwritten::default(), &[|_| Coverage::Pages(std::iter::once(0..9).collect())])
            .unwrap_err();
        let text = "dirty log test says that it covers pages 0..9 of RAM block low, which has 8";
        assert!(error.to_string().contains(text), "{error}");
    }
}
