//! Sound migrations with a few bytes changed anywhere: they arrive or they are refused, and nothing
//! panics or hangs.

use multifd_engine::Destination;
use multifd_tests::peer::{Codec, Recording, Style, TIMEOUT, Trial};
use multifd_tests::{Failure, Outcome};

use crate::fixture::{memory, recording};

/// Refuses or accepts each of these mutations; gives the number of refusals.
fn survives(recording: &Recording, seeds: std::ops::Range<u64>) -> Outcome<usize> {
    let trial = Trial::unix()?;
    let mut refused = 0;
    for seed in seeds {
        let destination = Destination::builder(memory().provide(0x5a)?).timeout(TIMEOUT);
        let verdict = trial.run(&recording.clone().mutated(seed), destination, |arrived| arrived.accept());
        let verdict = verdict.map_err(|failure| Failure::new(format!("seed {seed}: {failure}")))?;
        refused += usize::from(verdict.result.is_err());
    }
    Ok(refused)
}

#[test]
fn of_main_alone() -> Outcome {
    let recording = recording(&Style { xbzrle: true, return_path: false, ..Style::default() });
    let refused = survives(&recording, 0..400)?;
    assert!((40..360).contains(&refused), "{refused} refused");
    Ok(())
}

#[test]
fn of_channels() -> Outcome {
    for (codec, seeds) in [(Codec::None, 0..150), (Codec::Zlib, 300..450), (Codec::Zstd, 600..750)] {
        let recording = recording(&Style { codec, packet_pages: 3, return_path: false, ..Style::multifd(2) });
        let refused = survives(&recording, seeds)?;
        assert!(refused > 25, "{codec:?}: {refused} refused");
    }
    Ok(())
}
