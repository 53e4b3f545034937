//! `multifd inspect` as people run it: on streams recorded from QEMU, on streams and checkpoints
//! put together here, and on what is neither.
#![expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "helpers of tests, outside of the tests themselves"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use multifd_engine::{CheckpointBlock, Manifest, PAGE};
use multifd_wire::{
    BlockEntry, BlockName, BlockRef, Configuration, Footer, Item, MappedRamHeader, PageSize, RamRecord,
    SectionHead, SectionId, StreamHeader,
};
use serde_json::{Value, json};

const RAM: SectionId = SectionId(2);
const DESCRIPTION: &[u8] =
    br#"{"page_size": 4096, "devices": [{"name": "cpu", "instance_id": 0, "vmsd_name": "cpu",
    "version": 12, "fields": [{"name": "eip", "type": "uint64", "size": 8}],
    "subsections": [{"vmsd_name": "cpu/x", "version": 1, "fields": [
        {"name": "regs", "type": "uint16", "size": 2, "array_len": 4}]}]}]}"#;

fn inspect(path: &Path, flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_multifd")).arg("inspect").arg(path).args(flags).output().unwrap()
}

/// The table of a run that must succeed and say nothing else.
fn table(path: &Path, flags: &[&str]) -> String {
    let output = inspect(path, flags);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(path: &Path) -> Value {
    let object: Value = serde_json::from_str(&table(path, &["--json", "-q"])).unwrap();
    assert_eq!((&object["status"], &object["error"]), (&json!("completed"), &Value::Null));
    object
}

/// The error of a run that must fail, with nothing on stdout.
fn error(path: &Path) -> String {
    let output = inspect(path, &[]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
    let output = inspect(path, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["status"], "failed");
    assert_eq!(object.as_object().unwrap().len(), 2, "a result beside the error: {object}");
    let error = object["error"].as_str().unwrap().to_owned();
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("multifd: {error}\n"));
    error
}

fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/tests/golden");
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(files.len() >= 2);
    files
}

fn find<'v>(list: &'v Value, name: &str) -> &'v Value {
    list.as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("no {name}"))
}

struct Stream(Vec<u8>);

impl Stream {
    fn new(capabilities: &[&str]) -> Self {
        let mut out = Vec::new();
        StreamHeader.encode(&mut out);
        configuration(capabilities).encode(&mut out);
        Self(out)
    }

    fn item(mut self, item: Item) -> Self {
        item.encode(&mut self.0);
        self
    }

    fn record(mut self, record: RamRecord) -> Self {
        record.encode(PageSize::K4, &mut self.0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn ram_start(self, blocks: &[(&str, u64)]) -> Self {
        let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
        let total = blocks.iter().map(|(_, len)| len).sum();
        let mut this = self.item(Item::SectionStart(head)).record(RamRecord::MemSize { total });
        blocks.iter().for_each(|(name, len)| entry(name, *len, None).encode(&mut this.0));
        this.end_of_piece()
    }

    fn end_of_piece(self) -> Self {
        self.record(RamRecord::EndOfSection).bytes(&Footer(RAM).to_bytes())
    }

    /// One device, and the end.
    fn cpu_and_end(self) -> Self {
        let head = SectionHead { id: SectionId(5), idstr: "cpu".to_owned(), instance_id: 0, version_id: 12 };
        self.item(Item::SectionFull(head))
            .bytes(&[0, 0, 0, 0, 0, 0, 0xff, 0xf0])
            .bytes(b"\x05\x05cpu/x\0\0\0\x01\0\x07\0\x07\0\x07\x12\x34")
            .bytes(&Footer(SectionId(5)).to_bytes())
            .item(Item::Eof)
            .bytes(&[6])
            .bytes(&u32::try_from(DESCRIPTION.len()).unwrap().to_be_bytes())
            .bytes(DESCRIPTION)
    }

    fn write(&self, folder: &tempfile::TempDir) -> PathBuf {
        let path = folder.path().join("stream");
        fs::write(&path, &self.0).unwrap();
        path
    }
}

fn configuration(capabilities: &[&str]) -> Configuration {
    let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
    Configuration::new("pc-q35-10.0").with_capabilities(capabilities)
}

fn entry(name: &str, used_len: u64, mapped_ram: Option<MappedRamHeader>) -> BlockEntry {
    let name = BlockName::try_from(name).unwrap();
    BlockEntry { name, used_len, page_size: None, guest_address: None, mapped_ram }
}

fn named(name: &str) -> BlockRef {
    BlockRef::Named(BlockName::try_from(name).unwrap())
}

fn xbzrle_stream() -> Stream {
    Stream::new(&[])
        .ram_start(&[("pc.ram", 2 << 20), ("pc.bios", 8192)])
        .item(Item::SectionPart(RAM))
        .record(RamRecord::Page { offset: 0, block: named("pc.ram") })
        .bytes(&[1; PAGE])
        .record(RamRecord::Zero { offset: 4096, block: BlockRef::Same })
        .end_of_piece()
        .item(Item::SectionEnd(RAM))
        .record(RamRecord::Xbzrle { offset: 0, block: BlockRef::Same, len: 3 })
        .bytes(&[9, 1, 5])
        .record(RamRecord::Zero { offset: 4096, block: named("pc.bios") })
        .end_of_piece()
        .cpu_and_end()
}

/// A block of 64 pages of which two are in the file.
fn mapped_file() -> Stream {
    let head = SectionHead { id: RAM, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
    let total = 64 * 4096;
    let mut out =
        Stream::new(&["mapped-ram"]).item(Item::SectionStart(head)).record(RamRecord::MemSize { total });
    let bitmap_offset = (out.0.len() + 1 + 6 + 8 + MappedRamHeader::LEN) as u64;
    let header = MappedRamHeader { page_size: 4096, bitmap_offset, pages_offset: 1 << 20 };
    entry("pc.ram", total, Some(header)).encode(&mut out.0);
    out.0.extend((1_u64 | 1 << 63).to_le_bytes());
    out.0.resize(1 << 20, 0);
    out.0.extend([1; PAGE]);
    out.0.resize((1 << 20) + 63 * PAGE, 0);
    out.0.extend([2; PAGE]);
    out.end_of_piece().item(Item::SectionEnd(RAM)).end_of_piece().cpu_and_end()
}

/// Two blocks, one page of the first and none of the second with data.
fn checkpoint(directory: &Path) {
    fs::create_dir_all(directory.join("ram")).unwrap();
    let mut blocks = Vec::new();
    for (number, (idstr, pages)) in [("pc.ram", 4096_u64), ("pc.bios", 16)].into_iter().enumerate() {
        let file = format!("ram/{number:02}.img");
        let image = fs::File::create(directory.join(&file)).unwrap();
        image.set_len(pages * PAGE as u64).unwrap();
        if number == 0 {
            std::os::unix::fs::FileExt::write_all_at(&image, &[9; PAGE], 2048 * PAGE as u64).unwrap();
        }
        let (idstr, length) = (idstr.to_owned(), pages * PAGE as u64);
        blocks.push(CheckpointBlock { idstr, length, page_size: PAGE as u64, file });
    }
    let mut state = Vec::new();
    configuration(&[]).encode(&mut state);
    fs::write(directory.join("device-state.bin"), Stream(state).cpu_and_end().0).unwrap();
    let manifest = Manifest {
        format: 1,
        machine: "pc-q35-10.0".to_owned(),
        uuid: Some("11112222333344445555666677778888".to_owned()),
        switchover_start: true,
        blocks,
        source: "tcp:10.0.0.7:51234".to_owned(),
        codec: "zstd".to_owned(),
        channels: 3,
        created_unix_s: 1_763_766_604,
        total_ms: 1250,
        early_state: None,
    };
    fs::write(directory.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

#[test]
fn streams_recorded_from_qemu() {
    for path in golden() {
        let object = json_of(&path);
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(file.starts_with(object["machine"].as_str().unwrap()), "{file}");
        assert_eq!(object["kind"], "stream");
        let lengths: u64 =
            object["blocks"].as_array().unwrap().iter().map(|block| block["length"].as_u64().unwrap()).sum();
        assert_eq!(object["pages"]["total"], lengths / 4096);
        assert_eq!(object["pages"]["absent"], 0);

        let devices = &object["devices"];
        assert!(
            devices
                .as_array()
                .unwrap()
                .iter()
                .all(|device| device["fields"].is_array() && device["note"].is_null())
        );
        // Stopped before the first instruction, at the reset vector.
        let cpu = find(devices, "cpu");
        assert_eq!(find(&cpu["fields"], "env.eip")["value"], 0xfff0);
        assert_eq!(find(&cpu["fields"], "env.eip")["hex"], "0x000000000000fff0");
        assert_eq!(find(&find(devices, "globalstate")["fields"], "runstate")["text"], "prelaunch");

        let short = table(&path, &["-q"]);
        assert!(short.contains("globalstate") && !short.contains("env.eip"), "{short}");
        let long = table(&path, &["-q", "-v"]);
        let eip = long.lines().find(|line| line.contains("env.eip")).unwrap();
        assert!(eip.ends_with("uint64           8  0xfff0 (65520)"), "{eip}");
    }
}

#[test]
fn recorded_streams_that_are_cut_short() {
    let folder = tempfile::tempdir().unwrap();
    for path in golden() {
        let stream = fs::read(path).unwrap();
        for len in [4, 12, 60, 100, 2000, stream.len() / 2, stream.len() - 30_000, stream.len() - 1] {
            let text = error(&Stream(stream[..len].to_vec()).write(&folder));
            assert!(
                text.contains(&format!("ends at byte {len}")) || text.contains("the description at byte"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_stream_with_differences_and_repeated_pages() {
    let folder = tempfile::tempdir().unwrap();
    let path = xbzrle_stream().write(&folder);
    let object = json_of(&path);
    assert_eq!(object["blocks"][0]["sent"], json!({"normal": 1, "zero": 1, "xbzrle": 1, "repeated": 1}));
    assert_eq!(object["blocks"][1]["sent"], json!({"normal": 0, "zero": 1, "xbzrle": 0, "repeated": 0}));
    assert_eq!(object["pages"]["absent"], 511);
    let cpu = find(&object["devices"], "cpu");
    assert_eq!(cpu["subsections"][0]["name"], "cpu/x");

    let text = table(&path, &["-v"]);
    let expected = "
RAM block   length  normal  zero  xbzrle  repeated  absent
pc.ram     2.0 MiB       1     1       1         1     510
pc.bios    8.0 KiB       0     1       0         0       1

pages        514: 511 absent, 2 zero (66.66 %), 1 data
";
    assert!(text.contains(expected), "{text}");
    let expected = "
section  device  instance  version  bytes
      5  cpu            0       12     27
         eip     uint64         8  0xfff0 (65520)
         cpu/x   subsection v1
           regs  uint16 x 4     8  7 x 3, 0x1234

note         511 pages are not in the stream
";
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn a_file_with_mapped_ram() {
    let folder = tempfile::tempdir().unwrap();
    let stream = mapped_file();
    let path = stream.write(&folder);
    let object = json_of(&path);
    assert_eq!((&object["kind"], &object["capabilities"]), (&json!("mapped-ram"), &json!(["mapped-ram"])));
    assert_eq!(object["blocks"][0]["stored"], json!({"data": 2, "holes": 62}));
    assert_eq!(object["pages"]["sampled"], 2);
    assert!(
        table(&path, &[]).contains("RAM block     length  data  holes\npc.ram     256.0 KiB     2     62\n")
    );
    for len in [100, 1 << 20, (1 << 20) + 5 * PAGE, stream.0.len() - 1] {
        let text = error(&Stream(stream.0[..len].to_vec()).write(&folder));
        assert!(text.contains(&format!("ends at byte {len}")), "{text}");
    }
}

#[test]
fn a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    checkpoint(&path);
    let object = json_of(&path);
    assert_eq!((&object["kind"], &object["codec"]), (&json!("checkpoint"), &json!("zstd")));
    assert_eq!(object["uuid"], "11112222-3333-4444-5555-666677778888");
    assert_eq!(object["pages"]["zero"], 4096 + 16 - 1);
    assert_eq!((&object["pages"]["data"], &object["pages"]["sampled"]), (&json!(1), &json!(1)));
    let ratio = object["pages"]["compression"][1]["ratio"].as_f64().unwrap();
    assert!(ratio > 50.0, "{ratio} for a page of equal bytes");
    assert_eq!(find(&find(&object["devices"], "cpu")["fields"], "eip")["value"], 0xfff0);

    let text = table(&path, &[]);
    assert!(text.contains("source       tcp:10.0.0.7:51234, 3 channels, codec zstd, in 1.2 s\n"), "{text}");
    assert!(text.contains("created      2025-11-21 23:10:04 UTC\n"), "{text}");
}

#[test]
fn a_checkpoint_that_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    checkpoint(&path);
    fs::OpenOptions::new().write(true).open(path.join("ram/00.img")).unwrap().set_len(4096).unwrap();
    assert!(error(&path).contains("4096 bytes, the manifest says"));
    checkpoint(&path);
    let state = fs::read(path.join("device-state.bin")).unwrap();
    fs::write(path.join("device-state.bin"), &state[..state.len() - 1]).unwrap();
    assert!(error(&path).contains("device-state.bin"));
    fs::write(path.join("manifest.json"), "{}").unwrap();
    assert!(error(&path).contains("manifest.json"));
}

#[test]
fn devices_of_recorded_streams_are_consistent() {
    for path in golden() {
        let text = table(&path, &["--check"]);
        assert!(
            text.lines().any(|line| line.starts_with("serial ") && line.ends_with("  consistent")),
            "{text}"
        );
        assert!(!text.contains("inconsistent"), "{text}");
    }
}

#[test]
fn a_device_that_does_not_fit_its_description_is_found() {
    let folder = tempfile::tempdir().unwrap();
    // Eight bytes of a vCPU.
    let path = xbzrle_stream().write(&folder);
    let output = inspect(&path, &["--check"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("cpu  inconsistent\n         inconsistent: env.regs[3]: "), "{text}");
    let output = inspect(&path, &["--check", "--json"]);
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&object["devices"][0]["verdict"], &object["inconsistent"]),
        (&json!("inconsistent"), &json!(1))
    );
}

#[test]
fn two_guests_differ_in_the_fields_that_differ() {
    let folder = tempfile::tempdir().unwrap();
    let left = xbzrle_stream().write(&folder);
    let mut other = xbzrle_stream();
    let eip = other.0.windows(4).rposition(|window| window == [0, 0, 0xff, 0xf0]).unwrap() + 3;
    other.0[eip] = 0xf1;
    let last = other.0.windows(2).position(|window| window == [0x12, 0x34]).unwrap();
    other.0[last] = 0x13;
    let right = folder.path().join("other");
    fs::write(&right, &other.0).unwrap();
    let differ = |right: &Path| table(&left, &[right.to_str().unwrap()]);
    assert_eq!(differ(&left), "the devices of both are the same\n");
    let expected = "\
cpu
         eip             0xfff0 (65520)  0xfff1 (65521)
         cpu/x: regs[3]  0x1234 (4660)   0x1334 (4916)
";
    assert_eq!(differ(&right), expected);
}

#[test]
fn what_is_neither() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains("is not a checkpoint: it has no manifest.json"));
    assert!(error(&folder.path().join("nothing")).contains("No such file"));
    assert!(error(&Stream(Vec::new()).write(&folder)).contains("the file is empty"));
    assert!(error(&Stream(b"some text".to_vec()).write(&folder)).contains("no migration stream"));
    let usage = Command::new(env!("CARGO_BIN_EXE_multifd")).arg("inspect").output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}
