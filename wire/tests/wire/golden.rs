//! Bytes spelled out by hand from docs/wire.md.

use multifd_wire::*;

/// The value has these bytes, and these bytes are the value.
macro_rules! same {
    ($type:ident, $value:expr, $bytes:expr) => {{
        let (value, bytes): ($type, Vec<u8>) = ($value, $bytes.to_vec());
        let mut out = vec![0xaa];
        value.encode(&mut out);
        assert_eq!(out[1..], bytes);
        assert_eq!($type::parse(&bytes), Ok(Some((value, bytes.len()))));
    }};
}

fn name(name: &str) -> BlockName {
    BlockName::try_from(name).unwrap()
}

#[test]
fn stream_header() {
    same!(StreamHeader, StreamHeader, b"QEVM\0\0\0\x03");
}

#[test]
fn configuration() {
    let mut configuration = Configuration::new("pc-q35-10.0")
        .with_capabilities(vec!["x-ignore-shared".to_owned(), "mapped-ram".to_owned()]);
    configuration.page_bits = Some(14);
    configuration.uuid = Some(*b"0123456789abcdef");
    let bytes = [
        &[0x07, 0, 0, 0, 11][..],
        b"pc-q35-10.0",
        b"\x05\x1econfiguration/target-page-bits\0\0\0\x01",
        &[0, 0, 0, 14],
        b"\x05\x1aconfiguration/capabilities\0\0\0\x01",
        b"\0\0\0\x02\x0fx-ignore-shared\x0amapped-ram",
        b"\x05\x12configuration/uuid\0\0\0\x01",
        b"0123456789abcdef",
    ]
    .concat();
    let mut out = Vec::new();
    configuration.encode(&mut out);
    assert_eq!(out, bytes);
    assert_eq!(Configuration::parse(&bytes), Ok(None), "what comes next decides");
    let followed = [&bytes[..], &[0x08]].concat();
    assert_eq!(Configuration::parse(&followed), Ok(Some((configuration, bytes.len()))));
}

#[test]
fn section_heads_and_footer() {
    let head = SectionHead { id: SectionId(2), idstr: "ram".to_owned(), instance_id: 1, version_id: 4 };
    let bytes: &[u8] = b"\0\0\0\x02\x03ram\0\0\0\x01\0\0\0\x04";
    same!(Item, Item::SectionStart(head.clone()), [&[1], bytes].concat());
    same!(Item, Item::SectionFull(head), [&[4], bytes].concat());
    same!(Item, Item::SectionPart(SectionId(0x0102)), [2, 0, 0, 1, 2]);
    same!(Item, Item::SectionEnd(SectionId(3)), [3, 0, 0, 0, 3]);
    same!(Item, Item::Eof, [0]);
    same!(Footer, Footer(SectionId(7)), [0x7e, 0, 0, 0, 7]);
}

#[test]
fn commands() {
    let same = |command, bytes: &[u8]| same!(Item, Item::Command(command), [&[8], bytes].concat());
    same(Command::OpenReturnPath, &[0, 1, 0, 0]);
    same(Command::Ping(HELLO_PING), b"\0\x02\0\x04mfd1");
    same(Command::PostcopyAdvise(None), &[0, 3, 0, 0]);
    let advise = Advise { page_sizes: 0x20_1000, target_page: 0x1000 };
    same(
        Command::PostcopyAdvise(Some(advise)),
        &[0, 3, 0, 16, 0, 0, 0, 0, 0, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0],
    );
    same(Command::PostcopyListen, &[0, 4, 0, 0]);
    same(Command::PostcopyRun, &[0, 5, 0, 0]);
    let ranges = vec![DiscardRange { offset: 0x3000, len: 0x1000 }];
    same(
        Command::RamDiscard { block: name("pc.ram"), ranges },
        b"\0\x06\0\x19\0\x06pc.ram\0\0\0\0\0\0\0\x30\0\0\0\0\0\0\0\x10\0",
    );
    same(Command::Packaged(0x0102_0304), &[0, 7, 0, 4, 1, 2, 3, 4]);
    same(Command::EnableColo, &[0, 8, 0, 0]);
    same(Command::PostcopyResume, &[0, 9, 0, 0]);
    same(Command::RecvBitmap(name("vga")), b"\0\x0a\0\x04\x03vga");
    same(Command::SwitchoverStart, &[0, 11, 0, 0]);
    same(Command::PostcopyChannels, &[0x4d, 0x50, 0, 0]);
    same(Command::Resumable([7; 32]), &[&[0x4d, 0x51, 0, 32][..], &[7; 32]].concat());
    same(Command::Proof([8; 32]), &[&[0x4d, 0x52, 0, 32][..], &[8; 32]].concat());
    same(
        Command::Digest { block: name("vga"), digest: 0x0102_0304_0506_0708 },
        b"\x4d\x46\0\x0c\x03vga\x01\x02\x03\x04\x05\x06\x07\x08",
    );
}

#[test]
fn wishes_of_a_multifd_source() {
    let wishes = |checksums, digest, mixed| Wishes { checksums, digest, mixed };
    for (wishes, ping) in [
        (wishes(false, false, false), b"mfw\0"),
        (wishes(true, false, false), b"mfw\x01"),
        (wishes(false, true, false), b"mfw\x02"),
        (wishes(false, false, true), b"mfw\x04"),
        (wishes(true, true, true), b"mfw\x07"),
    ] {
        assert_eq!(wishes.ping(), u32::from_be_bytes(*ping));
        assert_eq!(Wishes::of_ping(wishes.ping()), Some(wishes));
    }
    // Those of a later version are passed over, and another PING has none.
    assert_eq!(Wishes::of_ping(0x6d66_77f9), Some(wishes(true, false, false)));
    for ping in [HELLO_PING, 0x6d66_7800, 0x6d66_76ff, 0, 1] {
        assert_eq!(Wishes::of_ping(ping), None);
    }
}

#[test]
fn checksums_of_a_packet() {
    let mut header = Vec::new();
    RamPacketHeader {
        flags: PacketFlags::pages(CodecId::NONE),
        packet_num: 1,
        block: Some(&name("pc.ram")),
        normal: &[0x5000],
        zero: &[],
        payload_len: 4096,
    }
    .encode(PageSize::K4, &mut header);
    let plain = header.clone();
    PacketChecks::seal(&mut header, 0x0102_0304_0506_0708, |header| {
        assert_eq!(header[48..56], [0; 8], "its own field counts as 0");
        0x1112_1314_1516_1718
    })
    .unwrap();
    let expected = b"\0\0\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\x11\x12\x13\x14\x15\x16\x17\x18";
    assert_eq!(header[36..56], *expected);
    assert!(header[..36] == plain[..36] && header[56..] == plain[56..]);
}

#[test]
fn ram_records() {
    let same = |record: RamRecord, bytes: &[u8]| {
        let mut out = Vec::new();
        record.encode(PageSize::K4, &mut out);
        assert_eq!(out, bytes);
        assert_eq!(RamRecord::parse(bytes, PageSize::K4), Ok(Some((record, bytes.len()))));
    };
    let named = || BlockRef::Named(name("pc.ram"));
    same(RamRecord::EndOfSection, &[0, 0, 0, 0, 0, 0, 0, 0x10]);
    same(RamRecord::Flush, &[0, 0, 0, 0, 0, 0, 2, 0]);
    same(RamRecord::MemSize { total: 0x0123_4000 }, &[0, 0, 0, 0, 1, 0x23, 0x40, 4]);
    same(RamRecord::Page { offset: 0x5000, block: named() }, b"\0\0\0\0\0\0\x50\x08\x06pc.ram");
    same(RamRecord::Page { offset: 0x5000, block: BlockRef::Same }, b"\0\0\0\0\0\0\x50\x28");
    same(RamRecord::Zero { offset: 0x6000, block: named() }, b"\0\0\0\0\0\0\x60\x02\x06pc.ram\0");
    same(RamRecord::Zero { offset: 0x6000, block: BlockRef::Same }, b"\0\0\0\0\0\0\x60\x22\0");
    let compressed = |block| RamRecord::Compressed { offset: 0x8000, block, len: 0x123 };
    same(compressed(named()), b"\0\0\0\0\0\0\x81\0\x06pc.ram\0\0\x01\x23");
    same(compressed(BlockRef::Same), b"\0\0\0\0\0\0\x81\x20\0\0\x01\x23");
    let xbzrle = RamRecord::Xbzrle { offset: 0x7000, block: BlockRef::Same, len: 0x0123 };
    same(xbzrle, &[0, 0, 0, 0, 0, 0, 0x70, 0x60, 1, 0x01, 0x23]);
}

#[test]
fn block_entries() {
    let entry = BlockEntry {
        name: name("ram"),
        used_len: 0x1000,
        page_size: Some(0x20_0000),
        guest_address: Some(0x0100_0000),
        mapped_ram: Some(MappedRamHeader { page_size: 0x1000, bitmap_offset: 0x40, pages_offset: 0x10_0000 }),
    };
    let bytes = [
        &b"\x03ram"[..],
        &[0, 0, 0, 0, 0, 0, 0x10, 0],
        &[0, 0, 0, 0, 0, 0x20, 0, 0],
        &[0, 0, 0, 0, 1, 0, 0, 0],
        &[0, 0, 0, 1],
        &[0, 0, 0, 0, 0, 0, 0x10, 0],
        &[0, 0, 0, 0, 0, 0, 0, 0x40],
        &[0, 0, 0, 0, 0, 0x10, 0, 0],
    ]
    .concat();
    let mut out = Vec::new();
    entry.encode(&mut out);
    assert_eq!(out, bytes);
    let all = BlockListFormat { page_sizes: true, guest_addresses: true, mapped_ram: true };
    assert_eq!(BlockEntry::parse(&bytes, all), Ok(Some((entry, bytes.len()))));
}

#[test]
fn initial_packet() {
    let packet = InitialPacket { uuid: *b"0123456789abcdef", channel: 9 };
    let bytes = [&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1][..], b"0123456789abcdef", &[9], &[0; 39]].concat();
    assert_eq!(packet.encode()[..], bytes);
    assert_eq!(InitialPacket::parse(bytes.as_slice().try_into().unwrap()), Ok(packet));
}

#[test]
fn ram_packet() {
    let header = RamPacketHeader {
        flags: PacketFlags::pages(CodecId::ZSTD),
        packet_num: 0x0102,
        block: Some(&name("pc.ram")),
        normal: &[0x3000, 0x1000],
        zero: &[0x9000],
        payload_len: 77,
    };
    let mut bytes = vec![0; 1344];
    bytes[..36].copy_from_slice(&[
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 128, 0, 0, 0, 2, 0, 0, 0,
        77, // to the payload
        0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 1,
    ]);
    bytes[64..70].copy_from_slice(b"pc.ram");
    for (at, offset) in [(320, 0x30), (328, 0x10), (336, 0x90)] {
        bytes[at + 6] = offset;
    }
    let mut out = vec![0xaa];
    header.encode(PageSize::K4, &mut out);
    assert_eq!(out[1..], bytes);
    let packet = RamPacket::parse(&bytes, PageSize::K4).unwrap();
    assert_eq!((packet.flags(), packet.payload_len(), packet.packet_num()), (header.flags, 77, 0x0102));
    assert_eq!(packet.block(), Some("pc.ram"));
    assert!(packet.normal_offsets().eq([0x3000, 0x1000]) && packet.zero_offsets().eq([0x9000]));
    assert_eq!(PacketKind::parse(bytes.first_chunk().unwrap()), Ok(PacketKind::Ram));
}

#[test]
fn sync_packet_has_flag_one_and_no_pages() {
    let header = RamPacketHeader {
        flags: PacketFlags::SYNC,
        packet_num: 5,
        block: None,
        normal: &[],
        zero: &[],
        payload_len: 0,
    };
    let mut out = Vec::new();
    header.encode(PageSize::K4, &mut out);
    let mut bytes = vec![0; 1344];
    bytes[..12].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 1]);
    bytes[31] = 5;
    assert_eq!(out, bytes);
    assert!(RamPacket::parse(&bytes, PageSize::K4).unwrap().flags().sync());
}

#[test]
fn device_state_packet() {
    let packet = DeviceStatePacket { idstr: "vfio".to_owned(), instance_id: 3, payload_len: 0x0102 };
    let mut bytes = [0; 276];
    bytes[..16].copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40vfio");
    bytes[268..].copy_from_slice(&[0, 0, 0, 3, 0, 0, 1, 2]);
    assert_eq!(packet.encode(), bytes);
    assert_eq!(DeviceStatePacket::parse(&bytes), Ok(packet));
    assert_eq!(PacketKind::parse(bytes.first_chunk().unwrap()), Ok(PacketKind::DeviceState));
    assert!(RamPacket::parse(&[&bytes[..], &[0; 1068]].concat(), PageSize::K4).is_err());
}

#[test]
fn return_messages() {
    use ReturnMessage::{Pong, RecvBitmap, RequestPages, ResumeAck, Shut, SwitchoverAck};
    same!(ReturnMessage, Shut(5), [0, 1, 0, 4, 0, 0, 0, 5]);
    same!(ReturnMessage, Pong(HELLO_PING), b"\0\x02\0\x04mfd1");
    let block = Some(name("pc.ram"));
    let bytes = b"\0\x03\0\x13\0\0\0\0\0\0\x50\0\0\0\x10\0\x06pc.ram";
    same!(ReturnMessage, RequestPages { block, offset: 0x5000, len: 0x1000 }, bytes);
    let bytes = b"\0\x04\0\x0c\0\0\0\0\0\0\x50\0\0\0\x10\0";
    same!(ReturnMessage, RequestPages { block: None, offset: 0x5000, len: 0x1000 }, bytes);
    same!(ReturnMessage, RecvBitmap(name("vga")), b"\0\x05\0\x04\x03vga");
    same!(ReturnMessage, ResumeAck(1), [0, 6, 0, 4, 0, 0, 0, 1]);
    same!(ReturnMessage, SwitchoverAck, [0, 7, 0, 0]);
    let hello = Hello { version: 1, features: 0x0203 };
    same!(ReturnMessage, ReturnMessage::Hello(hello), b"\x4d\x46\0\x0a\0\x01\0\0\0\0\0\0\x02\x03");
    same!(ReturnMessage, ReturnMessage::Alive, b"\x4d\x47\0\0");
    let failure = Failure { phase: 5, reason: "no RAM block vga".to_owned() };
    same!(ReturnMessage, ReturnMessage::Failure(failure), b"\x4d\x48\0\x11\x05no RAM block vga");
    same!(ReturnMessage, ReturnMessage::Loaded(0x0102), b"\x4d\x49\0\x08\0\0\0\0\0\0\x01\x02");
    let id = ReturnMessage::Id(MigrationId(*b"0123456789abcdef"));
    same!(ReturnMessage, id, b"\x4d\x50\0\x100123456789abcdef");
    let key = [&[0x4d, 0x51, 0, 32][..], &[9; 32]].concat();
    same!(ReturnMessage, ReturnMessage::ResumeKey([9; 32]), key);
    let challenge = ReturnMessage::Challenge { nonce: [1; 32], proof: [2; 32] };
    same!(ReturnMessage, challenge, [&[0x4d, 0x52, 0, 64][..], &[1; 32], &[2; 32]].concat());
    same!(ReturnMessage, ReturnMessage::Standing(0x8000_0003), b"\x4d\x53\0\x04\x80\0\0\x03");
    same!(ReturnMessage, ReturnMessage::NotKnown, b"\x4d\x54\0\0");
    let later = ReturnMessage::Extension { kind: 0x4dff, body: vec![7] };
    same!(ReturnMessage, later, b"\x4d\xff\0\x01\x07");
}
