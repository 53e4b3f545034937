//! Every parser and encoder on the same bytes. Shared with the fuzz target `wire` (fuzz/bodies).

use std::fmt::Debug;

use multifd_wire::{
    BlockEntry, BlockListBuilder, BlockListFormat, BlockName, Configuration, DeviceStatePacket, Footer,
    InitialPacket, Item, MappedRamHeader, PACKET_PREFIX_LEN, PacketKind, PageSize, Parsed, RamPacket,
    RamPacketHeader, RamRecord, ReturnMessage, StreamHeader, Structure, TailScanner, VmDescription,
    split_tail,
};

/// What is parsed is encoded and parsed again. The scanner of tails gets the bytes in pieces of
/// `piece`. Those up to a zero byte are a description, too, and those behind it what it describes.
pub(crate) fn check(bytes: &[u8], page: PageSize, piece: usize) {
    again(bytes, StreamHeader::parse, |value, out| value.encode(out));
    again(bytes, Configuration::parse, |value, out| value.encode(out));
    again(bytes, Item::parse, |value, out| value.encode(out));
    again(bytes, Footer::parse, |value, out| value.encode(out));
    again(bytes, |buf| RamRecord::parse(buf, page), |value, out| value.encode(page, out));
    again(bytes, ReturnMessage::parse, |value, out| value.encode(out));
    again(bytes, MappedRamHeader::parse, |value, out| value.encode(out));
    block_lists(bytes, page);
    packets(bytes, page);
    tail(bytes, piece);
    described(bytes);
}

/// Parses, encodes what came of it, and parses that: the same value, of which every byte is taken.
fn again<T: Debug + PartialEq>(
    bytes: &[u8],
    parse: impl Fn(&[u8]) -> Parsed<T>,
    encode: impl Fn(&T, &mut Vec<u8>),
) {
    let Ok(Some((value, used))) = parse(bytes) else { return };
    assert!(used <= bytes.len(), "{used} bytes of {}", bytes.len());
    let mut encoded = Vec::new();
    encode(&value, &mut encoded);
    let len = encoded.len();
    // A configuration ends where the next thing begins.
    encoded.extend([0, 0]);
    assert_eq!(parse(&encoded), Ok(Some((value, len))));
}

fn block_lists(bytes: &[u8], page: PageSize) {
    for bits in 0..8_u8 {
        let format = BlockListFormat {
            page_sizes: bits & 1 != 0,
            guest_addresses: bits & 2 != 0,
            mapped_ram: bits & 4 != 0,
        };
        again(bytes, |buf| BlockEntry::parse(buf, format), |value, out| value.encode(out));
        let mut list = BlockListBuilder::new(u64::MAX, page);
        let mut rest = bytes;
        while let Ok(Some((entry, used))) = BlockEntry::parse(rest, format) {
            if list.push(entry).is_err() {
                break;
            }
            rest = rest.get(used..).unwrap_or_default();
        }
        let blocks = list.finish();
        assert!(blocks.iter().all(|block| block.used_len > 0 && page.aligns(block.used_len)));
    }
}

fn packets(bytes: &[u8], page: PageSize) {
    if let Some(prefix) = bytes.first_chunk::<PACKET_PREFIX_LEN>() {
        let _ = PacketKind::parse(prefix);
    }
    if let Some(Ok(hello)) = bytes.first_chunk().map(InitialPacket::parse) {
        assert_eq!(InitialPacket::parse(&hello.encode()), Ok(hello));
    }
    if let Some(Ok(state)) = bytes.first_chunk().map(DeviceStatePacket::parse) {
        assert_eq!(DeviceStatePacket::parse(&state.encode()), Ok(state));
    }
    let header = bytes.get(..multifd_wire::header_len(page)).unwrap_or(bytes);
    let Ok(packet) = RamPacket::parse(header, page) else { return };
    let (normal, zero) =
        (packet.normal_offsets().collect::<Vec<_>>(), packet.zero_offsets().collect::<Vec<_>>());
    let block = packet.block().map(|name| BlockName::try_from(name).expect("a name that was checked"));
    let mut encoded = Vec::new();
    RamPacketHeader {
        flags: packet.flags(),
        packet_num: packet.packet_num(),
        block: block.as_ref(),
        normal: &normal,
        zero: &zero,
        payload_len: u32::try_from(packet.payload_len()).expect("at most 1 MiB"),
    }
    .encode(page, &mut encoded);
    let twin = RamPacket::parse(&encoded, page).expect("an encoded header is sound");
    assert_eq!(format!("{packet:?}"), format!("{twin:?}"));
}

/// The end of a tail is found in the same place in whatever pieces it comes, and its sections lie
/// in it one behind the other.
fn tail(bytes: &[u8], piece: usize) {
    let whole = TailScanner::new().push(bytes).ok().flatten();
    let mut scanner = TailScanner::new();
    let in_pieces = bytes.chunks(piece).find_map(|piece| scanner.push(piece).ok().flatten());
    assert_eq!(whole, in_pieces, "in pieces of {piece}");
    let mut description = None;
    if let Some(end) = whole {
        assert!(end.devices_len < end.vmdesc.start && end.vmdesc.end == end.total);
        let text = bytes.get(end.vmdesc).expect("the description lies in the tail");
        description = Some(VmDescription::parse(text).expect("what was found is a description"));
    }
    for description in [None, description.as_ref()] {
        let mut at = 0;
        for section in split_tail(bytes, description).unwrap_or_default() {
            assert!(at < section.payload.start && section.payload.start <= section.payload.end);
            at = section.payload.end + Footer::LEN;
            assert!(at <= bytes.len(), "a section that ends at {at} of {}", bytes.len());
        }
    }
}

fn described(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (json, payload) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Ok(description) = VmDescription::parse(json) else { return };
    for device in &description.devices {
        assert!(visit(Structure::of_device(device, payload)) <= payload.len());
        let _ = device.payload_len();
    }
}

/// The bytes of all fields. Arrays are visited run by run, so this ends however many elements they
/// claim.
pub(crate) fn visit(structure: Structure<'_>) -> usize {
    let Ok(contents) = structure.contents() else { return 0 };
    let mut seen = 0;
    for field in &contents.fields {
        let mut elements = 0;
        for run in field.runs() {
            assert!(run.first == elements && run.count > 0);
            elements += run.count;
            seen += run.element.len();
            let _ = (field.value(run.element), field.structure(run.element).map(visit));
        }
        assert_eq!(elements, field.array_len().unwrap_or(1));
    }
    seen
}
