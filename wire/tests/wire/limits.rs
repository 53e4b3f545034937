//! Every limit at n-1, n, n+1, and every rule by its breach.

use multifd_wire::*;

use crate::strategies::OwnedPacket;

const K4: PageSize = PageSize::K4;

fn name(name: &str) -> BlockName {
    BlockName::try_from(name).unwrap()
}

/// The text of the refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, Invalid>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn stream_header_versions() {
    assert_eq!(refused(StreamHeader::parse(b"QEVM\0\0\0\x02")), "stream version: 2, expected 3");
    assert!(StreamHeader::parse(b"QEVM\0\0\0\x04").is_err());
    let http = refused(StreamHeader::parse(b"HTTP/1.1"));
    assert_eq!(http, "stream magic: 0x48545450, expected 0x5145564d");
}

#[test]
fn configuration_refuses() {
    let with = |subsections: &[u8]| Configuration::parse(&[b"\x07\0\0\0\x02pc", subsections, &[8]].concat());
    assert!(with(b"").is_ok());
    assert!(refused(with(b"\x05\x12configuration/cpus\0\0\0\x01")).contains("configuration/cpus"));
    assert!(with(b"\x05\x12configuration/uuid\0\0\0\x02").is_err(), "version");
    let uuid = b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
    assert!(with(uuid).is_ok());
    assert!(with(&uuid.repeat(2)).is_err(), "twice");
    for (count, good) in [(0, false), (1, true), (64, true), (65, false)] {
        let list = [
            &b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0"[..],
            &[count],
            &b"\x01x".repeat(count.into()),
        ];
        assert_eq!(with(&list.concat()).is_ok(), good, "{count} capabilities");
    }
    for (bits, good) in [(11, false), (12, true), (16, true), (17, false)] {
        let bytes = [&b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0"[..], &[bits]].concat();
        assert_eq!(with(&bytes).is_ok(), good, "{bits} bits");
    }
}

#[test]
fn machine_name_length_is_refused_before_its_bytes_arrive() {
    assert!(Configuration::parse(&[7, 0, 0, 0, 0]).is_err());
    assert_eq!(Configuration::parse(&[7, 0, 0, 0, 255]), Ok(None));
    assert!(Configuration::parse(&[7, 0, 0, 1, 0]).is_err());
    assert!(Configuration::parse(&[7, 255, 255, 255, 255]).is_err());
    assert!(Configuration::parse(&[8]).is_err());
}

#[test]
fn machine_versions() {
    for (machine, version) in [
        ("pc-q35-8.0", Some((8, 0))),
        ("pc-i440fx-10.0", Some((10, 0))),
        ("pc-q35-4.0.1", Some((4, 0))),
        ("virt-9.2", Some((9, 2))),
        ("microvm", None),
        ("s390-ccw-virtio-11.1", Some((11, 1))),
        ("pc-q35-rhel9.4.0", None),
        ("pc-q35-noble", None),
        ("pc-i440fx-noble-v2", None),
        ("firecracker-1.14", None),
        ("cloud-hypervisor-48.0", None),
        ("pc-q35-8", None),
        ("pc-q35-8.x", None),
        ("pc-q35-8.0.x", None),
    ] {
        let configuration = Configuration::new(machine);
        assert_eq!(configuration.machine_version(), version, "{}", configuration.machine);
    }
}

#[test]
fn items_and_footers_of_other_types() {
    for byte in 0..=255 {
        let known = matches!(byte, 0..=4 | 8);
        assert_eq!(Item::parse(&[byte]).is_ok(), known, "{byte:#x}");
        assert_eq!(Footer::parse(&[byte]).is_ok(), byte == 0x7e);
    }
    let named = [
        (5, "subsection"),
        (6, "vm description"),
        (7, "configuration"),
        (0x7e, "section footer"),
        (9, "0x09,"),
    ];
    for (byte, name) in named {
        assert!(refused(Item::parse(&[byte])).contains(name), "{byte:#x}");
    }
    let no_name = Item::parse(b"\x04\0\0\0\x01\0\0\0\0\x01\0\0\0\x01");
    assert_eq!(refused(no_name), "section name: 0 bytes, expected 1..=255 bytes");
}

#[test]
fn command_lengths_are_refused_before_their_bytes_arrive() {
    let lens: [(u8, &[u16]); 11] = [
        (1, &[0]),
        (2, &[4]),
        (3, &[0, 16]),
        (4, &[0]),
        (5, &[0]),
        (6, &[26, 450]),
        (7, &[4]),
        (8, &[0]),
        (9, &[0]),
        (10, &[2, 256]),
        (11, &[0]),
    ];
    for (id, good) in lens {
        for len in good {
            let head = |len: u16| [&[8, 0, id][..], &len.to_be_bytes()].concat();
            assert!(Item::parse(&head(*len)).is_ok(), "{len} bytes for command {id}");
            if !matches!(id, 6 | 10) || len > &100 {
                assert!(Item::parse(&head(len + 1)).is_err(), "{} bytes for command {id}", len + 1);
            }
        }
    }
    assert!(refused(Item::parse(&[8, 0, 12, 0, 0])).contains("12"));
    assert!(Item::parse(&[8, 0, 0, 0, 0]).is_err());
}

#[test]
fn discards_have_one_to_twelve_ranges() {
    let parse = |version: u8, end: u8, ranges: &[u8]| {
        let body = [&[version, 1, b'x', end][..], ranges].concat();
        let len = u16::try_from(body.len()).unwrap().to_be_bytes();
        Item::parse(&[&[8, 0, 6][..], &len, &body].concat())
    };
    for (count, good) in [(0, false), (1, true), (12, true), (13, false)] {
        assert_eq!(parse(0, 0, &[0; 16].repeat(count)).is_ok(), good, "{count} ranges");
    }
    assert!(parse(1, 0, &[0; 16]).is_err(), "version");
    assert!(parse(0, 1, &[0; 16]).is_err(), "byte after the name");
    assert!(parse(0, 0, &[0; 15]).is_err(), "half a range");
    assert!(parse(0, 0, &[255; 16]).is_err(), "end above 2^64");
}

#[test]
fn ram_record_flags() {
    let parse = |word: u64| {
        let bytes = [&word.to_be_bytes()[..], b"\x01x\0"].concat();
        RamRecord::parse(&bytes, K4).map(|parsed| parsed.map(|(record, _)| record))
    };
    let good = [0x02, 0x04, 0x08, 0x10, 0x22, 0x28, 0x40, 0x60, 0x100, 0x120, 0x200];
    for flags in 0..0x1000 {
        let of_a_length = [0x40, 0x100].contains(&(flags & !0x20));
        assert!(parse(flags).is_err() || good.contains(&flags), "{flags:#x}");
        // The bytes after it are no length, nor of a zero page whose block is not named.
        if good.contains(&flags) && !of_a_length && flags != 0x22 {
            assert!(parse(flags).is_ok(), "{flags:#x}");
        }
    }
    for (flags, flag) in [(0x80, "HOOK"), (1, "FULL"), (0x0a, "more than one"), (0x400, "unknown")] {
        assert!(refused(parse(flags)).contains(flag), "{flags:#x}");
    }
    assert!(parse(0x1010).is_err() && parse(0x1200).is_err(), "an address where none belongs");
    assert_eq!(RamRecord::parse(&[0, 0, 0, 0, 0, 0, 0, 0x22, 1], K4).unwrap_err().seen, "1");
}

#[test]
fn a_compressed_page_has_at_least_a_byte_and_at_most_what_zlib_makes_of_it() {
    let parse = |len: u32, page| {
        let bytes = [&0x120_u64.to_be_bytes()[..], &len.to_be_bytes()].concat();
        RamRecord::parse(&bytes, page).map(|parsed| parsed.is_some())
    };
    let page = PageSize::new(65536).unwrap();
    for (len, page, good) in [
        (0, K4, false),
        (1, K4, true),
        (4110, K4, true),
        (4111, K4, false),
        (u32::MAX, K4, false),
        (65569, page, true),
        (65570, page, false),
    ] {
        assert_eq!(parse(len, page).is_ok(), good, "{len}");
    }
}

#[test]
fn flags_reach_as_far_as_the_page_size() {
    let page = PageSize::new(65536).unwrap();
    let word = 0x1_1008_u64.to_be_bytes();
    assert!(RamRecord::parse(&[&word[..], b"\x01x"].concat(), page).is_err());
    let record = RamRecord::Page { offset: 0x1_1000, block: BlockRef::Named(name("x")) };
    assert_eq!(RamRecord::parse(&[&word[..], b"\x01x"].concat(), K4), Ok(Some((record, 10))));
}

#[test]
fn delta_lengths() {
    let parse = |encoding: u8, len: u16| {
        RamRecord::parse(&[&[0, 0, 0, 0, 0, 0, 0, 0x60, encoding][..], &len.to_be_bytes()].concat(), K4)
    };
    for (len, good) in [(0, false), (1, true), (4095, true), (4096, true), (4097, false)] {
        assert_eq!(parse(1, len).is_ok(), good, "{len} bytes");
    }
    assert!(parse(0, 1).is_err() && parse(2, 1).is_err());
}

fn entry(text: &str, used_len: u64) -> BlockEntry {
    BlockEntry { name: name(text), used_len, page_size: None, guest_address: None, mapped_ram: None }
}

#[test]
fn block_list_adds_up() {
    let mut list = BlockListBuilder::new(0x5000, K4);
    assert_eq!(list.push(entry("a", 0x3000)), Ok(false));
    assert!(list.push(entry("b", 0)).is_err());
    assert!(list.push(entry("b", 0x1001)).is_err());
    assert!(refused(list.push(entry("b", 0x3000))).contains("12288 bytes for b"));
    assert!(list.push(entry("a", 0x1000)).is_err(), "the name again");
    assert!(!list.complete());
    assert_eq!(list.push(entry("b", 0x2000)), Ok(true));
    assert!(list.complete() && list.push(entry("c", 0x1000)).is_err());
    assert_eq!(list.finish(), [entry("a", 0x3000), entry("b", 0x2000)]);
}

#[test]
fn block_list_has_a_limit() {
    let mut list = BlockListBuilder::new(u64::MAX, K4);
    for number in 0..MAX_BLOCKS {
        assert_eq!(list.push(entry(&number.to_string(), 0x1000)), Ok(false));
    }
    assert_eq!(refused(list.push(entry("x", 0x1000))), "ram blocks: 4097, expected at most 4096");
}

#[test]
fn mapped_ram_places() {
    let push = |page_size, bitmap_offset, pages_offset| {
        let mapped_ram = Some(MappedRamHeader { page_size, bitmap_offset, pages_offset });
        let used_len = 65 << 12;
        BlockListBuilder::new(u64::MAX, K4).push(BlockEntry { mapped_ram, ..entry("a", used_len) })
    };
    assert_eq!(MappedRamHeader::bitmap_len(65 << 12, K4), 16);
    assert!(push(4096, 0x10_0000 - 16, 0x10_0000).is_ok());
    assert!(push(4096, 0x10_0000 - 15, 0x10_0000).is_err(), "bitmap in the pages");
    assert!(push(8192, 0x1000, 0x10_0000).is_err(), "page size");
    assert!(push(4096, 0x1000, 0x10_1000).is_err(), "alignment");
    assert!(push(4096, u64::MAX, 0x10_0000).is_err() && push(4096, 0, !0 << 20).is_ok());
    assert!(MappedRamHeader::parse(&[&[0, 0, 0, 2][..], &[0; 24]].concat()).is_err(), "version");
}

#[test]
fn a_shared_block_need_not_be_in_a_mapped_file() {
    let nowhere = MappedRamHeader { page_size: 4096, bitmap_offset: 0, pages_offset: 0 };
    let push = |guest_address| {
        let mapped_ram = Some(nowhere);
        BlockListBuilder::new(4096, K4).push(BlockEntry { guest_address, mapped_ram, ..entry("a", 4096) })
    };
    assert!(!nowhere.is_stored());
    assert_eq!(push(Some(0)), Ok(true));
    assert!(push(None).is_err());
}

fn packet(normal: usize, zero: usize) -> OwnedPacket {
    OwnedPacket {
        page: K4,
        codec: 0,
        sync: false,
        packet_num: 0,
        block: name("pc.ram"),
        normal: vec![0x1000; normal],
        zero: vec![0x2000; zero],
        payload_len: u32::try_from(normal * 4096).unwrap(),
    }
}

/// Overwrites a be32 of an encoded packet.
fn poked(mut bytes: Vec<u8>, at: usize, value: u32) -> Vec<u8> {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    bytes
}

#[test]
fn packet_counts() {
    let [alloc_at, normal_at, zero_at] = [12, 16, 32];
    let good = |bytes: Vec<u8>| RamPacket::parse(&bytes, K4).is_ok();
    for (normal, zero) in [(128, 0), (0, 128), (127, 1), (1, 127), (0, 0)] {
        assert!(good(packet(normal, zero).encode()), "{normal} and {zero}");
    }
    assert!(!good(poked(packet(128, 0).encode(), zero_at, 1)));
    assert!(!good(poked(packet(0, 128).encode(), normal_at, 1)));
    assert!(!good(poked(packet(128, 0).encode(), normal_at, 129)));
    assert!(!good(poked(packet(1, 1).encode(), zero_at, u32::MAX)));
    for (alloc, is_good) in [(0, false), (1, false), (2, true), (128, true), (12800, true), (12801, false)] {
        assert_eq!(good(poked(packet(1, 1).encode(), alloc_at, alloc)), is_good, "{alloc} allocated");
    }
}

#[test]
fn packet_payloads() {
    const PAYLOAD: usize = 20;
    let payload_len = |bytes: &[u8]| RamPacket::parse(bytes, K4).map(|packet| packet.payload_len());
    for (len, good) in [(8191, false), (8192, true), (8193, false), (0, false)] {
        assert_eq!(payload_len(&poked(packet(2, 0).encode(), PAYLOAD, len)).is_ok(), good, "{len} bytes raw");
    }
    let zstd = OwnedPacket { codec: 4, ..packet(2, 0) }.encode();
    for (len, good) in [(0, false), (1, true), (1 << 20, true), ((1 << 20) + 1, false)] {
        assert_eq!(payload_len(&poked(zstd.clone(), PAYLOAD, len)).is_ok(), good, "{len} bytes packed");
    }
    // Stale lengths of senders before 9.0.
    for pages_of_none in [packet(0, 0), packet(0, 3)] {
        assert_eq!(payload_len(&poked(pages_of_none.encode(), PAYLOAD, u32::MAX)), Ok(0));
    }
}

#[test]
fn packet_offsets_block_and_length() {
    let good = |bytes: &[u8]| RamPacket::parse(bytes, K4).is_ok();
    let bytes = packet(1, 1).encode();
    assert!(!good(&poked(bytes.clone(), 324, 0x1001)), "normal page");
    assert!(!good(&poked(bytes.clone(), 332, 0x1800)), "zero page");
    assert!(good(&poked(bytes.clone(), 340, 1)), "unused offsets are not looked at");
    assert!(!good(&poked(bytes.clone(), 64, 0)), "no name");
    assert!(good(&poked(packet(0, 0).encode(), 64, u32::MAX)), "no pages, so no name");
    let mut long = bytes.clone();
    long[64..319].fill(b'x');
    assert_eq!(RamPacket::parse(&long, K4).unwrap().block().unwrap().len(), 255);
    long[319] = b'x';
    assert!(!good(&long), "no NUL");
    assert!(!good(&bytes[..1343]) && !good(&[&bytes[..], &[0]].concat()), "length");
    assert!(!good(&poked(bytes.clone(), 0, STREAM_MAGIC)) && !good(&poked(bytes.clone(), 4, 2)));
    assert!(!good(&poked(bytes.clone(), 8, 0x80)) && !good(&poked(bytes, 8, 0x40)));
    assert_eq!((header_len(K4), pages_per_packet(K4)), (1344, 128));
}

#[test]
fn prefix_of_a_packet() {
    let kind = |magic: u32, version: u32, flags: u32| {
        let words = [magic, version, flags].map(u32::to_be_bytes).concat();
        PacketKind::parse(words.as_slice().try_into().unwrap())
    };
    assert_eq!(kind(MULTIFD_MAGIC, 1, 0x04), Ok(PacketKind::Ram));
    assert_eq!(kind(MULTIFD_MAGIC, 1, 0x40), Ok(PacketKind::DeviceState));
    assert!(kind(MULTIFD_MAGIC, 1, 0x41).is_err(), "a sync point in device state");
    assert!(kind(MULTIFD_MAGIC, 2, 0).is_err() && kind(STREAM_MAGIC, 1, 0).is_err());
}

#[test]
fn device_state_lengths() {
    let encode =
        |payload_len| DeviceStatePacket { idstr: "x".to_owned(), instance_id: 0, payload_len }.encode();
    for (len, good) in [(0, false), (1, true), (64 << 20, true), ((64 << 20) + 1, false)] {
        assert_eq!(DeviceStatePacket::parse(&encode(len)).is_ok(), good, "{len} bytes");
    }
    let mut ram = encode(1);
    ram[11] = 0;
    assert!(DeviceStatePacket::parse(&ram).is_err());
}

#[test]
fn return_message_lengths_are_refused_before_their_bytes_arrive() {
    let good =
        |kind: u16, len: u16| ReturnMessage::parse(&[kind.to_be_bytes(), len.to_be_bytes()].concat()).is_ok();
    let (hello, alive, failure, loaded, later) = (0x4d46, 0x4d47, 0x4d48, 0x4d49, 0x4dff);
    let qemu = [(1, 4, 4), (2, 4, 4), (3, 14, 268), (4, 12, 12), (5, 2, 256), (6, 4, 4), (7, 0, 0)];
    let ours = [(hello, 10, 512), (alive, 0, 0), (failure, 1, 512), (loaded, 8, 8), (later, 0, 512)];
    for (kind, min, max) in qemu.into_iter().chain(ours) {
        assert!(good(kind, min) && good(kind, max), "type {kind}");
        assert!(!good(kind, max + 1) && (min == 0 || !good(kind, min - 1)), "type {kind}");
    }
    assert!(!good(0, 0) && !good(8, 0));
}

#[test]
fn return_message_bodies() {
    let value = |kind: u8, value: u8| ReturnMessage::parse(&[0, kind, 0, 4, 0, 0, 0, value]);
    assert!(value(6, 1).is_ok() && value(6, 0).is_err() && value(6, 2).is_err());
    assert!(ReturnMessage::parse(b"\0\x05\0\x04\x02vga").is_err(), "name shorter than the message");
    assert!(ReturnMessage::parse(b"\0\x05\0\x04\x04vga").is_err(), "name longer than the message");
    assert!(ReturnMessage::parse(b"\x4d\x48\0\x02\x01\xff").is_err(), "a reason that is no text");
    let later = b"\x4d\x46\0\x0c\0\x02\0\0\0\0\0\0\0\x01ab";
    let hello = ReturnMessage::Hello(Hello { version: 2, features: 1 });
    assert_eq!(ReturnMessage::parse(later), Ok(Some((hello, later.len()))));
}

#[test]
fn a_tail_is_given_back_as_it_came() {
    let mut scanner = TailScanner::new();
    assert_eq!(scanner.push(b"\x04device"), Ok(None));
    assert_eq!(scanner.bytes(), b"\x04device");
    assert_eq!(scanner.into_bytes(), b"\x04device");
}
