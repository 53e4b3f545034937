//! The images that libvirt's `virsh save` writes: a header, the domain's XML, a migration stream.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::path::Path;

use crate::error::{Error, ErrorKind, Phase, Result};

/// What a whole image begins with.
const WHOLE: [u8; 16] = *b"LibvirtQemudSave";

/// What an image begins with while it is written.
const UNFINISHED: [u8; 16] = *b"LibvirtQemudPart";

/// Length of the fixed part of the header.
const HEADER: usize = 92;

/// The only version that there has been since 2010.
const VERSION: u32 = 2;

/// Most bytes of XML that are read: libvirt pads them to 64 KiB.
const LONGEST_XML: u32 = 16 << 20;

/// How the stream in an image is stored, by the number in its header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum LibvirtFormat {
    /// As it is.
    Raw,
    /// With pages at fixed places (capability `mapped-ram`).
    Sparse,
    /// Packed by this program.
    Packed(&'static str),
}

impl LibvirtFormat {
    const ALL: [Self; 7] = [
        Self::Raw,
        Self::Packed("gzip"),
        Self::Packed("bzip2"),
        Self::Packed("xz"),
        Self::Packed("lzop"),
        Self::Packed("zstd"),
        Self::Sparse,
    ];

    fn number(self) -> u32 {
        (0..).zip(Self::ALL).find(|(_, format)| *format == self).map_or(u32::MAX, |(number, _)| number)
    }

    /// libvirt's name of it, as `virsh save --image-format` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Sparse => "sparse",
            Self::Packed(program) => program,
        }
    }
}

/// The header of an image that `virsh save` has written.
#[derive(Clone, Debug)]
pub struct LibvirtImage {
    bytes: Vec<u8>,
    format: LibvirtFormat,
    was_running: bool,
}

impl LibvirtImage {
    /// The header of the image at `path`; `None` if it begins like no image.
    ///
    /// # Errors
    /// `Storage` if the file cannot be read, `InvalidStream` if it is an image that is not whole or
    /// of another version.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let name = path.display().to_string();
        let failed = |error| Error::storage(Phase::Setup, "reading the file", error).on(&name);
        let invalid = |detail: String| Error::new(ErrorKind::InvalidStream, Phase::Setup, detail).on(&name);
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Ok(None);
        }
        let mut file = File::open(path).map_err(failed)?;
        let mut bytes = vec![0; HEADER];
        match file.read_exact(&mut bytes) {
            Err(error) if error.kind() == IoKind::UnexpectedEof => return Ok(None),
            read => read.map_err(failed)?,
        }
        if bytes.starts_with(&UNFINISHED) {
            return Err(invalid(
                "a libvirt save image that was never finished: the guest in it is not whole".into(),
            ));
        }
        if !bytes.starts_with(&WHOLE) {
            return Ok(None);
        }
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes
                .map(u32::from_le_bytes)
                .ok_or_else(|| Error::bug(Phase::Setup, "a number beyond the header"))
        };
        let (version, xml_len, running, format) = (number(16)?, number(20)?, number(24)?, number(28)?);
        if version != VERSION {
            return Err(invalid(format!("a libvirt save image of version {version}, expected {VERSION}")));
        }
        if xml_len == 0 || xml_len > LONGEST_XML {
            return Err(invalid(format!(
                "a libvirt save image with {xml_len} bytes of XML, expected 1..={LONGEST_XML}"
            )));
        }
        let format = usize::try_from(format).ok().and_then(|format| LibvirtFormat::ALL.get(format).copied());
        let Some(format) = format else {
            return Err(invalid(format!("a libvirt save image in the unknown format {}", number(28)?)));
        };
        let read = file.take(xml_len.into()).read_to_end(&mut bytes).map_err(failed)?;
        if u32::try_from(read) != Ok(xml_len) {
            return Err(invalid(format!(
                "a libvirt save image that ends within its XML: {read} bytes of {xml_len}"
            )));
        }
        Ok(Some(Self { bytes, format, was_running: running != 0 }))
    }

    /// Where the stream begins in the file.
    pub fn stream_offset(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// How the stream is stored.
    pub fn format(&self) -> LibvirtFormat {
        self.format
    }

    /// Whether the guest ran when it was saved.
    pub fn was_running(&self) -> bool {
        self.was_running
    }

    /// The domain's XML.
    pub fn xml(&self) -> String {
        let xml = self.bytes.get(HEADER..).unwrap_or_default();
        let end = xml.iter().position(|byte| *byte == 0).unwrap_or(xml.len());
        String::from_utf8_lossy(xml.get(..end).unwrap_or_default()).into_owned()
    }

    /// The domain's name in its XML.
    pub fn domain(&self) -> Option<String> {
        let xml = self.xml();
        let name = xml.split_once("<name>")?.1.split_once("</name>")?.0;
        let replaced = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
        Some(replaced.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to)))
    }

    /// What an image of the same domain begins with, whose stream in `format` follows:
    /// [`LibvirtImage::MARK`] over its begin makes it whole.
    pub fn unfinished(&self, format: LibvirtFormat) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let parts: [(usize, &[u8]); 2] = [(0, &UNFINISHED), (28, &format.number().to_le_bytes())];
        for (at, part) in parts {
            let place = bytes.get_mut(at..).into_iter().flatten();
            place.zip(part).for_each(|(place, byte)| *place = *byte);
        }
        bytes
    }

    /// What a whole image begins with.
    pub const MARK: [u8; 16] = WHOLE;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(magic: &[u8; 16], numbers: [u32; 4], xml: &[u8]) -> tempfile::NamedTempFile {
        let mut bytes = magic.to_vec();
        bytes.extend(numbers.into_iter().flat_map(u32::to_le_bytes));
        bytes.resize(HEADER, 0);
        bytes.extend(xml);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    const XML: &[u8] = b"<domain><name>a &lt;b&gt; &amp; c</name></domain>\0<cookie/>\0\0\0";

    fn len() -> u32 {
        u32::try_from(XML.len()).unwrap()
    }

    #[test]
    fn an_image_says_its_domain_its_format_and_where_its_stream_begins() {
        for (number, format) in (0..).zip(LibvirtFormat::ALL) {
            let file = image(&WHOLE, [VERSION, len(), 1, number], XML);
            let read = LibvirtImage::read(file.path()).unwrap().unwrap();
            assert_eq!((read.format(), read.was_running()), (format, true));
            assert_eq!(read.stream_offset(), 92 + u64::from(len()));
            assert_eq!(read.domain().as_deref(), Some("a <b> & c"));
            assert_eq!(read.xml(), "<domain><name>a &lt;b&gt; &amp; c</name></domain>");
        }
    }

    #[test]
    fn an_image_that_is_not_whole_is_refused_and_another_file_is_none() {
        for (file, words) in [
            (image(&UNFINISHED, [VERSION, len(), 1, 0], XML), "never finished"),
            (image(&WHOLE, [3, len(), 1, 0], XML), "version 3, expected 2"),
            (image(&WHOLE, [VERSION, 0, 1, 0], XML), "0 bytes of XML"),
            (image(&WHOLE, [VERSION, u32::MAX, 1, 0], XML), "4294967295 bytes of XML"),
            (image(&WHOLE, [VERSION, len() + 1, 1, 0], XML), "ends within its XML"),
            (image(&WHOLE, [VERSION, len(), 1, 7], XML), "unknown format 7"),
        ] {
            let error = LibvirtImage::read(file.path()).unwrap_err();
            assert!(error.chain().contains(words), "{}", error.chain());
        }
        let other = image(b"QEVM\0\0\0\x03\0\0\0\0\0\0\0\0", [0; 4], XML);
        assert!(LibvirtImage::read(other.path()).unwrap().is_none());
        std::fs::write(other.path(), WHOLE).unwrap();
        assert!(LibvirtImage::read(other.path()).unwrap().is_none(), "shorter than a header");
    }

    #[test]
    fn a_header_for_another_stream_is_of_an_unfinished_image_until_it_is_marked() {
        let file = image(&WHOLE, [VERSION, len(), 1, 5], XML);
        let read = LibvirtImage::read(file.path()).unwrap().unwrap();
        let mut bytes = read.unfinished(LibvirtFormat::Sparse);
        std::fs::write(file.path(), &bytes).unwrap();
        assert!(LibvirtImage::read(file.path()).is_err());
        bytes[..16].copy_from_slice(&LibvirtImage::MARK);
        std::fs::write(file.path(), &bytes).unwrap();
        let again = LibvirtImage::read(file.path()).unwrap().unwrap();
        assert_eq!((again.format(), again.xml()), (LibvirtFormat::Sparse, read.xml()));
        assert_eq!(again.stream_offset(), read.stream_offset());
    }
}
