//! Writes the seeds of the corpora: what a legal peer sends, in the form that each target reads.

#[path = "../../../../vmstate/tests/vmstate/corpus.rs"]
#[allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    dead_code,
    reason = "a part of tests, which need more of it"
)]
mod corpus;

use std::fs;
use std::io;
use std::path::Path;

use multifd_codecs::xbzrle::{Outcome, encode};
use multifd_codecs::{Lz4, Zlib, Zstd};
use multifd_engine::{DeviceState, Source};
use multifd_tests::peer::{Codec, Lane, Memory, Recorder, Recording, Step, Style, SyncPoints, devices};
use multifd_tests::{Scratch, ZeroPages};
use multifd_transports::Endpoint;
use multifd_wire::{
    BlockEntry, BlockRef, Command, Configuration, DeviceStatePacket, DiscardRange, Hello, InitialPacket,
    Item, MappedRamHeader, PageSize, RamRecord, ReturnMessage, SectionHead, SectionId,
};

/// Bytes of a seed at most.
const MAX_SEED: usize = 64 << 10;

/// Bytes of a device section that is a seed: those of most devices but virtio-pci's.
const MAX_SECTION: usize = 5000;

const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    let write = |target: &str, name: &str, bytes: Vec<u8>| {
        assert!(bytes.len() < MAX_SEED, "{target}/{name}: {} bytes", bytes.len());
        fs::create_dir_all(corpus.join(target))?;
        fs::write(corpus.join(target).join(name), bytes)
    };
    for (name, bytes) in parts()? {
        write("wire", name, [vec![0, 6], bytes].concat())?;
    }
    for (name, stream) in streams()? {
        write("recording", name, extents(&stream))?;
        write("destination", name, stream)?;
    }
    write("recording", "mapped-ram", extents(&mapped_file()?))?;
    for (name, style) in parallel() {
        write("channels", name, interleaved(&migration(style)))?;
    }
    for (name, bytes) in changes() {
        write("streams", name, bytes.to_vec())?;
    }
    for (name, bytes) in switches() {
        write("postcopy", name, bytes)?;
    }
    let codecs =
        [("lz4", payloads(&Lz4)), ("zlib", payloads(&Zlib::default())), ("zstd", payloads(&Zstd::default()))];
    for (target, payloads) in codecs {
        write(target, "payloads", payloads)?;
        write(target, "pages", [&[1][..], &[0, 0, 5], b"pages", &[7, 0, 0]].concat())?;
    }
    for (name, bytes) in deltas() {
        write("xbzrle", name, bytes)?;
    }
    for (name, bytes) in records() {
        write("tls", name, bytes)?;
    }
    for (name, bytes) in sections() {
        write("vmstate", &name, bytes)?;
    }
    Ok(())
}

/// A section of each kind that QEMU wrote, the first that is small.
fn sections() -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<(String, Vec<u8>)> = Vec::new();
    for recorded in corpus::all() {
        let place = if recorded.name.contains("mmio") { "mmio-" } else { "" };
        let name = format!("{place}{}", recorded.kind());
        let Ok(len) = u8::try_from(recorded.name.len()) else { continue };
        let Ok(version) = u8::try_from(recorded.version) else { continue };
        if recorded.payload.len() > MAX_SECTION || seeds.iter().any(|(seed, _)| *seed == name) {
            continue;
        }
        let bytes = [&[len], recorded.name.as_bytes(), &[version], &recorded.payload].concat();
        seeds.push((name, bytes));
    }
    seeds
}

/// Everything that a stream is made of, one at a time.
fn parts() -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let mut out = Vec::new();
    let mut add = |name, encode: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        encode(&mut bytes);
        out.push((name, bytes));
    };
    let block = BlockEntry {
        name: "pc.ram".try_into().map_err(io::Error::other)?,
        used_len: 1 << 20,
        page_size: Some(4096),
        guest_address: Some(0),
        mapped_ram: Some(MappedRamHeader { page_size: 4096, bitmap_offset: 0x1000, pages_offset: 1 << 20 }),
    };
    let name = || block.name.clone();
    let head = SectionHead { id: SectionId(2), idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
    let (ranges, capabilities) = (vec![DiscardRange { offset: 0, len: 4096 }], vec!["mapped-ram".to_owned()]);
    let configuration = {
        let mut configuration = Configuration::new("pc-q35-10.0").with_capabilities(capabilities);
        configuration.page_bits = Some(12);
        configuration.uuid = Some([1; 16]);
        configuration
    };
    add("configuration", &|out| configuration.encode(out));
    add("section", &|out| Item::SectionStart(head.clone()).encode(out));
    let discard = Item::Command(Command::RamDiscard { block: name(), ranges });
    add("discard", &|out| discard.encode(out));
    add("page", &|out| {
        RamRecord::Page { offset: 0x3000, block: BlockRef::Named(name()) }.encode(PageSize::K4, out);
    });
    add("delta", &|out| {
        RamRecord::Xbzrle { offset: 0, block: BlockRef::Same, len: 9 }.encode(PageSize::K4, out);
    });
    add("compressed", &|out| {
        RamRecord::Compressed { offset: 0, block: BlockRef::Same, len: 9 }.encode(PageSize::K4, out);
    });
    add("block", &|out| block.encode(out));
    add("request", &|out| {
        ReturnMessage::RequestPages { block: Some(name()), offset: 0, len: 4096 }.encode(out);
    });
    add("hello-of-multifd", &|out| ReturnMessage::Hello(Hello { version: 1, features: 1 }).encode(out));
    add("hello-of-a-channel", &|out| out.extend(InitialPacket { uuid: [0; 16], channel: 1 }.encode()));
    let state = DeviceStatePacket { idstr: "vfio".to_owned(), instance_id: 0, payload_len: 9 };
    add("device-packet", &|out| out.extend(state.encode()));
    let packet = migration(Style::multifd(1)).write("packet", 0).clone();
    add("packet", &|out| out.extend(&packet));
    add("tail", &|out| out.extend(devices::tail()));
    add("description", &|out| out.extend([devices::description().split_off(5), vec![0; 40]].concat()));
    let (_, isapc) = recorded("isapc")?;
    add("isapc", &|out| out.extend(&isapc));
    Ok(out)
}

/// A stream that QEMU wrote.
fn recorded(machine: &'static str) -> io::Result<(&'static str, Vec<u8>)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wire/tests/golden");
    Ok((machine, fs::read(golden.join(format!("{machine}-10.0.2.stream")))?))
}

/// Streams on one connection.
fn streams() -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let styles = [
        ("plain", Style::default()),
        ("xbzrle", Style { xbzrle: true, full_names: true, ..Style::default() }),
        ("no-return-path", Style { return_path: false, description: false, ..Style::default() }),
        ("switchover-start", Style { switchover_start: true, stray_flush: true, ..Style::default() }),
    ];
    let scripted = styles.map(|(name, style)| (name, migration(style).bytes(Lane::Main)));
    Ok(scripted.into_iter().chain([recorded("microvm")?]).collect())
}

/// Styles with channels.
fn parallel() -> [(&'static str, Style); 5] {
    let per_section = Style {
        machine: "pc-i440fx-7.2",
        sync: SyncPoints::PerSection,
        zero_pages: ZeroPages::Legacy,
        ..Style::multifd(2)
    };
    let frames = Codec::ZstdFrames { checksum: true, content_size: true };
    [
        ("none", Style { packet_pages: 4, ..Style::multifd(2) }),
        ("zlib", Style { codec: Codec::Zlib, ..Style::multifd(1) }),
        ("zstd", Style { codec: Codec::Zstd, packet_pages: 3, ..Style::multifd(3) }),
        ("zstd-frames", Style { codec: frames, ..Style::multifd(1) }),
        ("per-section", per_section),
    ]
}

fn guest() -> Memory {
    let mut memory = Memory::zero(&[("pc.ram", 6), ("pc.bios", 2)]);
    // A seed gives eight pages in a row one kind of content.
    for (seed, pages) in (0..).zip(memory.all().chunks(2)) {
        memory.refill(pages, seed);
    }
    memory
}

fn migration(style: Style) -> Recording {
    Recorder::migration(style, &mut guest())
}

/// A file with pages at fixed places.
fn mapped_file() -> io::Result<Vec<u8>> {
    let scratch = Scratch::new().expect("a folder");
    let path = scratch.path("file");
    let configuration = Configuration::new("pc-q35-10.0");
    let blocks = guest().provide_content().expect("memory for a small guest");
    let source = Source::builder(blocks, configuration).paused_guest().mapped_ram(true);
    let endpoint = Endpoint::File { path: path.clone(), offset: 0 };
    let sent = source.build().and_then(|source| {
        let mut precopy = source.connect(&endpoint)?;
        precopy.round()?;
        precopy.stop_copy()?.commit(&DeviceState::opaque("state", 1, b"of devices"))
    });
    sent.map_err(io::Error::other)?;
    fs::read(path)
}

/// As target `recording` takes a file: what lies between holes.
fn extents(file: &[u8]) -> Vec<u8> {
    let (mut out, mut offset) = (Vec::new(), 0_u32);
    for chunk in file.chunks(PAGE) {
        if chunk.iter().any(|byte| *byte != 0) || chunk.len() < PAGE {
            out.extend(offset.to_be_bytes());
            out.extend(counted(chunk));
        }
        offset += 4096;
    }
    out
}

/// As target `channels` takes the writes of several connections.
fn interleaved(recording: &Recording) -> Vec<u8> {
    let mut out = Vec::new();
    for step in &recording.steps {
        let Step::Send { lane, bytes, .. } = step else { continue };
        for piece in bytes.chunks(0x8000) {
            out.push(match lane {
                Lane::Main => 0,
                Lane::Channel(number) => number + 1,
            });
            out.extend(counted(piece));
        }
    }
    out
}

fn counted(bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).expect("a piece of less than 64 KiB");
    [&len.to_be_bytes()[..], bytes].concat()
}

/// Styles and changes of target `streams`.
fn changes() -> [(&'static str, &'static [u8]); 8] {
    [
        ("single", &[0, 0, 4]),
        ("single-xbzrle", &[0, 0x30, 0]),
        ("two-channels", &[0x42, 0, 4]),
        ("three-channels-zlib-per-section", &[0x27, 3, 6]),
        ("zstd-field-overwritten", &[0x2d, 0, 4, 0, 9, 0, 16, 5, 2]),
        ("channel-cut", &[0x42, 0, 4, 0, 30, 0, 7, 0, 0]),
        ("packet-twice", &[0x2d, 4, 4, 0, 12, 0, 0, 7, 0]),
        ("writes-swapped", &[0x42, 6, 4, 0, 20, 0, 0, 8, 3]),
    ]
}

/// Post-copies: what a source sends that switches, and what a destination says.
fn switches() -> [(&'static str, Vec<u8>); 7] {
    let stream = multifd_fuzz::switched();
    let half = stream.len() / 2;
    let request = |offset: u64, len: u32| {
        let mut bytes = Vec::new();
        let block = "pc.ram".try_into().ok();
        ReturnMessage::RequestPages { block, offset, len }.encode(&mut bytes);
        [&[1][..], &counted(&bytes)].concat()
    };
    let right = |answers: usize| [1, 0, 0].repeat(answers);
    // A byte for which end, then the two links.
    let links = |first: &[u8], second: &[u8]| [&[2][..], &counted(first), &counted(second)].concat();
    let asks = [&[0][..], &right(6), &request(0x3000, 4096), &request(0, 70 * 4096)].concat();
    let cut = [&[1][..], &right(7)].concat();
    [
        ("at-rest", [&[0][..], &stream].concat()),
        ("live", [&[1][..], &stream].concat()),
        ("live-cut", [&[1][..], stream.get(..half).unwrap_or_default()].concat()),
        ("right", links(&[0], &[0])),
        ("asks", links(&asks, &[0])),
        ("cut-and-resumed", links(&cut, &[0])),
        ("cut-twice", links(&cut, &[&[1][..], &right(1)].concat())),
    ]
}

/// Packets of one channel.
fn payloads(codec: &dyn multifd_codecs::Codec) -> Vec<u8> {
    let memory = guest();
    let mut encoder = codec.encoder().expect("an encoder");
    let mut out = vec![0];
    for pages in memory.all().chunks(3) {
        let content: Vec<u8> = pages.iter().flat_map(|at| memory.page(*at)).copied().collect();
        let mut payload = Vec::new();
        encoder.prepare(&content, &mut payload).expect("any page can be encoded");
        out.push(u8::try_from(pages.len() - 1).expect("three pages"));
        out.extend(counted(&payload));
    }
    out
}

/// Deltas and pairs of pages.
fn deltas() -> [(&'static str, Vec<u8>); 2] {
    let old: Vec<u8> = (0..=255).cycle().take(PAGE).collect();
    let mut new = old.clone();
    new.iter_mut().skip(100).step_by(700).for_each(|byte| *byte ^= 1);
    new.iter_mut().skip(2000).take(300).for_each(|byte| *byte = 7);
    let mut delta = vec![0; PAGE];
    let Outcome::Delta(len) = encode(&old, &new, &mut delta) else { unreachable!("the pages are alike") };
    delta.truncate(len);
    [("delta", [vec![0], delta].concat()), ("pages", [vec![1], counted(&old), new].concat())]
}

/// Records of TLS.
fn records() -> [(&'static str, Vec<u8>); 3] {
    let record = |content: u8, text: &[u8]| [vec![content], counted(text)].concat();
    let (data, update) = (record(23, b"data"), record(22, &[24, 0, 0, 1, 0]));
    let ticket = [record(22, &[4, 0, 0, 4, 1]), record(22, &[2, 3, 4])].concat();
    let close = record(21, &[1, 0]);
    [
        ("data", [vec![15], data.clone(), record(23, &[5; 9000]), close].concat()),
        ("key-update", [vec![3], data.clone(), update, data.clone()].concat()),
        ("ticket-and-bytes", [vec![0], ticket, data, record(0, &[23, 3, 3, 0, 40, 1, 2])].concat()),
    ]
}
