//! Streams put together piece by piece.

use std::fs;
use std::io::Write;

use multifd_wire::{
    BlockEntry, BlockName, BlockRef, Command, Configuration, Footer, Item, MappedRamHeader, PageSize,
    RamRecord, SectionHead, SectionId, StreamHeader,
};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;
use crate::at_rest::checkpoint::{Checkpoint, CheckpointBlock, Manifest};
use crate::guest::PAGE;

const RAM: SectionId = SectionId(2);
const DESCRIPTION: &[u8] = br#"{"page_size": 4096, "devices": [
    {"name": "early", "instance_id": 0, "size": 3, "fields": [{"name": "data", "size": 3, "type": "buffer"}]},
    {"name": "cpu", "instance_id": 1, "vmsd_name": "cpu", "version": 12,
     "fields": [{"name": "eip", "type": "uint64", "size": 8}]}]}"#;

#[derive(Clone)]
struct Stream(Vec<u8>);

impl Stream {
    fn new(capabilities: &[&str]) -> Self {
        let mut out = Vec::new();
        StreamHeader.encode(&mut out);
        let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
        let mut configuration = Configuration::new("pc-q35-10.0").with_capabilities(capabilities);
        configuration.uuid = Some([7; 16]);
        configuration.encode(&mut out);
        Self(out)
    }

    fn item(mut self, item: Item) -> Self {
        item.encode(&mut self.0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn record(mut self, record: RamRecord) -> Self {
        record.encode(PageSize::K4, &mut self.0);
        self
    }

    fn footer(self, id: SectionId) -> Self {
        self.bytes(&Footer(id).to_bytes())
    }

    fn end_of_piece(self) -> Self {
        self.record(RamRecord::EndOfSection).footer(RAM)
    }

    fn ram_start(self, blocks: &[(&str, u64)]) -> Self {
        let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
        let total = blocks.iter().map(|(_, len)| len).sum();
        let mut this = self.item(Item::SectionStart(head)).record(RamRecord::MemSize { total });
        for (text, used_len) in blocks {
            entry(text, *used_len).encode(&mut this.0);
        }
        this.record(RamRecord::Flush).end_of_piece()
    }

    fn device(self, id: u32, idstr: &str, instance_id: u32, payload: &[u8]) -> Self {
        let head = SectionHead { id: SectionId(id), idstr: idstr.to_owned(), instance_id, version_id: 12 };
        self.item(Item::SectionFull(head)).bytes(payload).footer(SectionId(id))
    }

    fn end(self, json: &[u8]) -> Self {
        let len = u32::try_from(json.len()).unwrap().to_be_bytes();
        self.item(Item::Eof).bytes(&[6]).bytes(&len).bytes(json)
    }

    fn file(&self) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&self.0).unwrap();
        file
    }

    fn error(&self) -> String {
        read(self.file().path()).unwrap_err()
    }
}

fn entry(text: &str, used_len: u64) -> BlockEntry {
    BlockEntry { name: name(text), used_len, page_size: None, guest_address: None, mapped_ram: None }
}

fn name(text: &str) -> BlockName {
    BlockName::try_from(text).unwrap()
}

fn named(text: &str) -> BlockRef {
    BlockRef::Named(name(text))
}

/// Everything that a stream without mapped-ram can have in it.
fn full() -> Stream {
    let live =
        SectionHead { id: SectionId(7), idstr: "dirty-bitmap".to_owned(), instance_id: 0, version_id: 1 };
    Stream::new(&[])
        .item(Item::Command(Command::OpenReturnPath))
        .device(40, "early", 0, b"abc")
        .ram_start(&[("pc.ram", 4 * 4096), ("pc.bios", 4096)])
        .item(Item::SectionStart(live))
        .bytes(b"bitmaps")
        .footer(SectionId(7))
        .item(Item::SectionPart(RAM))
        .record(RamRecord::Page { offset: 0, block: named("pc.ram") })
        .bytes(&[1; PAGE])
        .record(RamRecord::Zero { offset: 4096, block: BlockRef::Same })
        .end_of_piece()
        .item(Item::SectionPart(SectionId(7)))
        .bytes(b"more")
        .footer(SectionId(7))
        .item(Item::Command(Command::SwitchoverStart))
        .item(Item::SectionEnd(RAM))
        .record(RamRecord::Xbzrle { offset: 0, block: BlockRef::Same, len: 3 })
        .bytes(&[9, 1, 5])
        .record(RamRecord::Page { offset: 0, block: named("pc.bios") })
        .bytes(&[2; PAGE])
        .end_of_piece()
        // A footer of its own in the payload.
        .device(3, "cpu", 1, &[0x7e, 0, 0, 0, 3, 9, 9, 9])
        .end(DESCRIPTION)
}

type Seen = Vec<(usize, u64, String)>;

/// All records in short, and the devices.
fn read(path: &Path) -> Result<(Seen, Devices), String> {
    let recording = Recording::open(path).map_err(|error| error.chain())?;
    let mut pages = recording.pages();
    let mut seen = Vec::new();
    while let Some(record) = pages.next_page().map_err(|error| error.chain())? {
        let content = match record.content {
            PageContent::Data(bytes) => {
                assert_eq!(bytes.len(), PAGE);
                format!("data {}", bytes[0])
            }
            PageContent::Xbzrle(bytes) => format!("xbzrle {bytes:?}"),
            PageContent::Zero { pages } => format!("zero {pages}"),
        };
        seen.push((record.block, record.page, content));
    }
    pages.devices().map(|devices| (seen, devices)).map_err(|error| error.chain())
}

#[test]
fn a_compressed_page_is_read_as_its_bytes_and_a_broken_one_names_itself() {
    let stream = |bytes: &[u8]| {
        let len = u32::try_from(bytes.len()).unwrap();
        Stream::new(&[])
            .ram_start(&[("pc.ram", 4 * 4096)])
            .item(Item::SectionEnd(RAM))
            .record(RamRecord::Compressed { offset: 0x2000, block: named("pc.ram"), len })
            .bytes(bytes)
            .end_of_piece()
            .end(DESCRIPTION)
            .file()
    };
    // zlib's header, a last block that is stored, Adler-32.
    let (mut low, mut high) = (1_u32, 0_u32);
    (0..PAGE).for_each(|_| (low, high) = ((low + 5) % 65521, (high + low + 5) % 65521));
    let page = [5; PAGE];
    let packed = [&[0x78, 1, 1, 0, 0x10, 0xff, 0xef][..], &page, &(high << 16 | low).to_be_bytes()].concat();
    let (seen, _) = read(stream(&packed).path()).unwrap();
    assert_eq!(seen, [(0, 2, "data 5".to_owned())]);
    let error = read(stream(&packed[..packed.len() - 1]).path()).unwrap_err();
    assert!(error.contains("compressed page 2 of block 0"), "{error}");
}

fn names(devices: &Devices) -> Vec<(&str, u64)> {
    devices.sections.iter().map(|section| (section.head.idstr.as_str(), section.payload_len())).collect()
}

#[test]
fn a_stream_is_read_to_its_last_byte() {
    let file = full().file();
    let recording = Recording::open(file.path()).unwrap();
    assert_eq!(recording.configuration().machine, "pc-q35-10.0");
    assert_eq!(recording.blocks()[1].name.as_str(), "pc.bios");
    assert!(!recording.is_mapped());

    let (seen, devices) = read(file.path()).unwrap();
    let expected = [(0, 0, "data 1"), (0, 1, "zero 1"), (0, 0, "xbzrle [9, 1, 5]"), (1, 0, "data 2")];
    assert_eq!(seen, expected.map(|(block, page, text)| (block, page, text.to_owned())));
    assert_eq!(names(&devices), [("early", 3), ("dirty-bitmap", 11), ("cpu", 8)]);
    assert_eq!(devices.trailing_bytes, 0);
    let contents = devices.structure(&devices.sections[2]).unwrap().contents().unwrap();
    assert_eq!(contents.fields[0].bytes(), [0x7e, 0, 0, 0, 3, 9, 9, 9]);
    assert!(devices.structure(&devices.sections[1]).is_none());

    let again = recording.pages().devices().unwrap();
    assert_eq!(names(&again), names(&devices));
}

#[test]
fn without_a_description_sections_end_at_their_footers() {
    let mut stream = full();
    stream.0.truncate(stream.0.len() - DESCRIPTION.len() - 5);
    let (_, devices) = read(stream.file().path()).unwrap();
    assert_eq!(names(&devices), [("early", 3), ("dirty-bitmap", 11), ("cpu", 8)]);
    assert!(devices.description.is_none());
}

#[test]
fn a_description_that_lies_is_not_believed() {
    for size in [0, 2, 4, 1 << 40, u64::MAX] {
        let json = format!(
            r#"{{"page_size": 4096, "devices": [{{"name": "early", "instance_id": 0, "size": {size}}}]}}"#
        );
        let mut stream = full();
        stream.0.truncate(stream.0.len() - DESCRIPTION.len() - 6);
        let (_, devices) = read(stream.end(json.as_bytes()).file().path()).unwrap();
        assert_eq!(names(&devices)[0], ("early", 3), "{size}");
    }
}

/// A reader that looks through all sections for each piece would be at it for minutes.
#[test]
fn half_a_million_sections_with_a_piece_each_are_read() {
    const COUNT: u32 = 500_000;
    let mut stream = Stream::new(&[]).ram_start(&[("pc.ram", 4096)]);
    let ids = || (10..10 + COUNT).map(SectionId);
    for id in ids() {
        let head = SectionHead { id, idstr: "x".to_owned(), instance_id: id.0, version_id: 1 };
        stream = stream.item(Item::SectionStart(head)).footer(id);
    }
    for id in ids().rev() {
        stream = stream.item(Item::SectionPart(id)).bytes(&[1]).footer(id);
    }
    let file = stream.item(Item::SectionEnd(RAM)).end_of_piece().item(Item::Eof).file();
    let (_, devices) = read(file.path()).unwrap();
    assert_eq!(devices.sections.len(), COUNT as usize);
    assert!(devices.sections.iter().all(|section| section.payload_len() == 1));
}

#[test]
fn bytes_behind_the_end_are_counted() {
    for junk in [&[0][..], &[0; 5000], b"}", b"junk without that byte"] {
        let (_, devices) = read(full().bytes(junk).file().path()).unwrap();
        assert_eq!(devices.trailing_bytes, junk.len() as u64);
        assert_eq!(names(&devices)[2], ("cpu", 8));
    }
}

#[test]
fn a_background_snapshot_has_no_end_of_ram() {
    let stream = Stream::new(&[])
        .ram_start(&[("pc.ram", 4096)])
        .item(Item::SectionPart(RAM))
        .record(RamRecord::Zero { offset: 0, block: named("pc.ram") })
        .end_of_piece()
        .device(3, "cpu", 1, &[5; 8])
        .end(DESCRIPTION);
    let (seen, devices) = read(stream.file().path()).unwrap();
    assert_eq!((seen.len(), names(&devices)), (1, vec![("cpu", 8)]));
}

#[test]
fn every_cut_is_an_error_that_says_where() {
    let stream = full();
    let file = stream.file();
    let without_description = stream.0.len() - DESCRIPTION.len() - 5;
    for len in (0..stream.0.len()).rev() {
        file.as_file().set_len(len as u64).unwrap();
        match read(file.path()) {
            Ok(_) => assert_eq!(len, without_description),
            Err(error) if len == 0 => assert!(error.contains("the file is empty"), "{error}"),
            // Part of a description is taken for bytes behind the end of the last section, or of
            // the stream.
            Err(error) => assert!(
                error.contains(&format!("ends at byte {len}")) || len > without_description,
                "{error}"
            ),
        }
    }
}

#[test]
fn what_is_no_stream_is_named() {
    let error = |bytes: &[u8]| Stream(bytes.to_vec()).error();
    assert!(error(b"").contains("the file is empty"));
    assert!(error(&[0x1f, 0x8b, 8]).contains("packed by gzip"));
    assert!(error(&[0x11, 0x22, 0x33, 0x44, 0]).contains("multifd channel"));
    assert!(error(b"root:x:0").contains("no migration stream: it begins with [72, 6f, 6f, 74]"));
    assert!(error(b"QE").contains("the file ends at byte 2"));
    assert!(error(b"QEVM\0\0\0\x02").contains("stream version: 2, expected 3"));
    assert!(read(Path::new("/")).unwrap_err().contains("no regular file"));
    assert!(read(Path::new("/dev/null")).unwrap_err().contains("no regular file"));
    assert!(read(Path::new("/nonexistent/x")).unwrap_err().contains("/nonexistent/x: opening the file"));
    assert!(Stream::new(&[]).end(DESCRIPTION).error().contains("a stream without a RAM section"));
}

#[test]
fn records_that_cannot_be_are_refused() {
    let start = || Stream::new(&[]).ram_start(&[("pc.ram", 8192)]);
    let piece = || start().item(Item::SectionPart(RAM));
    let zero = |offset, block| RamRecord::Zero { offset, block };
    for (stream, expected) in [
        (
            piece().record(zero(8192, named("pc.ram"))),
            "offset 0x2000 in block pc.ram, which has 0x2000 bytes",
        ),
        (piece().record(zero(0, named("other"))), "block other, which is not in the list"),
        (piece().record(zero(0, BlockRef::Same)), "the same block as before, but it is the first"),
        (piece().record(RamRecord::MemSize { total: 4096 }), "a second list of RAM blocks"),
        (piece().record(RamRecord::EndOfSection).footer(SectionId(9)), "is of section 9, RAM was expected"),
        (start().item(Item::SectionPart(SectionId(9))), "a piece of section 9"),
        (start().ram_start(&[("x", 4096)]), "a second RAM section"),
        (start().item(Item::Command(Command::PostcopyRun)), "PostcopyRun"),
        (start().bytes(&[0x42]), "item type: 0x42"),
        (Stream::new(&[]).ram_start(&[("pc.ram", 0), ("x", 4096)]), "length of a ram block"),
    ] {
        let error = stream.error();
        assert!(error.contains(expected) && error.contains("byte"), "{error}");
    }
}

#[test]
fn lengths_that_no_file_has_cost_nothing() {
    let huge = !0xfff_u64;
    let stream = Stream::new(&[])
        .ram_start(&[("pc.ram", huge)])
        .item(Item::SectionEnd(RAM))
        .record(RamRecord::Zero { offset: huge - 4096, block: named("pc.ram") })
        .end_of_piece()
        .end(br#"{"page_size": 4096, "devices": []}"#);
    let (seen, _) = read(stream.file().path()).unwrap();
    assert_eq!(seen, [(0, huge / 4096 - 1, "zero 1".to_owned())]);
    // A description that claims 64 MiB, in a file that has no more than its beginning.
    let mut stream = full();
    stream.0.truncate(stream.0.len() - DESCRIPTION.len() - 4);
    let error = stream.bytes(&[4, 0, 0, 0, b'{']).error();
    assert!(error.contains("the description at byte"), "{error}");
}

/// Two mapped blocks: 130 pages of which 0, 64 and 129 are stored, and one page.
fn mapped() -> Stream {
    let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
    let total = 131 * 4096;
    let mut out =
        Stream::new(&["mapped-ram"]).item(Item::SectionStart(head)).record(RamRecord::MemSize { total });
    for (text, pages, stored) in [("pc.ram", 130, &[0, 64, 129][..]), ("pc.bios", 1, &[])] {
        let mut entry = entry(text, pages * 4096);
        let entry_len = 1 + text.len() + 8 + MappedRamHeader::LEN;
        let bitmap_offset = (out.0.len() + entry_len) as u64;
        let bitmap_len = MappedRamHeader::bitmap_len(entry.used_len, PageSize::K4);
        let pages_offset = (bitmap_offset + bitmap_len).next_multiple_of(MappedRamHeader::PAGES_ALIGN);
        entry.mapped_ram = Some(MappedRamHeader { page_size: 4096, bitmap_offset, pages_offset });
        entry.encode(&mut out.0);
        let mut bitmap = vec![0_u64; usize::try_from(bitmap_len / 8).unwrap()];
        let start = usize::try_from(pages_offset).unwrap();
        for page in stored {
            bitmap[page / 64] |= 1 << (page % 64);
        }
        bitmap.iter().for_each(|word| out.0.extend(word.to_le_bytes()));
        out.0.resize(start + usize::try_from(entry.used_len).unwrap(), 0);
        for page in stored {
            out.0[start + page * PAGE..][..PAGE].fill(u8::try_from(page + 1).unwrap());
        }
    }
    out.end_of_piece()
}

#[test]
fn mapped_pages_are_found_by_their_bitmaps() {
    let stream =
        mapped().item(Item::SectionEnd(RAM)).end_of_piece().device(3, "cpu", 1, &[5; 8]).end(DESCRIPTION);
    let file = stream.file();
    assert!(Recording::open(file.path()).unwrap().is_mapped());
    let (seen, devices) = read(file.path()).unwrap();
    let expected = [
        (0, 0, "data 1"),
        (0, 1, "zero 63"),
        (0, 64, "data 65"),
        (0, 65, "zero 64"),
        (0, 129, "data 130"),
        (1, 0, "zero 1"),
    ];
    assert_eq!(seen, expected.map(|(block, page, text)| (block, page, text.to_owned())));
    assert_eq!(names(&devices), [("cpu", 8)]);
    for len in [stream.0.len() - 200, 2 << 20, (1 << 20) + 5000, 1 << 20, 300, 100] {
        file.as_file().set_len(len as u64).unwrap();
        let error = read(file.path()).unwrap_err();
        assert!(error.contains("the file ends at byte"), "{len}: {error}");
    }
    let record = RamRecord::Zero { offset: 0, block: named("pc.ram") };
    let error = mapped().item(Item::SectionEnd(RAM)).record(record).error();
    assert!(error.contains("a page, in a stream with mapped-ram"), "{error}");
}

#[test]
fn recorded_streams_of_qemu() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/tests/golden");
    for file in fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        let recording = Recording::open(&file).unwrap();
        let (seen, devices) = read(&file).unwrap();
        let pages: u64 = recording.blocks().iter().map(|block| block.used_len / 4096).sum();
        assert!(seen.len() as u64 >= pages, "{}", file.display());
        assert_eq!(names(&devices).last(), Some(&("globalstate", 104)));
        assert!(
            devices.sections.iter().all(|section| devices.structure(section).unwrap().contents().is_ok())
        );
    }
}

#[test]
fn pages_and_devices_of_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("ram")).unwrap();
    let ram = fs::File::create(folder.path().join("ram/00.img")).unwrap();
    let pages = 4096;
    ram.set_len((pages * PAGE) as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&ram, &[3; PAGE], (2048 * PAGE) as u64).unwrap();
    let mut state = Stream(Vec::new());
    let configuration = Configuration::new("m");
    configuration.encode(&mut state.0);
    let state = state.device(3, "cpu", 1, &[5; 8]).end(DESCRIPTION);
    fs::write(folder.path().join("device-state.bin"), state.0).unwrap();
    let manifest = Manifest {
        format: 1,
        machine: "m".to_owned(),
        uuid: None,
        switchover_start: false,
        blocks: vec![CheckpointBlock {
            idstr: "pc.ram".to_owned(),
            length: (pages * PAGE) as u64,
            page_size: PAGE as u64,
            file: "ram/00.img".to_owned(),
        }],
        source: "test".to_owned(),
        codec: "none".to_owned(),
        channels: 0,
        created_unix_s: 0,
        total_ms: 0,
        early_state: None,
    };
    fs::write(folder.path().join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let devices = checkpoint.devices().unwrap();
    assert_eq!(names(&devices), [("cpu", 8)]);
    assert!(devices.structure(&devices.sections[0]).unwrap().contents().is_ok());
    let mut stored = checkpoint.pages().unwrap();
    let (mut covered, mut data) = (0, Vec::new());
    while let Some(record) = stored.next_page().unwrap() {
        assert_eq!((record.block, record.page), (0, covered));
        covered += match record.content {
            PageContent::Zero { pages } => pages,
            PageContent::Data(bytes) => {
                if bytes[0] == 3 {
                    data.push(record.page);
                }
                1
            }
            PageContent::Xbzrle(_) => panic!("a difference in a checkpoint"),
        };
    }
    assert_eq!((covered, data), (pages as u64, vec![2048]));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn bytes_that_are_off_never_hurt(
        is_mapped: bool,
        hits in proptest::collection::vec(any::<(proptest::sample::Index, u8)>(), 1..6),
        cut in any::<proptest::sample::Index>(),
    ) {
        // The pages themselves may be anything: hit what is around them.
        let mut stream = if is_mapped { mapped().end(DESCRIPTION) } else { full() };
        let len = stream.0.len();
        for (at, byte) in hits {
            let at = if is_mapped { at.index(200) } else { at.index(len) };
            stream.0[at] = byte;
        }
        if cut.index(4) == 0 {
            stream.0.truncate(cut.index(len));
        }
        let _ = read(stream.file().path());
    }
}
