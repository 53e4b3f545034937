//! Streams recorded from QEMU 10.0.2: a guest of 1 MiB and a firmware of zeros, stopped before its
//! first instruction, `migrate exec:`. One stream a file in `tests/golden`.

use std::fs;
use std::path::Path;

use multifd_wire::*;

const K4: PageSize = PageSize::K4;

fn streams() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let streams: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|ext| ext == "stream"))
        .map(|path| (path.file_stem().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap()))
        .collect();
    assert!(streams.len() >= 2, "the recorded streams are missing");
    streams
}

/// Takes one value off the front.
fn take<T>(rest: &mut &[u8], parse: impl FnOnce(&[u8]) -> Parsed<T>) -> T {
    let (value, used) = parse(rest).unwrap().expect("the stream ends too early");
    *rest = &rest[used..];
    value
}

/// Walks one piece of the ram section, footer included. Returns the blocks, if it lists them, and
/// the bytes of RAM that its pages cover.
fn walk_ram(rest: &mut &[u8], id: SectionId) -> (Vec<BlockEntry>, u64) {
    let (mut blocks, mut covered) = (Vec::new(), 0);
    loop {
        match take(rest, |buf| RamRecord::parse(buf, K4)) {
            RamRecord::EndOfSection => break,
            RamRecord::MemSize { total } => {
                let mut list = BlockListBuilder::new(total, K4);
                let entry = |buf: &[u8]| BlockEntry::parse(buf, BlockListFormat::default());
                while !list.push(take(rest, entry)).unwrap() {}
                blocks = list.finish();
            }
            RamRecord::Page { .. } => {
                *rest = &rest[K4.bytes()..];
                covered += K4.bytes_u64();
            }
            RamRecord::Zero { .. } => covered += K4.bytes_u64(),
            other => panic!("{other:?} in a stream without multifd and xbzrle"),
        }
    }
    assert_eq!(take(rest, Footer::parse), Footer(id));
    (blocks, covered)
}

/// Walks all that comes before the device tail.
fn walk_live(stream: &[u8]) -> (Configuration, &[u8]) {
    let mut rest = stream;
    take(&mut rest, StreamHeader::parse);
    let configuration = take(&mut rest, Configuration::parse);
    let (mut blocks, mut covered) = (Vec::new(), 0);
    loop {
        match take(&mut rest, Item::parse) {
            Item::SectionStart(head) => {
                assert_eq!((head.idstr.as_str(), head.instance_id, head.version_id), ("ram", 0, 4));
                (blocks, _) = walk_ram(&mut rest, head.id);
            }
            Item::SectionPart(id) => covered += walk_ram(&mut rest, id).1,
            Item::SectionEnd(id) => {
                covered += walk_ram(&mut rest, id).1;
                let total: u64 = blocks.iter().map(|block| block.used_len).sum();
                assert!(total > 1 << 20 && covered >= total, "{covered} of {total} bytes");
                return (configuration, rest);
            }
            Item::Command(command) => assert_eq!(command, Command::SwitchoverStart),
            other => panic!("{other:?} before the end of ram"),
        }
    }
}

#[test]
fn walk_to_the_last_byte() {
    for (name, stream) in streams() {
        let (configuration, tail) = walk_live(&stream);
        assert!(name.starts_with(&configuration.machine), "{name}");
        for step in [1, 1000, tail.len()] {
            let mut scanner = TailScanner::new();
            let mut ends = tail.chunks(step).map(|piece| scanner.push(piece).unwrap());
            let end = ends.find_map(|end| end).expect("no end");
            assert_eq!((end.total, end.vmdesc.end, ends.next()), (tail.len(), tail.len(), None), "{name}");
            check_devices(&name, &tail[..end.devices_len], &tail[end.vmdesc]);
        }
    }
}

/// Both ways to split the tail give the same, and what the description says.
fn check_devices(name: &str, devices: &[u8], json: &[u8]) {
    let description = VmDescription::parse(json).unwrap();
    let sections = split_tail(devices, Some(&description)).unwrap();
    assert_eq!(split_tail(devices, None).unwrap(), sections, "{name}");
    assert_eq!(sections.len(), description.devices.len(), "{name}");
    for (section, device) in sections.iter().zip(&description.devices) {
        assert_eq!(section.head.idstr, device.name);
        assert_eq!(section.head.instance_id, device.instance_id);
        assert_eq!(section.payload.len() as u64, device.payload_len().unwrap(), "{}", device.name);
        let payload = &devices[section.payload.clone()];
        assert_eq!(bytes_of_fields(Structure::of_device(device, payload)), payload.len(), "{}", device.name);
    }
    let last = sections.last().unwrap();
    assert_eq!(last.head.idstr, "globalstate");
    assert!(devices[last.payload.start + 4..].starts_with(b"prelaunch\0"));
}

/// Takes a structure apart to the last element, and adds up what was found.
fn bytes_of_fields(structure: Structure<'_>) -> usize {
    let contents = structure.contents().unwrap();
    let of_field = |field: &Field<'_>| {
        let of_run = |run: Run<'_>| {
            let inner = field.structure(run.element).map_or(run.element.len(), bytes_of_fields);
            inner * usize::try_from(run.count).unwrap()
        };
        field.runs().map(of_run).sum::<usize>()
    };
    let of_subsection = |sub: &Subsection<'_>| 1 + 1 + sub.name.len() + 4 + bytes_of_fields(sub.structure);
    contents.fields.iter().map(of_field).sum::<usize>()
        + contents.subsections.iter().map(of_subsection).sum::<usize>()
}

#[test]
fn values_of_a_cpu_before_its_first_instruction() {
    for (name, stream) in streams() {
        let (_, tail) = walk_live(&stream);
        let end = TailScanner::new().push(tail).unwrap().unwrap();
        let description = VmDescription::parse(&tail[end.vmdesc]).unwrap();
        let sections = split_tail(&tail[..end.devices_len], Some(&description)).unwrap();
        let of_cpu = description.devices.iter().zip(&sections).find(|(device, _)| device.name == "cpu");
        let (device, section) = of_cpu.expect("no cpu");
        let cpu = Structure::of_device(device, &tail[section.payload.clone()]).contents().unwrap();
        let field = |name: &str| *cpu.fields.iter().find(|field| field.name() == name).expect(name);
        let eip = field("env.eip");
        assert_eq!(eip.value(eip.bytes()), Value::Unsigned(0xfff0), "{name}");
        assert_eq!(field("env.regs").array_len(), Some(16), "{name}");
        let base = field("env.segs").runs().map(|run| (run.first, run.count)).collect::<Vec<_>>();
        // ES, then CS with the base of the firmware, then four like ES.
        assert_eq!(base, [(0, 1), (1, 1), (2, 4)], "{name}");
    }
}

#[test]
fn without_its_description_the_end_is_known_by_the_footer() {
    for (name, stream) in streams() {
        let (_, tail) = walk_live(&stream);
        let mut scanner = TailScanner::new();
        let end = scanner.push(tail).unwrap().unwrap();
        let mut scanner = TailScanner::new();
        assert_eq!(scanner.push(&tail[..end.devices_len]).unwrap(), None);
        assert!(!scanner.ends_without_description(), "{name}");
        assert_eq!(scanner.push(&[0]).unwrap(), None);
        assert!(scanner.ends_without_description(), "{name}");
    }
}
