//! The guest goes on in the real QEMU before its RAM is there: what was sent and written since is
//! discarded there, and pulled.

use multifd_tests::{Outcome, skip_without_qemu};

use crate::guest::{Guest, WRITES, Way, text};

/// When the source switches.
#[derive(Clone, Copy, Debug)]
enum When {
    /// After so many rounds.
    Rounds(usize),
    AtStall,
}

fn goes_on(way: &Way, when: When) -> Outcome {
    let way = &Way { postcopy: true, ..way.clone() };
    let guest = Guest::new()?;
    let device = guest.device()?;
    let (destination, uri) = guest.destination(way)?;
    let mut precopy = guest.source(way, &device, &uri).map_err(text)?;
    let done = |rounds: usize, stalled| match when {
        When::Rounds(wanted) => rounds == wanted,
        When::AtStall => stalled,
    };
    while !done(precopy.decisions().len(), precopy.wants_postcopy()) {
        device.write(WRITES)?;
        precopy.round().map_err(text)?;
    }
    device.write(WRITES)?;
    let report = guest.switch_over(precopy, &device).map_err(|failure| destination.explain(failure))?;
    assert!(report.postcopy.as_ref().is_some_and(|postcopy| postcopy.run_after.is_some()), "{report}");
    guest.check_goes_on(destination)
}

#[test]
fn what_a_round_has_left_stale_is_pulled() -> Outcome {
    skip_without_qemu!();
    goes_on(&Way::default(), When::Rounds(1))
}

#[test]
fn what_three_rounds_have_left_stale_is_pulled_over_a_connection_of_its_own() -> Outcome {
    skip_without_qemu!();
    goes_on(&Way { preempt: true, unix: true, ..Way::default() }, When::Rounds(3))
}

#[test]
fn a_guest_that_stalls_goes_on() -> Outcome {
    skip_without_qemu!();
    goes_on(&Way { xbzrle: true, ..Way::default() }, When::AtStall)
}
