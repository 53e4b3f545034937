//! parse(encode(x)) == x, and each short prefix of encode(x) only asks for more.

use std::fmt::Debug;

use multifd_wire::*;
use proptest::prelude::*;

use crate::strategies;

/// `next` is what may come after the value; it must not be taken.
fn check<T: Debug + PartialEq>(value: T, bytes: &[u8], next: &[u8], parse: impl Fn(&[u8]) -> Parsed<T>) {
    for len in 0..bytes.len() {
        assert_eq!(parse(&bytes[..len]), Ok(None), "{len} of {} bytes", bytes.len());
    }
    assert_eq!(parse(&[bytes, next].concat()), Ok(Some((value, bytes.len()))));
}

/// Runs an encoder into a buffer of its own.
fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

#[test]
fn stream_header() {
    check(StreamHeader, &encoded(|out| StreamHeader.encode(out)), &[7], StreamHeader::parse);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn configuration(value in strategies::configuration()) {
        let bytes = encoded(|out| value.encode(out));
        let not_ours = [&b"\x05\x04rest"[..], b"\x05\x0dconfiguration", b"\x05\x20conf.", b"\x05\x10configurations/x"];
        for next in [&[0x08][..], &[0x01]].into_iter().chain(not_ours) {
            check(value.clone(), &bytes, next, Configuration::parse);
        }
        for undecided in [&b""[..], b"\x05", b"\x05\x20", b"\x05\x20config", b"\x05\x20configuration"] {
            prop_assert_eq!(Configuration::parse(&[&bytes, undecided].concat()), Ok(None));
        }
    }

    #[test]
    fn item(value in strategies::item(), next: Vec<u8>) {
        check(value.clone(), &encoded(|out| value.encode(out)), &next, Item::parse);
    }

    #[test]
    fn footer(id: u32, next: Vec<u8>) {
        let value = Footer(SectionId(id));
        check(value, &encoded(|out| value.encode(out)), &next, Footer::parse);
    }

    #[test]
    fn ram_record((value, page) in strategies::ram_record(), next: Vec<u8>) {
        let bytes = encoded(|out| value.encode(page, out));
        check(value, &bytes, &next, |buf| RamRecord::parse(buf, page));
    }

    #[test]
    fn block_entry((value, format) in strategies::block_entry(), next: Vec<u8>) {
        let bytes = encoded(|out| value.encode(out));
        if let Some(header) = value.mapped_ram {
            check(header, &bytes[bytes.len() - MappedRamHeader::LEN..], &next, MappedRamHeader::parse);
        }
        check(value, &bytes, &next, |buf| BlockEntry::parse(buf, format));
    }

    #[test]
    fn return_message(value in strategies::return_message(), next: Vec<u8>) {
        check(value.clone(), &encoded(|out| value.encode(out)), &next, ReturnMessage::parse);
    }

    #[test]
    fn initial_packet(uuid: [u8; 16], channel: u8) {
        let value = InitialPacket { uuid, channel };
        prop_assert_eq!(InitialPacket::parse(&value.encode()), Ok(value));
    }

    #[test]
    fn device_state_packet(value in strategies::device_state_packet()) {
        prop_assert_eq!(DeviceStatePacket::parse(&value.encode()), Ok(value));
    }

    #[test]
    fn ram_packet(value in strategies::ram_packet()) {
        let bytes = value.encode();
        prop_assert_eq!(bytes.len(), header_len(value.page));
        let packet = RamPacket::parse(&bytes, value.page).unwrap();
        let has_pages = !(value.normal.is_empty() && value.zero.is_empty());
        prop_assert_eq!(packet.flags().codec().value(), value.codec);
        prop_assert_eq!(packet.flags().sync(), value.sync);
        prop_assert_eq!(packet.packet_num(), value.packet_num);
        prop_assert_eq!(packet.block(), has_pages.then_some(value.block.as_str()));
        prop_assert_eq!(packet.normal_pages(), value.normal.len());
        prop_assert_eq!(packet.zero_pages(), value.zero.len());
        let payload_len = if value.normal.is_empty() { 0 } else { value.payload_len as usize };
        prop_assert_eq!(packet.payload_len(), payload_len);
        prop_assert_eq!(packet.normal_offsets().collect::<Vec<_>>(), value.normal);
        prop_assert_eq!(packet.zero_offsets().collect::<Vec<_>>(), value.zero);
    }
}
