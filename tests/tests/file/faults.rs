//! Files that are cut, changed, or shrink while they are read: each ends in an error at once, and
//! none in a panic.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use multifd_engine::{
    Checkpoint, CheckpointWriter, Destination, Error, ErrorKind, IncomingRam, RamBlock, Recording, Report,
};
use multifd_tests::peer::{Memory, Recorder, Style, Trial};
use multifd_tests::{CheckpointFiles, Outcome, Scratch, ram};
use multifd_transports::Endpoint;
use multifd_wire::{BlockEntry, Configuration, MappedRamHeader};

/// No file of this size takes longer, on the busiest machine.
const LIMIT: Duration = Duration::from_secs(8);

/// A sound file of a small guest, and the checkpoint that it was written from.
struct Sound {
    trial: Trial,
    scratch: Scratch,
    bytes: Vec<u8>,
    blocks: Vec<MappedRamHeader>,
}

impl Sound {
    fn new(mapped: bool) -> Outcome<Self> {
        let trial = Trial::unix()?.patient(Duration::from_secs(10));
        let mut memory = Memory::small(3);
        let recording = Recorder::migration(Style::default(), &mut memory);
        trial.write_checkpoint(&recording)?.result?;
        let (scratch, checkpoint) = (Scratch::new()?, Checkpoint::open(&trial.checkpoint())?);
        let path = scratch.path("sound");
        let source = checkpoint.source()?.mapped_ram(mapped).channels(if mapped { 2 } else { 0 }).build()?;
        let mut precopy = source.connect(&endpoint(&path))?;
        precopy.round()?;
        precopy.stop_copy()?.commit(checkpoint.device_state())?;
        let bytes = fs::read(&path)?;
        let blocks = Recording::open(&path)?.blocks().iter().filter_map(|block| block.mapped_ram).collect();
        Ok(Self { trial, scratch, bytes, blocks })
    }

    /// A copy to be damaged.
    fn copy(&self) -> Outcome<PathBuf> {
        let path = self.scratch.path("copy");
        fs::write(&path, &self.bytes)?;
        Ok(path)
    }

    /// What was read is what was sent. Removes it.
    fn check_read(&self) -> Outcome {
        let (read, sent) =
            (CheckpointFiles::open(&self.out())?, CheckpointFiles::open(&self.trial.checkpoint())?);
        for block in sent.blocks()? {
            ram::check_equal(&sent.block(block)?, &read.block(block)?)?;
        }
        Ok(fs::remove_dir_all(self.out())?)
    }

    fn out(&self) -> PathBuf {
        self.scratch.path("out")
    }

    /// Reads a file into a checkpoint, which is there if and only if that succeeds.
    fn read(&self, path: &Path) -> Outcome<Result<Report, Error>> {
        self.read_with(path, |ram| ram)
    }

    fn read_with(
        &self,
        path: &Path,
        wrap: impl FnOnce(Box<dyn IncomingRam>) -> Box<dyn IncomingRam>,
    ) -> Outcome<Result<Report, Error>> {
        let out = self.out();
        let writer = CheckpointWriter::create(&out)?;
        let ram = Wrapped(wrap(Box::new(writer.ram())));
        let begun = Instant::now();
        let destination = Destination::builder(ram).listen(&endpoint(path))?;
        let result = destination.receive().and_then(|arrived| {
            writer.finish(&arrived)?;
            arrived.accept()
        });
        assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
        match &result {
            Ok(_) => assert!(CheckpointFiles::open(&out)?.blocks()?.len() == 2),
            Err(error) => {
                assert!(error.kind() != ErrorKind::Panicked, "{}", error.chain());
                assert!(error.source_may_resume());
                assert!(!out.exists(), "{}", error.chain());
            }
        }
        Ok(result)
    }

    /// Reading the copy after `damage` says all of `words`.
    fn refused(&self, words: &[&str], damage: impl FnOnce(&File) -> Outcome) -> Outcome {
        let path = self.copy()?;
        damage(&File::options().write(true).open(&path)?)?;
        let chain = match self.read(&path)? {
            Ok(_) => panic!("accepted, but should say {words:?}"),
            Err(error) => error.chain(),
        };
        assert!(words.iter().all(|word| chain.contains(word)), "{chain:?} does not say all of {words:?}");
        Ok(())
    }

    /// The interesting places: all around the stream's own bytes, and some in between.
    fn places(&self) -> Vec<usize> {
        let len = self.bytes.len();
        let mut dense = vec![0..260, len.saturating_sub(700)..len];
        let stored = self.blocks.iter().map(|block| usize::try_from(block.bitmap_offset).unwrap_or(len));
        dense.extend(stored.map(|at| at.saturating_sub(60)..(at + 60).min(len)));
        let mut places: Vec<_> = dense.into_iter().flatten().chain((0..len).step_by(len / 100)).collect();
        places.sort_unstable();
        places.dedup();
        places
    }
}

fn endpoint(path: &Path) -> Endpoint {
    Endpoint::File { path: path.to_owned(), offset: 0 }
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() -> Outcome {
    for mapped in [false, true] {
        let sound = Sound::new(mapped)?;
        sound.read(&sound.copy()?)??;
        sound.check_read()?;
        let path = sound.copy()?;
        let file = File::options().write(true).open(&path)?;
        let mut accepted = Vec::new();
        for len in sound.places().into_iter().rev() {
            file.set_len(len as u64)?;
            match sound.read(&path)? {
                Ok(_) => {
                    sound.check_read()?;
                    accepted.push(len);
                }
                Err(error) => assert!(error.channel().is_some(), "{len}: {}", error.chain()),
            }
        }
        // Behind EOF, only the description is missing; there are streams that have none.
        let description = fs::metadata(sound.trial.checkpoint().join("vmdesc.json"))?.len();
        assert_eq!(accepted, [sound.bytes.len() - 5 - usize::try_from(description)?]);
    }
    Ok(())
}

#[test]
fn changed_bytes_never_hurt() -> Outcome {
    for mapped in [false, true] {
        let sound = Sound::new(mapped)?;
        let path = sound.copy()?;
        let file = File::options().write(true).open(&path)?;
        for (index, at) in sound.places().into_iter().enumerate() {
            let Some(byte) = sound.bytes.get(at) else { continue };
            file.write_all_at(&[byte ^ 1 << (index % 8)], at as u64)?;
            // Accepted or refused: what matters is that it ends, and how (see `read`).
            if sound.read(&path)?.is_ok() {
                fs::remove_dir_all(sound.out())?;
            }
            file.write_all_at(&[*byte], at as u64)?;
        }
    }
    Ok(())
}

#[test]
fn places_that_cannot_be_are_refused() -> Outcome {
    let sound = Sound::new(true)?;
    let [ram, bios] = sound.blocks[..] else { panic!("two blocks") };
    let (header, second) = (ram.bitmap_offset - 28, bios.bitmap_offset - 28);
    let put = |at: u64, bytes: Vec<u8>| move |file: &File| Ok(file.write_all_at(&bytes, at)?);
    let be64 = |value: u64| value.to_be_bytes().to_vec();
    let len = sound.bytes.len() as u64;
    sound.refused(&["mapped-ram version", "2"], put(header, vec![0, 0, 0, 2]))?;
    sound.refused(&["mapped-ram page size", "65536"], put(header + 4, be64(65536)))?;
    // Before its own header; within the block before; where the pages are; behind the file.
    sound.refused(&["mapped-ram bitmap", "or behind"], put(header + 12, be64(8)))?;
    sound.refused(&["mapped-ram bitmap", "or behind"], put(second + 12, be64(ram.bitmap_offset)))?;
    sound.refused(&["mapped-ram offsets"], put(header + 12, be64(ram.pages_offset)))?;
    sound.refused(&["mapped-ram offsets"], put(header + 12, be64(u64::MAX - 4)))?;
    sound.refused(&["multiple of 1 MiB"], put(header + 20, be64(ram.pages_offset + 4096)))?;
    sound.refused(&["mapped-ram offsets"], put(header + 20, be64(0_u64.wrapping_sub(1 << 20))))?;
    let far = len.next_multiple_of(1 << 20);
    sound.refused(&["the file ends at byte", "the pages of RAM block"], put(header + 20, be64(far)))?;
    // pc.bios has 16 pages.
    sound.refused(&["past the 16 pages of RAM block pc.bios"], put(bios.bitmap_offset + 2, vec![1]))?;
    sound.refused(&["past the 16 pages of RAM block pc.bios"], put(bios.bitmap_offset + 7, vec![0x80]))
}

/// Does something when the memory is asked for: the list of blocks has been read, no page has.
struct Shrinking(Box<dyn IncomingRam>, PathBuf, u64);

impl IncomingRam for Shrinking {
    fn open(
        &mut self,
        configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        File::options().write(true).open(&self.1)?.set_len(self.2)?;
        self.0.open(configuration, announced)
    }
}

struct Wrapped(Box<dyn IncomingRam>);

impl IncomingRam for Wrapped {
    fn open(
        &mut self,
        configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        self.0.open(configuration, announced)
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read() -> Outcome {
    for (mapped, len, says) in [
        (false, 300 << 10, "the stream ended"),
        (true, (1 << 20) + 5000, "the file ends before"),
        (true, 100, "the file ends before"),
        (true, 0, "the file ends before"),
    ] {
        let sound = Sound::new(mapped)?;
        let path = sound.copy()?;
        let result = sound.read_with(&path, |ram| Box::new(Shrinking(ram, path.clone(), len)))?;
        let chain = result.err().map(|error| error.chain()).unwrap_or_default();
        assert!(chain.contains(says), "{len}: {chain:?}");
    }
    Ok(())
}
