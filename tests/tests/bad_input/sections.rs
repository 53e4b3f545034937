//! The section stream on main: header, configuration, commands, sections, the end.

use multifd_tests::Outcome;
use multifd_tests::peer::{Lane, Recorder, Recording, Style, Trial};
use multifd_wire::{Advise, BlockName, Command, Configuration, DiscardRange, Item, SectionHead, SectionId};

use crate::fixture::{multifd, recording, refused, single};

fn item(item: Item) -> Vec<u8> {
    let mut bytes = Vec::new();
    item.encode(&mut bytes);
    bytes
}

fn start(id: u32, idstr: &str, instance_id: u32, version_id: u32) -> Vec<u8> {
    item(Item::SectionStart(SectionHead {
        id: SectionId(id),
        idstr: idstr.to_owned(),
        instance_id,
        version_id,
    }))
}

fn configured(change: impl FnOnce(&mut Configuration)) -> Recording {
    let (machine, capabilities) = ("pc-q35-10.0".to_owned(), Vec::new());
    let mut configuration = Configuration::new(machine).with_capabilities(capabilities);
    change(&mut configuration);
    let mut bytes = Vec::new();
    configuration.encode(&mut bytes);
    single().replaced("configuration", 0, &bytes)
}

#[test]
fn the_configuration() -> Outcome {
    let name = "machine type name: 4294967295 bytes, expected 1..=255 bytes";
    let subsection = "\x07\0\0\0\x02pc\x05\x12configuration/what\0\0\0\x01";
    refused([
        (
            "another type",
            single().patched("configuration", 0, 0, &[8]),
            &["main", "configuration type: 0x08"],
        ),
        (
            "a huge name",
            single().patched("configuration", 0, 1, &[0xff; 4]),
            &["main (unix:", "byte 8", name],
        ),
        ("no name", single().patched("configuration", 0, 1, &[0; 4]), &["machine type name: 0 bytes"]),
        (
            "an unknown subsection",
            single().replaced("configuration", 0, subsection.as_bytes()),
            &["configuration subsection: configuration/what"],
        ),
        (
            "mapped-ram",
            configured(|it| it.capabilities.push("mapped-ram".to_owned())),
            &["main", "capability mapped-ram is on"],
        ),
        (
            "large pages",
            configured(|it| it.page_bits = Some(14)),
            &["main", "pages of 2^14 bytes at the source, 2^12 here"],
        ),
    ])
}

/// Said while the source can still run.
const NO_POSTCOPY: &[&str] = &["main (unix:", "switch off capability postcopy-ram at the source"];

#[test]
fn commands() -> Outcome {
    let before_part = |bytes: &[u8]| single().inserted("part", 0, bytes);
    let command = |command| before_part(&item(Item::Command(command)));
    let no_return_path = recording(&Style { return_path: false, ..Style::default() });
    let no_return_path = Recording { ending: single().ending, ..no_return_path };
    let ping = item(Item::Command(Command::Ping(7)));
    let advise = Advise { page_sizes: 0x1000, target_page: 0x1000 };
    refused([
        ("an unknown one", before_part(&[8, 0, 12, 0, 0]), &["main", "command: 12, expected 1..=11"]),
        (
            "a wrong length",
            before_part(&[8, 0, 2, 0, 3, 0, 0, 0]),
            &["command length: 3 bytes for command 2"],
        ),
        ("a huge length", before_part(&[8, 0, 6, 0xff, 0xff]), &["65535 bytes for command 6", "at most 450"]),
        ("PING", no_return_path.inserted("start", 0, &ping), &["Pong(7) asked for before OPEN_RETURN_PATH"]),
        ("ADVISE", command(Command::PostcopyAdvise(Some(advise))), NO_POSTCOPY),
        ("ADVISE for dirty bitmaps", command(Command::PostcopyAdvise(None)), NO_POSTCOPY),
        ("ADVISE at its place", recording(&Style { advise: true, ..Style::default() }), NO_POSTCOPY),
        ("ADVISE with channels", recording(&Style { advise: true, ..Style::multifd(2) }), NO_POSTCOPY),
        ("LISTEN", command(Command::PostcopyListen), &["main", "PostcopyListen is not supported"]),
        ("PACKAGED", command(Command::Packaged(u32::MAX)), &["Packaged(4294967295) is not supported"]),
        ("COLO", command(Command::EnableColo), &["EnableColo is not supported"]),
        ("RECV_BITMAP", command(Command::RecvBitmap(BlockName::try_from("pc.ram")?)), &["RecvBitmap"]),
    ])
}

/// A source that may switch, and does it wrongly: all of these before it has let go of its guest.
#[test]
fn steps_to_postcopy() -> Outcome {
    let advised = || recording(&Style { advise: true, ..Style::default() });
    let command = |command| advised().inserted("part", 0, &item(Item::Command(command)));
    let discard = |block: &str, offset, len| -> Outcome<Recording> {
        let ranges = vec![DiscardRange { offset, len }];
        Ok(command(Command::RamDiscard { block: BlockName::try_from(block)?, ranges }))
    };
    let packaged = |items: &[Item]| {
        let bytes: Vec<u8> = items.iter().cloned().flat_map(item).collect();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let package = [item(Item::Command(Command::Packaged(len))), bytes].concat();
        advised().inserted("part", 0, &package)
    };
    let (listen, run) = (Item::Command(Command::PostcopyListen), Item::Command(Command::PostcopyRun));
    let cases: [(&str, Recording, &[&str]); 9] = [
        ("a block that is not there", discard("pc.rom", 0, 4096)?, &["unknown RAM block \"pc.rom\""]),
        (
            "half a page",
            discard("pc.ram", 2048, 2048)?,
            &["a discard of 0x800 bytes at 0x800 in RAM block pc.ram"],
        ),
        ("past the end", discard("pc.ram", 0, 9 * 4096)?, &["a discard of 0x9000 bytes at 0x0"]),
        ("no bytes", discard("pc.ram", 0, 0)?, &["a discard of 0x0 bytes"]),
        (
            "a package of 4 GiB",
            command(Command::Packaged(u32::MAX)),
            &["a package of 4294967295 bytes, expected 1 to"],
        ),
        (
            "LISTEN twice",
            packaged(&[listen.clone(), listen.clone()]),
            &["PostcopyListen) in a package, out of order"],
        ),
        (
            "RUN without LISTEN",
            packaged(std::slice::from_ref(&run)),
            &["PostcopyRun) in a package, out of order"],
        ),
        (
            "a package without RUN",
            packaged(std::slice::from_ref(&listen)),
            &["the package ended after 5 bytes"],
        ),
        (
            "ram in a package",
            packaged(&[listen, Item::SectionPart(SectionId(7)), run]),
            &["in a package, out of order"],
        ),
    ];
    for (done, recording, says) in cases {
        let refused = Trial::unix()?.refuses_with(&recording, says, |builder| builder.postcopy(true));
        refused.unwrap_or_else(|failure| panic!("{done}: {failure}"));
    }
    Ok(())
}

#[test]
fn live_sections() -> Outcome {
    let bitmap = start(9, "dirty-bitmap", 0, 1);
    let started = |bytes: &[u8]| single().replaced("start", 0, bytes);
    refused([
        (
            "not ram",
            started(&start(7, "dirty-bitmap", 0, 1)),
            &["main", "live section dirty-bitmap, flags", "switch off capability dirty-bitmaps"],
        ),
        ("another beside ram", single().inserted("part", 0, &bitmap), &["live section dirty-bitmap"]),
        ("another instance", started(&start(7, "ram", 1, 4)), &["live section ram (instance 1)"]),
        ("another version", started(&start(7, "ram", 0, 3)), &["ram section version 3, expected 4"]),
        ("twice", single().inserted("part", 0, &start(8, "ram", 0, 4)), &["a second START of ram"]),
        ("an empty name", started(&start(7, "", 0, 4)), &["section name: 0 bytes, expected 1..=255"]),
        (
            "PART of another",
            single().patched("part", 0, 4, &[9]),
            &["section id 9, the only live section is ram (7)"],
        ),
        (
            "PART before START",
            single().inserted("start", 0, &[2, 0, 0, 0, 7]),
            &["section id 7 was never started"],
        ),
        ("an unknown item", single().inserted("part", 0, &[9]), &["main", "item type: 0x09"]),
        (
            "a footer between sections",
            single().inserted("part", 0, &[0x7e]),
            &["item type: 0x7e (section footer)"],
        ),
        ("another's footer", single().patched("footer", 1, 4, &[9]), &["footer of section 9 in section 7"]),
        ("no footer", single().without("footer", 1), &["main", "section footer: 0x03, expected 0x7e"]),
        (
            "the end before ram",
            single().inserted("start", 0, &[0]),
            &["the end of the stream before any RAM"],
        ),
        (
            "the devices' part before ram",
            single().inserted("start", 0, &multifd_tests::peer::devices::tail()),
            &["the end of the stream before any RAM"],
        ),
        ("PART after END", single().inserted("devices", 0, &[2, 0, 0, 0, 7]), &["more of ram after its END"]),
    ])
}

#[test]
fn the_end_of_ram_says_that_all_channels_are_through() -> Outcome {
    let says: &[&str] = &["device, main (unix:", "no END of ram with a sync point before it"];
    let unsynced = multifd().without("flush", 2);
    let mut endless = multifd();
    let (end, devices) = (endless.position("end", 0), endless.position("devices", 0));
    endless.steps.drain(end..devices);
    refused([("no FLUSH in END", unsynced, says), ("no END", endless, says)])
}

#[test]
fn ram_without_an_end_is_refused_where_the_source_waits_for_an_answer() -> Outcome {
    let mut endless = single();
    let (end, devices) = (endless.position("end", 0), endless.position("devices", 0));
    endless.steps.drain(end..devices);
    refused([("no END", endless, &["device, main (unix:", "no END of ram before it"])])
}

#[test]
fn a_page_that_never_came_is_named() -> Outcome {
    let memory = crate::fixture::memory();
    let lacking = |style: &Style, lacks: usize| {
        let mut recorder = Recorder::new(style.clone());
        recorder.setup(&memory);
        let pages: Vec<_> = memory.all().into_iter().filter(|at| (at.block, at.page) != (0, lacks)).collect();
        recorder.part(&memory, &pages);
        recorder.end(&memory, &[]);
        recorder.finish()
    };
    let nothing = {
        let mut recorder = Recorder::new(Style::default());
        recorder.setup(&memory);
        recorder.end(&memory, &[]);
        recorder.finish()
    };
    let all: &[&str] =
        &["device, main (unix:", "2 of 2 pages of RAM block pc.bios never came, the first is page 0"];
    let one: &[&str] =
        &["device, main (unix:", "1 of 8 pages of RAM block pc.ram never came, the first is page 5"];
    refused([
        ("one page", lacking(&Style::default(), 5), one),
        ("one page on channels", lacking(&Style::multifd(2), 5), one),
        ("all pages", nothing, all),
    ])
}

#[test]
fn the_devices_part() -> Outcome {
    // A source without a return path, which hangs up at the end.
    let over = || recording(&Style { return_path: false, ..Style::default() });
    let says: &[&str] = &["device, main (unix:", "the stream ended within device state, after"];
    let silence: &[&str] = &["device, main (unix:", "waiting for device state at byte", "the timeout"];
    let main = single();
    let boundaries = main.boundaries(Lane::Main);
    let (eof, end) = (boundaries[boundaries.len() - 2], boundaries[boundaries.len() - 1]);
    refused([
        ("silence in the JSON", main.clone().stopped(Lane::Main, end - 10), silence),
        ("silence in the sections", main.stopped(Lane::Main, eof - 9), silence),
        ("no JSON", over().patched("description", 0, 5, b"["), says),
        ("other JSON", over().replaced("description", 0, b"\x06\0\0\0\x02{}"), says),
        ("a length beyond the end", over().patched("description", 0, 1, &[1]), says),
        ("a huge length", over().patched("description", 0, 1, &[0xff; 4]), says),
    ])
}
