//! What "served" means.

use std::time::Duration;

use multifd_tests::Outcome;
use multifd_tests::peer::{Memory, Received, Recorder, Recording, Style, Trial, Verdict};

/// No legal peer of these tests is silent for that long, however slow the machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// A destination on a unix socket that takes its time.
pub(crate) fn trial() -> Outcome<Trial> {
    Ok(Trial::unix()?.patient(TIMEOUT))
}

/// A whole migration in this style arrives.
pub(crate) fn style_arrives(style: &Style) -> Outcome {
    let mut memory = Memory::small(1);
    let recording = Recorder::migration(style.clone(), &mut memory);
    arrives(&recording, &memory).unwrap_or_else(|failure| panic!("{style:?}: {failure}"));
    Ok(())
}

/// The recording's guest arrives, in memory full of garbage as well as in a checkpoint.
pub(crate) fn arrives(recording: &Recording, memory: &Memory) -> Outcome<(Verdict, Received)> {
    let trial = trial()?;
    trial.write_checkpoint(recording)?.result?;
    memory.check_checkpoint(&trial.checkpoint())?;
    let (verdict, received) = trial.receive(recording, memory)?;
    let report = verdict.result?;
    memory.check(&received.blocks)?;
    Ok((Verdict { result: Ok(report), ..verdict }, received))
}
