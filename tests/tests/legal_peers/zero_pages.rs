//! A page that is announced as zero is zero afterwards, whatever it held.

use multifd_tests::peer::{Codec, Memory, PAGE, Recorder, Style};
use multifd_tests::{Outcome, ZeroPages};

use crate::fixture::{arrives, style_arrives};

const WAYS: [ZeroPages; 3] = [ZeroPages::Legacy, ZeroPages::Multifd, ZeroPages::None];

#[test]
fn every_way_to_say_zero() -> Outcome {
    for zero_pages in WAYS {
        for channels in [0, 1, 4] {
            for codec in [Codec::None, Codec::Zstd] {
                style_arrives(&Style { zero_pages, codec, ..Style::multifd(channels) })?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_page_that_became_zero_and_something_else_again() -> Outcome {
    for zero_pages in WAYS {
        for (channels, codec) in [(0, Codec::None), (2, Codec::None), (2, Codec::Zlib)] {
            let mut memory = Memory::small(5);
            let mut recorder = Recorder::new(Style { zero_pages, codec, ..Style::multifd(channels) });
            recorder.setup(&memory);
            recorder.part(&memory, &memory.all());
            for round in 0..6 {
                let pages = memory.every(2, round % 2);
                for (index, at) in pages.iter().enumerate() {
                    let byte = if (index + round) % 3 == 0 { 0x77 } else { 0 };
                    memory.set(*at, &[byte; PAGE]);
                }
                recorder.part(&memory, &pages);
            }
            recorder.end(&memory, &[]);
            arrives(&recorder.finish(), &memory)?;
        }
    }
    Ok(())
}

#[test]
fn all_of_memory_is_zero() -> Outcome {
    for zero_pages in WAYS {
        for channels in [0, 2] {
            let memory = Memory::zero(&[("pc.ram", 300), ("/rom@etc/acpi/tables", 32)]);
            let mut recorder = Recorder::new(Style { zero_pages, ..Style::multifd(channels) });
            recorder.setup(&memory);
            recorder.part(&memory, &memory.all());
            recorder.end(&memory, &[]);
            arrives(&recorder.finish(), &memory)?;
        }
    }
    Ok(())
}
