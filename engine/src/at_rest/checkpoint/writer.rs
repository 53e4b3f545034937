//! Writing a checkpoint: RAM as it arrives, the rest at the end.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use multifd_wire::{BlockEntry, Configuration};

use super::partial::{self, Partial};
use super::{
    CheckpointBlock, DESCRIPTION, DEVICE_STATE, EARLY_STATE, EarlyState, MANIFEST, Manifest, storage,
};
use crate::destination::{Arrived, IncomingRam};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{HostMemory, PAGE, RamBlock};
use crate::run::stop::lock;
use crate::stream::sections::EarlySections;

/// A checkpoint in the making, under a temporary name beside the final one. Dropped unfinished, it
/// is removed.
#[derive(Debug)]
pub struct CheckpointWriter {
    target: PathBuf,
    partial: PathBuf,
    blocks: Arc<Mutex<Vec<CheckpointBlock>>>,
    finished: bool,
    /// Last, so that the directory stays locked until it is removed.
    in_the_making: Partial,
}

/// Makes a sparse file for every block that the source announces.
struct CheckpointRam {
    partial: PathBuf,
    blocks: Arc<Mutex<Vec<CheckpointBlock>>>,
}

impl CheckpointWriter {
    /// Prepares a checkpoint at `target`, which must not exist yet; its parent must.
    ///
    /// # Errors
    /// `Storage` if there is something at `target`, or nothing can be written there.
    pub fn create(target: &Path) -> Result<Self> {
        // Without `.` and `/` at its end, where a directory cannot get its name by a rename.
        let target = &target.components().collect::<PathBuf>();
        if target.symlink_metadata().is_ok() {
            let detail = format!("{} exists, a checkpoint needs a new name", target.display());
            return Err(Error::new(ErrorKind::Storage, Phase::Setup, detail));
        }
        let name = target.file_name().ok_or_else(|| {
            Error::new(
                ErrorKind::Storage,
                Phase::Setup,
                format!("{} is no name for a directory", target.display()),
            )
        })?;
        let partial =
            target.with_file_name(partial::name(&name.to_string_lossy(), &std::process::id().to_string()));
        partial::sweep(target, &name.to_string_lossy());
        let in_the_making =
            Partial::make(&partial).map_err(|error| storage("making directory", &partial, error))?;
        let writer = Self {
            target: target.to_owned(),
            partial,
            blocks: Arc::default(),
            finished: false,
            in_the_making,
        };
        let ram = writer.partial.join("ram");
        partial::private_dir(&ram).map_err(|error| storage("making directory", &ram, error))?;
        Ok(writer)
    }

    /// Where the files are until the checkpoint gets its name, beside which it is.
    pub fn folder(&self) -> &Path {
        &self.partial
    }

    /// The memory for a destination that fills this checkpoint.
    pub fn ram(&self) -> impl IncomingRam + use<> {
        CheckpointRam { partial: self.partial.clone(), blocks: Arc::clone(&self.blocks) }
    }

    /// Writes everything but RAM, makes all of it durable, and gives the checkpoint its name. The
    /// source may then be told that its guest has arrived when this has returned.
    ///
    /// # Errors
    /// `Storage`; `Incompatible` for device state that cannot be replayed. Nothing is left at the
    /// target then.
    pub fn finish(mut self, arrived: &Arrived) -> Result<PathBuf> {
        if let Some(packet) = arrived.device_packets().first() {
            let detail = format!(
                "device {} sent state over channels, a checkpoint cannot hold that",
                packet.device.idstr
            );
            return Err(Error::new(ErrorKind::Incompatible, Phase::Device, detail));
        }
        let manifest = self.manifest(arrived);
        let mut configuration = Vec::new();
        arrived.configuration().encode(&mut configuration);
        self.write(DEVICE_STATE, &[&configuration, arrived.device_state()])?;
        if manifest.early_state.is_some() {
            let EarlySections { before_ram, within_ram, .. } = arrived.early_sections();
            self.write(EARLY_STATE, &[before_ram, within_ram])?;
        }
        if let Some(json) = arrived.description_text() {
            self.write(DESCRIPTION, &[json])?;
        }
        for block in &manifest.blocks {
            self.sync(&block.file)?;
            self.check_len(block)?;
        }
        let json = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| storage("writing", &self.partial.join(MANIFEST), error))?;
        self.write(MANIFEST, &[&json])?;
        self.sync("ram")?;
        self.sync("")?;
        // What has its name may be sent on: no cancel may tell the source to run on after that.
        arrived.seal()?;
        fs::rename(&self.partial, &self.target).map_err(|error| storage("naming", &self.target, error))?;
        if let Err(error) = self.sync_parent() {
            // The source gets a failure and runs on, so its guest must not be here as well.
            // Dropping this removes it.
            fs::rename(&self.target, &self.partial)
                .map_err(|error| storage("taking back the name of", &self.target, error))?;
            return Err(error);
        }
        self.finished = true;
        Ok(self.target.clone())
    }

    /// Makes the new name itself durable.
    fn sync_parent(&self) -> Result<()> {
        let parent = match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(|error| storage("syncing", parent, error))
    }

    fn manifest(&self, arrived: &Arrived) -> Manifest {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let early = arrived.early_sections();
        let early_state = (!early.is_empty()).then_some(EarlyState {
            before_ram: early.before_ram.len() as u64,
            within_ram: early.within_ram.len() as u64,
        });
        Manifest {
            format: Manifest::format_for(early_state.as_ref()),
            machine: arrived.configuration().machine.clone(),
            uuid: arrived.uuid().map(|uuid| format!("{:032x}", u128::from_be_bytes(uuid))),
            switchover_start: arrived.switchover_start(),
            blocks: lock(&self.blocks).clone(),
            source: arrived.source().to_owned(),
            codec: arrived.codec(),
            channels: arrived.progress().channels,
            created_unix_s: created.as_secs(),
            total_ms: u64::try_from(arrived.elapsed().as_millis()).unwrap_or(u64::MAX),
            early_state,
        }
    }

    fn write(&self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let path = self.partial.join(name);
        private_file()
            .write(true)
            .open(&path)
            .and_then(|mut file| {
                parts.iter().try_for_each(|part| file.write_all(part))?;
                file.sync_all()
            })
            .map_err(|error| storage("writing", &path, error))
    }

    /// What was stored behind the end of a file that another process has cut is lost.
    fn check_len(&self, block: &CheckpointBlock) -> Result<()> {
        let path = self.partial.join(&block.file);
        let found = fs::metadata(&path).map_err(|error| storage("checking", &path, error))?.len();
        if found == block.length {
            return Ok(());
        }
        let problem = format!(
            "{found} bytes, expected the {} of RAM block {}: another process has changed the file",
            block.length,
            block.idstr.escape_default()
        );
        Err(storage("checking", &path, problem))
    }

    fn sync(&self, name: &str) -> Result<()> {
        let path = self.partial.join(name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(|error| storage("syncing", &path, error))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = self.in_the_making.remove(&self.partial) {
            tracing::warn!(%error, path = %self.partial.display(), "an unfinished checkpoint is left");
        }
    }
}

impl IncomingRam for CheckpointRam {
    /// It stays among the early sections, with which it is sent on.
    fn configure(
        &mut self,
        _name: &str,
        _version: u32,
        _state: &[u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    fn open(
        &mut self,
        _configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        let mut opened = Vec::with_capacity(announced.len());
        for (index, entry) in announced.iter().enumerate() {
            let name = format!("ram/{index:02}.img");
            let path = self.partial.join(&name);
            let memory = sparse(&path, entry.used_len).map_err(|error| storage("making", &path, error))?;
            opened.push(RamBlock::new(entry.name.clone(), memory).fresh());
            lock(&self.blocks).push(CheckpointBlock {
                idstr: entry.name.as_str().to_owned(),
                length: entry.used_len,
                page_size: PAGE as u64,
                file: name,
            });
        }
        Ok(opened)
    }
}

/// Makes a new file that only its owner can read: a guest's RAM and devices hold its keys.
fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.create_new(true).mode(0o600);
    options
}

fn sparse(path: &Path, len: u64) -> std::io::Result<HostMemory> {
    let file = private_file().read(true).write(true).open(path)?;
    file.set_len(len)?;
    HostMemory::map_file(file, usize::try_from(len).map_err(std::io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_block_that_another_process_has_cut_is_noticed() {
        let folder = folder();
        let writer = CheckpointWriter::create(&folder.path().join("ck")).unwrap();
        let entry = BlockEntry {
            name: "pc.ram".try_into().unwrap(),
            used_len: 8 * PAGE as u64,
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        };
        let _blocks = writer.ram().open(&Configuration::new("pc"), &[entry]).unwrap();
        let block = lock(&writer.blocks).first().cloned().unwrap();
        writer.check_len(&block).unwrap();
        let file = OpenOptions::new().write(true).open(writer.partial.join(&block.file)).unwrap();
        file.set_len(PAGE as u64).unwrap();
        let error = writer.check_len(&block).unwrap_err().chain();
        assert!(error.contains("00.img: 4096 bytes, expected the 32768 of RAM block pc.ram"), "{error}");
    }

    #[test]
    fn a_name_that_ends_in_a_dot_or_a_slash_is_that_of_the_directory() {
        let folder = folder();
        for name in ["ck/.", "ck/", "ck/./"] {
            let writer = CheckpointWriter::create(&folder.path().join(name)).unwrap();
            assert_eq!(writer.target, folder.path().join("ck"));
            assert_eq!(writer.target.as_os_str(), folder.path().join("ck").as_os_str());
        }
        CheckpointWriter::create(&folder.path().join("ck/..")).unwrap_err();
    }
}
