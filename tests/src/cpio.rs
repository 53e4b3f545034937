//! Archives in the form that Linux takes as an initramfs: cpio, "newc", uncompressed.

use std::{fmt::Write as _, iter};

use crate::Outcome;

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder. Parents come before their children.
    pub(crate) fn folder(&mut self, name: &str) -> Outcome {
        self.entry(name, 0o04_0755, &[])
    }

    /// Adds a file that may be run.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> Outcome {
        self.entry(name, 0o10_0755, content)
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> Outcome {
        self.entry(name, 0o12_0777, target.as_bytes())
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Outcome<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Outcome {
        self.entries += 1;
        let name_len = u32::try_from(name.len() + 1)?;
        let content_len = u32::try_from(content.len())?;
        let mut head = String::from("070701");
        // inode, mode, uid, gid, links, mtime, length, device (2), special device (2), name's
        // length, checksum
        for field in [self.entries, mode, 0, 0, 1, 0, content_len, 0, 0, 0, 0, name_len, 0] {
            write!(head, "{field:08X}")?;
        }
        self.bytes.extend(head.bytes().chain(name.bytes()).chain([0]));
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// Head with name, and content, each end at a multiple of 4.
    fn pad(&mut self) {
        let missing = self.bytes.len().next_multiple_of(4) - self.bytes.len();
        self.bytes.extend(iter::repeat_n(0, missing));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_its_length_name_and_padding() {
        let mut archive = Archive::default();
        archive.file("init", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..124], b"init\0\0hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
