//! Reading a checkpoint, to look at it or to send it on.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use multifd_wire::{BlockName, Configuration};

use super::{DEVICE_STATE, EARLY_STATE, EarlyState, MANIFEST, Manifest, storage};
use crate::error::Result;
use crate::guest::{HostMemory, RamBlock};
use crate::os::memory::most_kept;
use crate::source::{DeviceState, Source, SourceBuilder};
use crate::stream::foreign;
use crate::stream::sections::EarlySections;

/// A checkpoint that was opened and found whole.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    manifest: Manifest,
    configuration: Configuration,
    early: EarlySections,
    device_state: DeviceState,
}

impl Checkpoint {
    /// Opens the checkpoint in `directory` and checks that its parts fit together. RAM is not read.
    ///
    /// # Errors
    /// `Storage`, naming the file and what is wrong with it.
    pub fn open(directory: &Path) -> Result<Self> {
        if directory.is_file() {
            return Err(storage("reading", directory, is_no_checkpoint(directory)));
        }
        let path = directory.join(MANIFEST);
        let json = read_file(&path)?;
        let manifest: Manifest =
            serde_json::from_slice(&json).map_err(|error| storage("reading", &path, error))?;
        manifest.check().map_err(|problem| storage("reading", &path, problem))?;
        for block in &manifest.blocks {
            let path = directory.join(&block.file);
            let (len, expected) = (file_len(&path)?, block.length);
            if len != expected {
                return Err(storage("reading", &path, format!("{len} bytes, the manifest says {expected}")));
            }
        }
        let path = directory.join(DEVICE_STATE);
        let mut state = read_file(&path)?;
        let (configuration, used) = match Configuration::parse(&state) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => return Err(storage("reading", &path, "it ends within the configuration section")),
            Err(invalid) => return Err(storage("reading", &path, invalid)),
        };
        let device_state = DeviceState::from_tail(state.split_off(used))
            .map_err(|invalid| storage("reading", &path, invalid))?;
        let early = match &manifest.early_state {
            Some(parts) => read_early(&directory.join(EARLY_STATE), parts)?,
            None => EarlySections::default(),
        };
        Ok(Self { directory: directory.to_owned(), manifest, configuration, early, device_state })
    }

    /// What the checkpoint says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The guest's machine.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Device sections that go before the end of RAM. [`Checkpoint::source`] sends them there.
    pub fn early_sections(&self) -> &EarlySections {
        &self.early
    }

    /// The devices' state.
    pub fn device_state(&self) -> &DeviceState {
        &self.device_state
    }

    /// Maps the RAM blocks for reading.
    ///
    /// # Errors
    /// `Storage` if a file cannot be opened or mapped.
    pub fn ram(&self) -> Result<Vec<RamBlock>> {
        let block = |block: &super::CheckpointBlock| {
            let path = self.directory.join(&block.file);
            let name = BlockName::try_from(block.idstr.as_str())
                .map_err(|invalid| storage("naming", &path, invalid))?;
            let len = usize::try_from(block.length).map_err(|error| storage("mapping", &path, error))?;
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
            let file = opened.map_err(|error| storage("opening", &path, error))?;
            let memory = HostMemory::map_file_read_only(file, len)
                .map_err(|error| storage("mapping", &path, error))?;
            Ok(RamBlock::new(name, memory))
        };
        self.manifest.blocks.iter().map(block).collect()
    }

    /// A source that sends this guest on, which nothing runs meanwhile. Its settings can still be
    /// changed.
    ///
    /// # Errors
    /// As [`Checkpoint::ram`].
    pub fn source(&self) -> Result<SourceBuilder> {
        let uuid =
            self.manifest.uuid_bytes().map_err(|problem| storage("reading", &self.directory, problem))?;
        Ok(Source::builder(self.ram()?, self.configuration.clone())
            .uuid(uuid.unwrap_or_default())
            .early_sections(self.early.clone())
            .paused_guest()
            .switchover_start(self.manifest.switchover_start))
    }
}

fn read_early(path: &Path, parts: &EarlyState) -> Result<EarlySections> {
    let mut before_ram = read_file(path)?;
    let (len, expected) = (before_ram.len() as u64, parts.before_ram.checked_add(parts.within_ram));
    if expected != Some(len) {
        let problem = format!("{len} bytes, the manifest says {} + {}", parts.before_ram, parts.within_ram);
        return Err(storage("reading", path, problem));
    }
    let split = usize::try_from(parts.before_ram).map_err(|error| storage("reading", path, error))?;
    let within_ram = before_ram.split_off(split);
    Ok(EarlySections { before_ram, within_ram })
}

/// What a file is that was taken for a checkpoint.
fn is_no_checkpoint(path: &Path) -> String {
    let mut first = [0; foreign::LEN];
    let read = File::open(path).and_then(|mut file| file.read(&mut first));
    let first = first.get(..read.unwrap_or(0)).unwrap_or_default();
    let found = foreign::what_it_is(first);
    let found = found.or_else(|| first.starts_with(b"QEVM").then(|| "a recorded stream".to_owned()));
    let found = found.unwrap_or_else(|| "a file".to_owned());
    format!(
        "it is {found}; expected a checkpoint's directory, which receive makes of a stream: receive file:FILE --out DIR"
    )
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    let (len, most) = (file_len(path)?, most_kept() as u64);
    if len > most {
        return Err(storage("reading", path, format!("{len} bytes, expected at most {most}")));
    }
    fs::read(path).map_err(|error| storage("reading", path, error))
}

/// Bytes in a regular file; anything else could keep its reader waiting for ever, and a symbolic
/// link could make a file of this machine part of a guest.
fn file_len(path: &Path) -> Result<u64> {
    let found = fs::symlink_metadata(path).map_err(|error| storage("reading", path, error))?;
    if found.is_file() {
        Ok(found.len())
    } else {
        Err(storage("reading", path, "this is no file (a link, a directory, a device?)"))
    }
}
