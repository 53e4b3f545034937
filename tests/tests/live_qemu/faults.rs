//! What breaks a migration, and when: the guest is still here, and a second attempt succeeds.

use std::num::NonZeroU64;

use multifd_engine::{
    Control, DeviceState, Error, ErrorKind, HostMemory, MigrationState, PAGE, Phase, Precopy, RamBlock,
};
use multifd_tests::{Outcome, Qemu, process::Signal, skip_without_qemu};

use super::device::Device;
use super::guest::{Guest, SOON, WRITES, Way, text};
use super::{MIB, ROUNDS, in_the_middle, ways};

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The operator cancels at the source.
    Cancel,
    /// The destination dies.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// In the first round, part of which is on the wire.
    InRound,
    /// The guest is paused, its last RAM is to follow.
    BeforeStop,
    /// All RAM is over, the devices are to follow.
    BeforeCommit,
}

impl Fault {
    fn strike(self, control: &Control, destination: &mut Qemu) {
        match self {
            Self::Cancel => assert!(control.cancel()),
            Self::Kill => {
                let process = destination.process();
                // Returns when the kernel has closed its sockets.
                let ended = process.signal(Signal::KILL).and_then(|()| process.wait(SOON));
                assert!(ended.is_ok(), "{ended:?}");
            }
        }
    }

    fn state(self) -> MigrationState {
        match self {
            Self::Cancel => MigrationState::Cancelled,
            Self::Kill => MigrationState::Failed,
        }
    }

    fn kind(self) -> ErrorKind {
        match self {
            Self::Cancel => ErrorKind::Cancelled,
            Self::Kill => ErrorKind::Transport,
        }
    }
}

/// Moves the guest until the fault strikes.
fn break_off(fault: Fault, when: When, guest: &Guest, way: &Way, device: &Device) -> Outcome<Error> {
    // Over TCP, the kernel takes bytes for a dead destination for a while: whether they were read
    // is unknown.
    let unix = when != When::InRound;
    // Slow enough for a round to have a middle.
    let slow = Way { max_bandwidth: NonZeroU64::new(8 * MIB), unix, ..way.clone() };
    let (mut destination, uri) = guest.destination(&slow)?;
    let mut precopy = guest.source(&slow, device, &uri).map_err(text)?;
    let control = precopy.control();
    let result = if when == When::InRound {
        in_the_middle(&mut precopy, device, |control| fault.strike(control, &mut destination))?
    } else {
        control.set_max_bandwidth(None);
        precopy.round().map_err(text)?;
        device.stand_still()?;
        break_off_at_the_end(fault, when, precopy, &mut destination)
    };
    assert_eq!(control.state(), fault.state());
    if let Fault::Cancel = fault {
        assert_eq!(destination.wait_end(SOON)?.status, "failed");
    }
    Ok(result.expect_err("it was struck"))
}

fn break_off_at_the_end(
    fault: Fault,
    when: When,
    precopy: Precopy,
    destination: &mut Qemu,
) -> Result<(), Error> {
    let control = precopy.control();
    if when == When::BeforeStop {
        fault.strike(&control, destination);
    }
    let last = precopy.stop_copy()?;
    if when == When::BeforeCommit {
        fault.strike(&control, destination);
    }
    // Without devices, the first byte to go is the one that decides.
    last.commit(&DeviceState::none()).map(drop)
}

fn survives(fault: Fault, when: When, way: &Way) -> Outcome {
    let guest = Guest::new()?;
    let device = guest.device()?;
    let error = break_off(fault, when, &guest, way, &device)?;
    // It says what broke and where, not only that something did.
    assert!(error.source_may_resume(), "{}", error.chain());
    assert_eq!(error.kind(), fault.kind(), "{}", error.chain());
    let channel = error.channel().unwrap_or_default();
    let named = channel.contains("tcp:127.0.0.1:") || channel.contains("unix:/");
    assert!(named || matches!(fault, Fault::Cancel), "{}", error.chain());

    // It runs on here, and is written to.
    device.write(WRITES)?;
    let (destination, uri) = guest.destination(way)?;
    let precopy = guest.source(way, &device, &uri).map_err(text)?;
    guest.move_over(precopy, &device, ROUNDS)?;
    guest.check_arrived(destination)
}

macro_rules! second_attempts {
    ($($name:ident: $fault:ident, $when:ident;)*) => {
        $(#[test] fn $name() -> Outcome {
            skip_without_qemu!();
            ways().iter().try_for_each(|way| survives(Fault::$fault, When::$when, way))
        })*
    };
}

second_attempts! {
    a_second_attempt_after_a_cancel_in_a_round: Cancel, InRound;
    a_second_attempt_after_a_cancel_before_the_stop: Cancel, BeforeStop;
    a_second_attempt_after_a_cancel_before_the_commit: Cancel, BeforeCommit;
    a_second_attempt_after_the_destination_died_in_a_round: Kill, InRound;
    a_second_attempt_after_the_destination_died_before_the_stop: Kill, BeforeStop;
    a_second_attempt_after_the_destination_died_before_the_commit: Kill, BeforeCommit;
}

/// QEMU says no more than a status; where it was shows all the same.
#[test]
fn what_qemu_refuses_has_the_phase_in_which_it_did() -> Outcome {
    skip_without_qemu!();
    let guest = Guest::new()?;
    let (_destination, uri) = guest.destination(&Way::default())?;
    let stranger = RamBlock::new("stranger".try_into()?, HostMemory::anonymous(PAGE)?);
    let refused = |error: Error, phase: Phase| {
        assert_eq!((error.kind(), error.phase()), (ErrorKind::PeerAborted(1), phase), "{error}");
        assert!(error.source_may_resume() && error.to_string().contains("reported status 1"), "{error}");
    };
    let error = match guest.still_source(Some(stranger), &uri) {
        Ok(mut precopy) => loop {
            if let Err(error) = precopy.round() {
                break error;
            }
        },
        Err(error) => error,
    };
    refused(error, Phase::Setup);

    let (_destination, uri) = guest.destination(&Way::default())?;
    let mut precopy = guest.still_source(None, &uri).map_err(text)?;
    precopy.round().map_err(text)?;
    let stopped = precopy.stop_copy().map_err(text)?;
    let unknown = stopped.commit(&DeviceState::opaque("no-device-of-qemu", 1, b"state"));
    refused(unknown.expect_err("QEMU has no such device"), Phase::Device);
    Ok(())
}
