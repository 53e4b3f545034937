//! Any value, any bytes.

use multifd_vmstate::{
    AtMost, Buffer, Description, Device, Devices, Error, Fields, Priority, Same, Section, Subsections, Table,
    Timer, Unused, layout, load, save,
};
use proptest::prelude::*;

layout! {
    /// A part.
    pub struct Part = "part", version 3 {
        level: bool;
        value: i16;
    }
    subsections {
        extra: PartExtra;
    }
}

layout! {
    /// A subsection of a part.
    pub struct PartExtra = "part/extra", version 1 {
        value: u64;
    }
}

layout! {
    /// A subsection with one of its own.
    pub struct Outer = "device/outer", version 4, minimum 2 {
        value: u8;
        newer: u16 => since 3;
    }
    subsections {
        inner: Inner;
    }
}

layout! {
    /// A subsection of a subsection.
    pub struct Inner = "device/outer/inner", version 1 {
        bytes: Buffer<3>;
    }
}

/// Every kind of field.
#[derive(Clone, Debug, Default, PartialEq)]
struct Everything {
    unsigned: (u8, u16, u32, u64),
    signed: (i8, i16, i32, i64),
    timer: Timer,
    same: Same<u32>,
    at_most: AtMost<u16>,
    fixed: [u16; 3],
    table: Table<u8, 40>,
    len: u16,
    counted: Vec<u32>,
    raw: Vec<u8>,
    part: Part,
    parts: Vec<Part>,
    pointers: [Option<Part>; 2],
    list: Vec<Part>,
    tree: Vec<u64>,
    own: u8,
    outer: Option<Outer>,
}

impl Device for Everything {
    const DESCRIPTION: Description = Description::new("device", 5).minimum(3);

    fn pre_load(&mut self) -> Result<(), String> {
        self.own = 0;
        self.outer = None;
        Ok(())
    }

    fn fields(&mut self, f: &mut Fields<'_>) -> Result<(), Error> {
        let (a, b, c, d) = &mut self.unsigned;
        f.field("u8", a)?;
        f.field("u16", b)?;
        f.field("u32", c)?;
        f.field("u64", d)?;
        let (a, b, c, d) = &mut self.signed;
        f.field("i8", a)?;
        f.field("i16", b)?;
        f.field("i32", c)?;
        f.field("i64", d)?;
        f.field("unused", &mut Unused::<5>)?;
        f.field("timer", &mut self.timer)?;
        f.field("same", &mut self.same)?;
        f.field("at_most", &mut self.at_most)?;
        f.field("fixed", &mut self.fixed)?;
        f.field("table", &mut self.table)?;
        f.field("len", &mut self.len)?;
        f.validate("len up to 100", self.len, self.len <= 100)?;
        f.counted("counted", &mut self.counted, self.len)?;
        f.buffer("raw", &mut self.raw, self.len)?;
        f.field("part", &mut self.part)?;
        f.counted("parts", &mut self.parts, self.len)?;
        f.pointers("pointers", &mut self.pointers)?;
        f.list("list", &mut self.list)?;
        f.tree("tree", &mut self.tree)
    }

    fn subsections(&mut self, s: &mut Subsections<'_, '_>) -> Result<(), Error> {
        s.subsection("device/own", 1, self.own != 0, |f| f.field("own", &mut self.own))?;
        s.optional(&mut self.outer)
    }
}

fn part() -> impl Strategy<Value = Part> {
    (any::<bool>(), any::<i16>(), any::<Option<u64>>()).prop_map(|(level, value, extra)| Part {
        level,
        value,
        extra: extra.map(|value| PartExtra { value }),
    })
}

fn everything() -> impl Strategy<Value = Everything> {
    let outer = (any::<u8>(), any::<u16>(), any::<Option<[u8; 3]>>()).prop_map(|(value, newer, inner)| {
        Outer { value, newer, inner: inner.map(|bytes| Inner { bytes: Buffer(bytes) }) }
    });
    let numbers =
        (any::<(u8, u16, u32, u64)>(), any::<(i8, i16, i32, i64)>(), any::<i64>(), any::<[u16; 3]>());
    let len = 0_usize..5;
    let arrays = len.prop_flat_map(|len| {
        let counted = prop::collection::vec(any::<u32>(), len);
        (counted, prop::collection::vec(any::<u8>(), len), prop::collection::vec(part(), len))
    });
    let rest = (
        part(),
        prop::option::of(part()),
        prop::collection::vec(part(), 0..4),
        prop::collection::vec(any::<u64>(), 0..4),
        any::<u8>(),
        prop::option::of(outer),
    );
    (numbers, arrays, rest).prop_map(|(numbers, arrays, rest)| Everything {
        unsigned: numbers.0,
        signed: numbers.1,
        timer: Timer(numbers.2),
        fixed: numbers.3,
        len: u16::try_from(arrays.0.len()).unwrap(),
        counted: arrays.0,
        raw: arrays.1,
        parts: arrays.2,
        part: rest.0,
        pointers: [rest.1, None],
        list: rest.2,
        tree: rest.3,
        own: rest.4,
        outer: rest.5,
        ..Everything::default()
    })
}

/// A device as it is at the destination: the same pointers, and nothing else.
fn blank(like: &Everything) -> Everything {
    let pointers = like.pointers.clone().map(|part| part.map(|_| Part::default()));
    Everything { pointers, ..Everything::default() }
}

proptest! {
    #[test]
    fn any_value_comes_back(mut device in everything()) {
        let saved = save(&mut device).unwrap();
        let mut here = blank(&device);
        load(&mut here, 5, &saved.bytes).unwrap();
        prop_assert_eq!(&here, &device);
        prop_assert_eq!(saved.describe("device", 0).payload_len(), Some(saved.bytes.len() as u64));
    }

    #[test]
    fn a_short_prefix_is_an_error_or_state_without_its_last_subsections(mut device in everything()) {
        let bytes = save(&mut device).unwrap().bytes;
        for len in 0..bytes.len() {
            let mut here = blank(&device);
            let before = here.clone();
            match load(&mut here, 5, &bytes[..len]) {
                Ok(()) => prop_assert_eq!(&save(&mut here).unwrap().bytes, &bytes[..len]),
                Err(_) => prop_assert_eq!(&here, &before),
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_or_read_as_it_is(
        mut device in everything(), at in any::<prop::sample::Index>(), bit in 0..8,
    ) {
        let mut bytes = save(&mut device).unwrap().bytes;
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        let mut here = blank(&device);
        if load(&mut here, 5, &bytes).is_ok() {
            let again = save(&mut here).unwrap().bytes;
            let unused = 30..35;
            prop_assert!(again == bytes || unused.contains(&at), "byte {at}");
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), version in 2_u32..7) {
        let mut here = Everything::default();
        let before = here.clone();
        if load(&mut here, version, &bytes).is_err() {
            prop_assert_eq!(here, before);
        }
    }
}

#[test]
fn checks_against_what_this_end_has() {
    let mut source = Everything {
        same: Same { value: 3, fixed: false },
        at_most: AtMost { value: 9, limit: None },
        ..Everything::default()
    };
    let bytes = save(&mut source).unwrap().bytes;
    let refused = |device: &mut Everything| load(device, 5, &bytes).unwrap_err().to_string();
    let mut other = Everything { same: Same::new(4), ..Everything::default() };
    assert_eq!(refused(&mut other), "device: same: 3, expected 4, what this end has");
    let mut smaller = Everything { at_most: AtMost::new(8), ..Everything::default() };
    assert_eq!(refused(&mut smaller), "device: at_most: 9, expected at most 8");
    let mut pointed = Everything { pointers: [Some(Part::default()), None], ..Everything::default() };
    assert!(load(&mut pointed, 5, &bytes).is_err());
    source.len = 7;
    assert_eq!(
        save(&mut source).unwrap_err().to_string(),
        "device: counted: 0 elements, expected 7, their count"
    );
    source.len = 101;
    assert_eq!(save(&mut source).unwrap_err().to_string(), "device: len: 101, expected len up to 100");
}

#[test]
fn subsections_that_are_wrong_are_named() {
    let mut device = Everything { own: 1, outer: Some(Outer::default()), ..Everything::default() };
    let bytes = save(&mut device).unwrap().bytes;
    let own = b"\x05\x0adevice/own\0\0\0\x01\x01";
    let refused = |tail: &[u8]| {
        let bytes = [&bytes, tail].concat();
        load(&mut Everything::default(), 5, &bytes).unwrap_err().to_string()
    };
    assert_eq!(refused(own), "device: device/own: a second one, expected it once");
    assert_eq!(
        refused(b"\x05\x0adevice/new\0\0\0\x01\x01"),
        "device: device/new: a subsection that is unknown here, expected one of a description"
    );
    let mut newer = bytes.clone();
    let at = newer.windows(16).position(|window| window.starts_with(b"device/outer\0")).unwrap() + 15;
    newer[at] = 5;
    let error = load(&mut Everything::default(), 5, &newer).unwrap_err().to_string();
    assert_eq!(error, "device: device/outer: version 5, expected 2..=4");
    newer[at] = 2;
    newer.truncate(newer.len() - 2);
    let mut here = Everything::default();
    load(&mut here, 5, &newer).unwrap();
    assert_eq!(here.outer.unwrap().newer, 0, "version 2 does not have it");
}

/// A device that is loaded before others.
#[derive(Clone, Debug, Default, PartialEq)]
struct Bridge(u8);

impl Device for Bridge {
    const DESCRIPTION: Description = Description::new("bridge", 1).priority(Priority::PCI_BUS);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("bus", &mut self.0)
    }

    fn needed(&self) -> bool {
        self.0 != 99
    }

    fn unplug_pending(&self) -> bool {
        self.0 == 7
    }
}

#[test]
fn devices_are_saved_by_priority_and_loaded_all_or_none() {
    let (mut part, mut bridge) = (Part { value: 5, ..Part::default() }, Bridge(1));
    let save_all = |part: &mut Part, bridge: &mut Bridge| {
        Devices::new().with("part", 0, part).with("bus/bridge", 0, bridge).save()
    };
    let sections = save_all(&mut part, &mut bridge).unwrap();
    let names: Vec<_> = sections.iter().map(|section| section.head.idstr.as_str()).collect();
    assert_eq!(names, ["bus/bridge", "part"]);

    let load_all = |part: &mut Part, bridge: &mut Bridge, sections: &[Section<'_>]| {
        let devices = Devices::new().with("part", 0, part).with("bus/bridge", 0, bridge);
        devices.load(sections.iter().copied()).map_err(|error| error.to_string())
    };
    let all: Vec<_> = sections.iter().map(Section::from).collect();
    let (mut here, mut there) = (Part::default(), Bridge::default());
    let bad = Section { payload: &[2, 0, 0], ..all[1] };
    let refused = load_all(&mut here, &mut there, &[all[0], bad]);
    assert_eq!(refused, Err("part: level: 0x02, expected 0 or 1".to_owned()));
    assert_eq!((&here, &there), (&Part::default(), &Bridge::default()), "none has changed");
    let missing = Err("part: no section, expected one of instance 0".to_owned());
    assert_eq!(load_all(&mut here, &mut there, &all[..1]), missing);
    let twice = Err("bus/bridge: a second section, expected one".to_owned());
    assert_eq!(load_all(&mut here, &mut there, &[all[0], all[0]]), twice);
    let stranger = Section { name: "other", ..all[0] };
    let unknown = Err("other: a section of instance 0, expected one of a device that is here".to_owned());
    assert_eq!(load_all(&mut here, &mut there, &[stranger]), unknown);
    load_all(&mut here, &mut there, &all).unwrap();
    assert_eq!((here, there.0), (part.clone(), 1));

    let gone = save_all(&mut part, &mut Bridge(99)).unwrap();
    assert_eq!(gone.len(), 1, "a device without state has no section");
    let mut leaving = Bridge(7);
    let devices = Devices::new().with("bus/bridge", 0, &mut leaving);
    assert_eq!(devices.unplug_pending().collect::<Vec<_>>(), ["bus/bridge"]);
    let text = "bridge: cannot be saved while the guest has not let go of it";
    assert_eq!(devices.save().unwrap_err().to_string(), text);
    let (mut one, mut two) = (Bridge(1), Bridge(2));
    let same = Devices::new().with("bridge", 3, &mut one).with("bridge", 3, &mut two).save();
    let text = "bridge: two devices of instance 3, expected numbers that tell them apart";
    assert_eq!(same.unwrap_err().to_string(), text);
}

/// A device that the host has given to the guest.
#[derive(Clone)]
struct Passed;

impl Device for Passed {
    const DESCRIPTION: Description = Description::new("passed", 1).unmigratable("it is on the host's bus");

    fn fields(&mut self, _fields: &mut Fields<'_>) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn an_unmigratable_device_is_refused_with_its_reason() {
    let text = "passed: cannot be saved: it is on the host's bus";
    assert_eq!(save(&mut Passed).unwrap_err().to_string(), text);
}

/// Bytes as QEMU has them, put together by hand: docs/wire.md §3.3.
#[test]
fn bytes_of_each_kind_of_field() {
    let mut device = Everything {
        unsigned: (1, 2, 3, 4),
        signed: (-1, -2, -3, -4),
        len: 1,
        counted: vec![0x0102_0304],
        raw: vec![9],
        part: Part { level: true, value: 7, extra: Some(PartExtra { value: 8 }) },
        parts: vec![Part::default()],
        list: vec![Part::default()],
        tree: vec![6],
        own: 5,
        ..Everything::default()
    };
    let expected = [
        &b"\x01\0\x02\0\0\0\x03\0\0\0\0\0\0\0\x04"[..],
        b"\xff\xff\xfe\xff\xff\xff\xfd\xff\xff\xff\xff\xff\xff\xff\xfc",
        &[0; 5],
        &[0xff; 8],
        &[0; 4],
        &[0; 2],
        &[0; 6],
        &[0; 40],
        b"\0\x01\x01\x02\x03\x04\x09",
        b"\x01\0\x07\x05\x0apart/extra\0\0\0\x01\0\0\0\0\0\0\0\x08",
        b"\0\0\0",
        b"00",
        b"\x01\0\0\0\0",
        b"\0\0\0\x01\x01\0\0\0\0\0\0\0\x06\0",
        b"\x05\x0adevice/own\0\0\0\x01\x05",
    ]
    .concat();
    assert_eq!(save(&mut device).unwrap().bytes, expected);
}
