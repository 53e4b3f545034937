//! The files of a checkpoint, read as a script would: by its manifest, without our own library.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{During, Failure, Outcome, ram};

/// A checkpoint on disk.
#[derive(Clone, Debug)]
pub struct CheckpointFiles {
    directory: PathBuf,
    manifest: Value,
}

impl CheckpointFiles {
    /// The checkpoint in `directory`.
    ///
    /// # Errors
    /// When it has no manifest.
    pub fn open(directory: &Path) -> Outcome<Self> {
        let path = directory.join("manifest.json");
        let manifest = serde_json::from_slice(&fs::read(&path).during(path.display())?);
        Ok(Self { directory: directory.to_owned(), manifest: manifest.during(path.display())? })
    }

    /// The folder that it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file with the content of the RAM block of this name.
    ///
    /// # Errors
    /// When the manifest does not name one.
    pub fn block(&self, name: &str) -> Outcome<PathBuf> {
        let named = |block: &&Value| block.get("idstr").and_then(Value::as_str) == Some(name);
        let file = self.entries()?.iter().find(named).and_then(|block| block.get("file")?.as_str());
        file.map(|file| self.directory.join(file)).ok_or_else(|| self.lacks(format_args!("block {name}")))
    }

    /// The names of its RAM blocks, in the source's order.
    ///
    /// # Errors
    /// When the manifest does not name them.
    pub fn blocks(&self) -> Outcome<Vec<&str>> {
        let name = |block| Value::get(block, "idstr").and_then(Value::as_str);
        self.entries()?.iter().map(|block| name(block).ok_or_else(|| self.lacks("idstr"))).collect()
    }

    /// Fails unless the guest in `other` is the same, byte for byte: RAM, devices and their
    /// description.
    ///
    /// # Errors
    /// Naming the first file that differs.
    pub fn check_equal(&self, other: &Self) -> Outcome {
        let (blocks, others) = (self.blocks()?, other.blocks()?);
        if blocks != others {
            return Err(Failure::new(format!("blocks {blocks:?} and {others:?}")));
        }
        for block in blocks {
            ram::check_equal(&self.block(block)?, &other.block(block)?).during(block)?;
        }
        for name in ["device-state.bin", "vmdesc.json"] {
            let read = |directory: &Path| fs::read(directory.join(name)).during(name);
            if read(&self.directory)? != read(&other.directory)? {
                let (left, right) = (self.directory.display(), other.directory.display());
                return Err(Failure::new(format!("{name} differs in {left} and {right}")));
            }
        }
        Ok(())
    }

    fn entries(&self) -> Outcome<&Vec<Value>> {
        self.manifest.get("blocks").and_then(Value::as_array).ok_or_else(|| self.lacks("blocks"))
    }

    fn lacks(&self, what: impl std::fmt::Display) -> Failure {
        Failure::new(format!("{}: the manifest has no {what}: {}", self.directory.display(), self.manifest))
    }
}
