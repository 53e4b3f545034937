use super::*;
use crate::VmDescription;

fn device(fields: &str, subsections: &str) -> DeviceDescription {
    let json = format!(
        r#"{{"devices": [{{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1,
            "fields": [{fields}], "subsections": [{subsections}]}}]}}"#
    );
    VmDescription::parse(json.as_bytes()).unwrap().devices.remove(0)
}

fn field(name: &str, kind: &str, size: u64) -> String {
    format!(r#"{{"name": "{name}", "type": "{kind}", "size": {size}}}"#)
}

#[test]
fn values_by_type_and_length() {
    for (kind, bytes, value) in [
        ("bool", &[1][..], Value::Bool(true)),
        ("bool", &[0], Value::Bool(false)),
        ("nullptr", b"0", Value::Null),
        ("uint8", &[0xff], Value::Unsigned(255)),
        ("int8", &[0xff], Value::Signed(-1)),
        ("uint16", &[1, 2], Value::Unsigned(0x102)),
        ("int16 equal", &[0x80, 0], Value::Signed(-0x8000)),
        ("uint32", &[1, 2, 3, 4], Value::Unsigned(0x0102_0304)),
        ("int32 le", &[0xff, 0xff, 0xff, 0xfe], Value::Signed(-2)),
        ("uint64", &[0xff; 8], Value::Unsigned(u64::MAX)),
        ("timer", &[0xff; 8], Value::Signed(-1)),
        ("float64", &[0x3f, 0xf0, 0, 0, 0, 0, 0, 0], Value::Unsigned(0x3ff0 << 48)),
        ("buffer", &[1, 2], Value::Bytes(&[1, 2])),
        ("unused_buffer", &[1], Value::Bytes(&[1])),
        ("virtio", &[1, 2, 3], Value::Bytes(&[1, 2, 3])),
        ("uint32", &[], Value::Bytes(&[])),
    ] {
        let device = device(&field("x", kind, bytes.len() as u64), "");
        let contents = Structure::of_device(&device, bytes).contents().unwrap();
        let field = contents.fields[0];
        assert_eq!(field.value(field.bytes()), value, "{kind} {bytes:?}");
        assert_eq!((field.name(), field.kind(), field.array_len()), ("x", kind, None));
    }
}

#[test]
fn structures_and_subsections_nest() {
    let inner = format!(
        r#"{{"name": "s", "type": "struct", "size": 3, "array_len": 2, "struct": {{"vmsd_name": "s",
            "version": 1, "fields": [{}, {}]}}}}"#,
        field("a", "uint8", 1),
        field("b", "uint16", 2)
    );
    let sub = format!(r#"{{"vmsd_name": "d/x", "version": 7, "fields": [{}]}}"#, field("c", "uint8", 1));
    let device = device(&inner, &sub);
    let payload = [&[1, 0, 2, 3, 0, 4, 5, 3][..], b"d/x", &[0, 0, 0, 7, 9]].concat();
    let contents = Structure::of_device(&device, &payload).contents().unwrap();

    let array = contents.fields[0];
    let runs: Vec<_> = array.runs().collect();
    assert_eq!(runs.iter().map(|run| (run.first, run.count)).collect::<Vec<_>>(), [(0, 1), (1, 1)]);
    let second = array.structure(runs[1].element).unwrap().contents().unwrap();
    let values: Vec<_> = second.fields.iter().map(|field| field.value(field.bytes())).collect();
    assert_eq!(values, [Value::Unsigned(3), Value::Unsigned(4)]);

    let sub = contents.subsections[0];
    assert_eq!((sub.name, sub.version, sub.structure.bytes()), ("d/x", 7, &[9][..]));
    assert!(contents.fields[0].structure(&[]).unwrap().contents().is_err());
}

#[test]
fn equal_neighbours_are_one_run() {
    let array = |len: u64, size: u64, bytes: &[u8]| {
        let json = format!(r#"{{"name": "a", "type": "x", "size": {size}, "array_len": {len}}}"#);
        let device = device(&json, "");
        let contents = Structure::of_device(&device, bytes).contents().unwrap();
        contents.fields[0].runs().map(|run| (run.first, run.count, run.element.to_vec())).collect::<Vec<_>>()
    };
    assert_eq!(array(4, 1, &[7, 7, 7, 8]), [(0, 3, vec![7]), (3, 1, vec![8])]);
    assert_eq!(array(2, 3, &[1, 2, 3, 1, 2, 3]), [(0, 2, vec![1, 2, 3])]);
    assert_eq!(array(0, 4, &[]), []);
    assert_eq!(array(1 << 60, 0, &[]), [(0, 1 << 60, vec![])]);
    assert_eq!(array(u64::MAX, 0, &[]), [(0, u64::MAX, vec![])]);
}

#[test]
fn refuses_a_payload_that_is_not_as_described() {
    let device = device(
        &field("a", "uint32", 4),
        r#"{"vmsd_name": "d/x", "version": 1, "fields": [], "subsections": []}"#,
    );
    let good = [&[0, 0, 0, 1, 5, 3][..], b"d/x", &[0, 0, 0, 1]].concat();
    assert!(Structure::of_device(&device, &good).contents().is_ok());
    for len in 0..good.len() {
        assert!(Structure::of_device(&device, &good[..len]).contents().is_err(), "{len}");
    }
    assert!(Structure::of_device(&device, &[&good[..], &[0]].concat()).contents().is_err());
    let mut other = good.clone();
    other[4] = 4;
    let error = Structure::of_device(&device, &other).contents().unwrap_err();
    assert_eq!(error.to_string(), "subsection: type 0x04, name d/x, expected d/x");
    other[4] = 5;
    other[6] = b'e';
    assert!(Structure::of_device(&device, &other).contents().is_err());

    let huge = self::device(&field("a", "x", u64::MAX), "");
    let error = Structure::of_device(&huge, &good).contents().unwrap_err();
    assert!(error.to_string().contains("13 bytes are left for a"), "{error}");
}
