//! Packets of differences, which only multifd ends may send to each other.

use multifd_tests::Outcome;
use multifd_tests::peer::{Memory, PageAt, Recorder, Recording, Style, Trial, field};
use multifd_wire::{BlockName, CodecId, Command, HELLO_PING, PacketFlags, PageSize, RamPacketHeader, Wishes};

use crate::fixture::{memory, refused};

/// Pages 3 and 5 of `pc.ram` are to be changed by what is in `payload`. The source has asked for a
/// HELLO, or not.
fn with(asked: bool, payload: &[u8]) -> Recording {
    let memory = memory();
    let mut recorder = Recorder::new(Style::multifd(1));
    recorder.header();
    if asked {
        recorder.command(Command::Ping(HELLO_PING));
    }
    recorder.start(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    let block = BlockName::try_from("pc.ram").unwrap();
    let mut packet = Vec::new();
    RamPacketHeader {
        flags: PacketFlags::pages(CodecId::DIALECT_DELTA),
        packet_num: 7,
        block: Some(&block),
        normal: &[3 << 12, 5 << 12],
        zero: &[],
        payload_len: u32::try_from(payload.len()).unwrap(),
    }
    .encode(PageSize::K4, &mut packet);
    let recording = recorder.finish().inserted("sync", 2, &packet);
    recording.inserted("sync", 2, payload)
}

/// Changes byte 1 of the first page and byte 0 of the second.
const SOUND: [u8; 10] = [0, 3, 1, 1, 0xaa, 0, 3, 0, 1, 0xbb];

#[test]
fn sound_differences_arrive() -> Outcome {
    let mut expected: Memory = memory();
    for (page, byte, value) in [(3, 1, 0xaa), (5, 0, 0xbb)] {
        let at = PageAt { block: 0, page };
        let mut content = expected.page(at).to_vec();
        content[byte] = value;
        expected.set(at, &content);
    }
    let (verdict, received) = Trial::unix()?.receive(&with(true, &SOUND), &expected)?;
    assert_eq!(verdict.result?.progress.pages_xbzrle, 2);
    expected.check(&received.blocks)
}

#[test]
fn unsound_differences() -> Outcome {
    let channel = "active, channel 0 (unix:";
    let zero = with(true, &SOUND).patched("inserted", 0, field::ZERO_PAGES, &[0, 0, 0, 1]);
    let past = with(true, &SOUND).patched("inserted", 0, field::OFFSETS, &0x8000_u64.to_be_bytes());
    refused([
        ("unasked", with(false, &SOUND), &[channel, "packet with codec 0x6 after packets with none (0x0)"]),
        ("no length", with(true, &[0]), &[channel, "1 bytes left in a packet of differences, 2 expected"]),
        ("no bytes", with(true, &[0, 0, 0, 0]), &[channel, "difference of 0 bytes, expected 1..=4096"]),
        ("too many bytes", with(true, &[0x10, 0x01, 0]), &["difference of 4097 bytes, expected 1..=4096"]),
        (
            "fewer bytes than it says",
            with(true, &SOUND[..9]),
            &["2 bytes left in a packet of differences, 3 expected"],
        ),
        ("one page only", with(true, &SOUND[..5]), &["0 bytes left in a packet of differences, 2 expected"]),
        ("bytes left", with(true, &[&SOUND[..], &[0, 1]].concat()), &["2 bytes and 0 zero pages too many"]),
        ("zero pages", zero, &[channel, "0 bytes and 1 zero pages too many with differences"]),
        (
            "past the page",
            with(true, &[0, 4, 0xff, 0x1f, 2, 1]),
            &["xbzrle record for page 3 of RAM block pc.ram"],
        ),
        ("past the block", past, &["offset 0x8000 in RAM block pc.ram"]),
    ])
}

/// A migration whose source wishes for checks, and sends digests of these blocks behind its RAM.
fn wishing(wishes: Option<Wishes>, digests: &[&str]) -> Recording {
    let memory = memory();
    let mut recorder = Recorder::new(Style::multifd(1));
    recorder.header();
    recorder.command(Command::Ping(HELLO_PING));
    wishes.iter().for_each(|wishes| recorder.command(Command::Ping(wishes.ping())));
    recorder.start(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    for name in digests {
        let block = BlockName::try_from(*name).unwrap();
        recorder.command(Command::Digest { block, digest: 0x0102_0304_0506_0708 });
    }
    recorder.finish()
}

#[test]
fn what_was_not_sent_as_it_was_announced_is_refused() -> Outcome {
    let digest = Some(Wishes { digest: true, ..Wishes::default() });
    let checksums = Some(Wishes { checksums: true, ..Wishes::default() });
    // Of the packet with pages: a flag says that there are checksums, which are 0.
    let sealed = wishing(None, &[]).patched("packet", 1, field::CHECKS, &[0, 0, 0, 1]);
    refused([
        ("no digest", wishing(digest, &[]), &["main (unix:", "no digest of RAM block pc."]),
        ("one digest of two", wishing(digest, &["pc.bios"]), &["digest: different", "sent: pc.bios"]),
        (
            "other digests",
            wishing(digest, &["pc.ram", "pc.bios"]),
            &[
                "main (unix:",
                "digest: different; RAM blocks that are not what the source has sent: pc.bios, pc.ram",
            ],
        ),
        (
            "a digest unannounced",
            wishing(None, &["pc.ram"]),
            &["digest of RAM block pc.ram that was not announced"],
        ),
        ("a digest of nothing", wishing(digest, &["vga"]), &["unknown RAM block \"vga\""]),
        ("no checksum", wishing(checksums, &[]), &["channel 0 (unix:", "has no checksum, as was announced"]),
        ("another header", sealed, &["channel 0 (unix:", "checksum of a packet's header"]),
    ])
}

/// Wishes of a later version, and none at all.
#[test]
fn a_source_without_wishes_for_checks_arrives_unchecked() -> Outcome {
    for wishes in [None, Some(Wishes::default())] {
        let (verdict, received) = Trial::unix()?.receive(&wishing(wishes, &[]), &memory())?;
        assert_eq!(verdict.result?.digest, None);
        memory().check(&received.blocks)?;
    }
    Ok(())
}
