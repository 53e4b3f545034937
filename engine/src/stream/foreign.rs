//! Files that people hand over for a migration stream, and that are something else.

/// Bytes that [`what_it_is`] looks at; fewer say less.
pub(crate) const LEN: usize = 32;

/// What a file begins with that is no stream.
const BEGINNINGS: [(&[u8], &str); 12] = [
    (&[0x1f, 0x8b], "packed by gzip, unpack it first: exec:gzip -dc FILE"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "packed by zstd, unpack it first: exec:zstd -dc FILE"),
    (&[0xfd, b'7', b'z', b'X'], "packed by xz, unpack it first: exec:xz -dc FILE"),
    (b"BZh", "packed by bzip2, unpack it first: exec:bzip2 -dc FILE"),
    (&[0x04, 0x22, 0x4d, 0x18], "packed by lz4, unpack it first: exec:lz4 -dc FILE"),
    (&[0x89, b'L', b'Z', b'O'], "packed by lzop, unpack it first: exec:lzop -dc FILE"),
    (
        b"QFI\xfb",
        "a qcow2 image: an internal snapshot in it (savevm) is read by QEMU only, \
            load it there (-loadvm) and migrate to a file",
    ),
    (b"\x7fELF", "an ELF file, such as a core dump (dump-guest-memory): it has no devices, and is no stream"),
    (b"makedumpfile", "a flattened kdump dump (dump-guest-memory): it has no devices, and is no stream"),
    (b"make", "a flattened kdump dump, it seems (dump-guest-memory): it has no devices, and is no stream"),
    (b"KDUMP", "a kdump dump (dump-guest-memory): it has no devices, and is no stream"),
    (b"KDUM", "a kdump dump, it seems (dump-guest-memory): it has no devices, and is no stream"),
];

/// How `virsh save` packs the stream, by the number in its header.
const LIBVIRT_PROGRAMS: [Option<&str>; 7] =
    [None, Some("gzip"), Some("bzip2"), Some("xz"), Some("lzop"), Some("zstd"), None];

/// Length of the fixed part of libvirt's header.
const LIBVIRT_HEADER: u64 = 92;

/// What it is that begins with `first`, in words that follow "this is"; `None` if that is not
/// known.
pub(crate) fn what_it_is(first: &[u8]) -> Option<String> {
    if first.starts_with(b"Libv") {
        return Some(libvirt(first));
    }
    BEGINNINGS
        .iter()
        .find(|(beginning, _)| first.starts_with(beginning))
        .map(|(_, words)| (*words).to_owned())
}

/// `LibvirtQemudSave`, version, length of the XML, whether it ran, format: 32-bit numbers,
/// little-endian.
fn libvirt(first: &[u8]) -> String {
    if first.starts_with(b"LibvirtQemudPart") {
        return "a libvirt save image that was never finished: the guest in it is not whole".to_owned();
    }
    let number = |at: usize| {
        let bytes = first.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_le_bytes)
    };
    let (Some(xml), Some(format)) = (number(20), number(28)) else {
        return "a libvirt save image (virsh save), whose stream begins behind its header: read it from a file"
            .to_owned();
    };
    let begin = LIBVIRT_HEADER + u64::from(xml);
    let program = usize::try_from(format).ok().and_then(|format| LIBVIRT_PROGRAMS.get(format));
    match program {
        Some(None) => format!(
            "a libvirt save image (virsh save): its stream begins at byte {begin}, file:FILE,offset={begin}"
        ),
        Some(Some(program)) => format!(
            "a libvirt save image (virsh save) packed by {program}: its stream begins at byte {begin}, \
                exec:tail -c +{} FILE | {program} -dc",
            begin + 1
        ),
        None => format!(
            "a libvirt save image (virsh save): its stream begins at byte {begin}, in the unknown format {format}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &[u8; 16], xml: u32, format: u32) -> Vec<u8> {
        let numbers = [2, xml, 1, format];
        let numbers = numbers.into_iter().flat_map(u32::to_le_bytes);
        name.iter().copied().chain(numbers).collect()
    }

    #[test]
    fn a_libvirt_image_says_where_its_stream_begins_and_how_it_is_packed() {
        let words = |image: &[u8]| what_it_is(image).unwrap();
        for format in [0, 6] {
            let raw = words(&image(b"LibvirtQemudSave", 67_247, format));
            assert!(raw.ends_with("begins at byte 67339, file:FILE,offset=67339"), "{raw}");
        }
        let packed = words(&image(b"LibvirtQemudSave", 67_247, 5));
        assert!(packed.ends_with("exec:tail -c +67340 FILE | zstd -dc"), "{packed}");
        assert!(words(&image(b"LibvirtQemudSave", 1, 99)).contains("unknown format 99"));
        assert!(words(&image(b"LibvirtQemudPart", 1, 0)).contains("never finished"));
        assert!(words(b"Libv").contains("virsh save"));
    }

    #[test]
    fn other_files_are_named_by_their_first_four_bytes_and_a_stream_is_none_of_them() {
        for (beginning, words) in BEGINNINGS {
            let first = beginning.get(..4).unwrap_or(beginning);
            let told = what_it_is(first).unwrap();
            assert!(told.split(',').next() == words.split(',').next() || told.contains("it seems"), "{told}");
        }
        for first in [&b"QEVM\0\0\0\x03"[..], &[0x11, 0x22, 0x33, 0x44], b"GET ", b"", &[0x1f]] {
            assert_eq!(what_it_is(first), None);
        }
    }
}
