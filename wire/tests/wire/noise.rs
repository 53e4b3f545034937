//! Random input: every parser returns, and its result is within its input.

use multifd_wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::every_parser::{check, visit};
use crate::strategies::*;

/// Bytes of one good thing or another.
fn good_bytes() -> impl Strategy<Value = Vec<u8>> {
    fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out);
        out
    }
    prop_oneof![
        configuration().prop_map(|value| encoded(|out| value.encode(out))),
        item().prop_map(|value| encoded(|out| value.encode(out))),
        ram_record().prop_map(|(value, page)| encoded(|out| value.encode(page, out))),
        block_entry().prop_map(|(value, _)| encoded(|out| value.encode(out))),
        return_message().prop_map(|value| encoded(|out| value.encode(out))),
        device_state_packet().prop_map(|value| value.encode().to_vec()),
        ram_packet().prop_map(|value| value.encode()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn of_any_kind(buf in vec(any::<u8>(), 0..2000), page in page_size()) {
        check(&buf, page, 7);
    }

    #[test]
    fn of_low_entropy(buf in vec(prop::sample::select(b"\0\x01\x04\x05\x06\x07\x08\x7e{}".to_vec()), 0..300)) {
        check(&buf, PageSize::K4, 7);
    }

    #[test]
    fn a_few_bytes_off(mut buf in good_bytes(), hits in vec(any::<(prop::sample::Index, u8)>(), 1..4)) {
        for (at, byte) in hits {
            let at = at.index(buf.len());
            buf[at] = byte;
        }
        check(&buf, PageSize::K4, 7);
    }

    #[test]
    fn of_fixed_length(initial: [u8; 64], prefix: [u8; 12], hits in vec(any::<(usize, u8)>(), 1..4)) {
        drop(InitialPacket::parse(&initial));
        drop(PacketKind::parse(&prefix));
        let mut state = DeviceStatePacket { idstr: "x".to_owned(), instance_id: 0, payload_len: 1 }.encode();
        for (at, byte) in hits {
            state[at % DeviceStatePacket::LEN] = byte;
        }
        drop(DeviceStatePacket::parse(&state));
    }
}

/// A description of one device, by no means of the bytes that it is applied to.
fn description() -> impl Strategy<Value = DeviceDescription> {
    let kind = prop::sample::select(vec!["bool", "uint8", "int32", "uint64", "nullptr", "buffer", "struct"]);
    let array_len = prop::option::of(prop_oneof![0..5_u64, any::<u64>()]);
    let field = (kind, 0..9_u64, array_len).prop_map(|(kind, size, array_len)| FieldDescription {
        name: "f".to_owned(),
        kind: kind.to_owned(),
        size,
        array_len,
        index: None,
        struct_: None,
    });
    let field = field.prop_recursive(3, 20, 4, |inner| {
        (inner.clone(), vec(inner, 0..4)).prop_map(|(mut field, fields)| {
            let name = "s".to_owned();
            field.struct_ = Some(Box::new(StructDescription {
                vmsd_name: name,
                version: 1,
                fields,
                subsections: Vec::new(),
            }));
            field
        })
    });
    vec(field, 0..4).prop_map(|fields| DeviceDescription {
        name: "d".to_owned(),
        instance_id: 0,
        vmsd_name: None,
        version: None,
        size: None,
        fields,
        subsections: Vec::new(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn of_a_device_that_is_not_as_described(device in description(), fill: u8, short in 0..3_usize) {
        let len = device.payload_len().and_then(|len| usize::try_from(len).ok()).unwrap_or(0).min(10_000);
        let mut payload = vec![fill; len];
        payload.iter_mut().step_by(3).for_each(|byte| *byte = byte.wrapping_add(1));
        payload.truncate(len.saturating_sub(short));
        prop_assert!(visit(Structure::of_device(&device, &payload)) <= payload.len());
    }
}

#[test]
fn public_types_may_cross_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<(BlockListBuilder, Configuration, DeviceStatePacket, Invalid, Item, Structure<'static>)>();
    check::<(
        RamPacket<'static>,
        RamPacketHeader<'static>,
        RamRecord,
        ReturnMessage,
        TailScanner,
        VmDescription,
    )>();
}
