//! A small sound migration, to be broken.

use multifd_tests::Outcome;
use multifd_tests::peer::{Memory, PAGE, Recorder, Recording, Style, Trial};

/// Two blocks with no zero page, one of which compresses well.
pub(crate) fn memory() -> Memory {
    let mut memory = Memory::zero(&[("pc.ram", 8), ("pc.bios", 2)]);
    for (index, at) in memory.all().into_iter().enumerate() {
        let bytes = (0..PAGE).map(|byte| u8::try_from(byte * byte / 7 % 200 + index).unwrap_or(0) | 1);
        memory.set(at, &bytes.collect::<Vec<_>>());
    }
    memory
}

/// All pages in one round, some once more in END.
pub(crate) fn recording(style: &Style) -> Recording {
    let memory = memory();
    let mut recorder = Recorder::new(style.clone());
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &memory.every(2, 0));
    recorder.finish()
}

/// The same on main alone.
pub(crate) fn single() -> Recording {
    recording(&Style::default())
}

/// The same on two channels.
pub(crate) fn multifd() -> Recording {
    recording(&Style::multifd(2))
}

/// Each recording is refused in words that have all these parts; the first is what was done to it.
pub(crate) fn refused<const N: usize>(cases: [(&str, Recording, &[&str]); N]) -> Outcome {
    for (done, recording, says) in cases {
        let refused = Trial::unix()?.refuses(&recording, says);
        refused.unwrap_or_else(|failure| panic!("{done}: {failure}"));
    }
    Ok(())
}

#[test]
fn the_unbroken_migrations_arrive() -> Outcome {
    for recording in [single(), multifd()] {
        let trial = Trial::unix()?;
        trial.write_checkpoint(&recording)?.result?;
        memory().check_checkpoint(&trial.checkpoint())?;
    }
    Ok(())
}
