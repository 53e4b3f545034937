//! A live source of ours into a real QEMU: pages change while they are sent, and nothing may be lost.

mod device;
mod guest;

use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use device::Device;
use guest::{Guest, SOON, WRITES, Way, text};
use multifd_engine::{Control, DeviceState, Error, ErrorKind, MigrationState, Precopy, Report};
use multifd_tests::{Compression, Outcome, Qemu, process::Signal, skip_without_qemu};

/// At least four, so that pages go again that went again.
const ROUNDS: u64 = 6;

const MIB: u64 = 1 << 20;

/// Bytes on the wire when something strikes in the first round, which takes 16 MiB or more.
const PART_OF_A_ROUND: u64 = 2 * MIB;

fn single() -> Way {
    Way::default()
}

fn parallel(compression: Compression) -> Way {
    Way { channels: Some(3), compression, ..Way::default() }
}

/// Moves a guest while the device writes, and finds everything there.
fn moves(way: &Way) -> Outcome<Report> {
    let guest = Guest::new()?;
    let device = guest.device()?;
    let (destination, uri) = guest.destination(way)?;
    let precopy = guest.source(way, &device, &uri).map_err(text)?;
    let report = guest.move_over(precopy, &device, ROUNDS)?;
    assert_eq!(report.progress.rounds, ROUNDS + 1, "the last one is the stopped guest's");
    assert!(report.decisions.iter().skip(1).all(|round| round.dirty_bytes > 0), "{:?}", report.decisions);
    assert!(report.confirmed);
    guest.check_arrived(destination)?;
    Ok(report)
}

#[test]
fn single_channel() -> Outcome {
    skip_without_qemu!();
    moves(&single()).map(drop)
}

#[test]
fn differences_on_a_single_channel() -> Outcome {
    skip_without_qemu!();
    let report = moves(&Way { xbzrle: true, ..single() })?;
    assert!(report.progress.pages_xbzrle > WRITES, "{:?} {:?}", report.progress, report.xbzrle);
    Ok(())
}

#[test]
fn parallel_channels() -> Outcome {
    skip_without_qemu!();
    moves(&parallel(Compression::None)).map(drop)
}

#[test]
fn parallel_channels_with_zlib() -> Outcome {
    skip_without_qemu!();
    moves(&parallel(Compression::Zlib(1))).map(drop)
}

#[test]
fn parallel_channels_with_zstd() -> Outcome {
    skip_without_qemu!();
    moves(&parallel(Compression::Zstd(1))).map(drop)
}

/// QEMU takes no differences on parallel channels: a cache must not make us send them.
#[test]
fn no_differences_on_parallel_channels_to_qemu() -> Outcome {
    skip_without_qemu!();
    let report = moves(&Way { xbzrle: true, ..parallel(Compression::None) })?;
    assert_eq!(report.progress.pages_xbzrle, 0);
    Ok(())
}

/// What breaks a migration, at which moment.
#[derive(Clone, Copy, Debug)]
enum Fault {
    CancelInRound,
    KillInRound,
    KillBeforeStop,
    KillBeforeCommit,
}

impl Fault {
    /// Moves the guest until it strikes.
    fn strike(self, guest: &Guest, way: &Way, device: &Device) -> Outcome<Error> {
        // Slow enough for every round to have a middle.
        let slow = Way { max_bandwidth: NonZeroU64::new(8 * MIB), unix: self.needs_unix(), ..way.clone() };
        let (mut destination, uri) = guest.destination(&slow)?;
        let mut precopy = guest.source(&slow, device, &uri).map_err(text)?;
        let control = precopy.control();
        let result = match self {
            Self::CancelInRound => in_the_middle(&mut precopy, device, Control::cancel)?,
            Self::KillInRound => in_the_middle(&mut precopy, device, |_| kill(&mut destination))?,
            Self::KillBeforeStop | Self::KillBeforeCommit => {
                control.set_max_bandwidth(None);
                precopy.round().map_err(text)?;
                device.stand_still()?;
                self.strike_at_the_end(precopy, &mut destination)?
            }
        };
        let expected = match self {
            Self::CancelInRound => MigrationState::Cancelled,
            _ => MigrationState::Failed,
        };
        assert_eq!(control.state(), expected);
        if let Self::CancelInRound = self {
            assert_eq!(destination.wait_end(SOON)?.status, "failed");
        }
        Ok(result.expect_err("it was struck"))
    }

    fn strike_at_the_end(self, precopy: Precopy, destination: &mut Qemu) -> Outcome<Result<(), Error>> {
        // Without devices, the first byte to go is the one that decides.
        let nothing = DeviceState::from_tail(NO_DEVICES.to_vec())?;
        if let Self::KillBeforeStop = self {
            kill(destination);
        }
        let last = match precopy.stop_copy() {
            Ok(last) => last,
            Err(error) => return Ok(Err(error)),
        };
        if let Self::KillBeforeCommit = self {
            kill(destination);
        }
        Ok(last.commit(&nothing).map(drop))
    }

    /// Over TCP, a dead destination's kernel takes bytes for a moment: nobody could say whether they were read.
    fn needs_unix(self) -> bool {
        matches!(self, Self::KillBeforeCommit)
    }
}

/// The end of a stream with nothing before it.
const NO_DEVICES: &[u8] = b"\0\x06\0\0\0\x20{\"page_size\":4096, \"devices\":[]}";

/// Runs a round while the device writes, and has `act` strike when a part of it is on the wire.
fn in_the_middle(
    precopy: &mut Precopy,
    device: &Device,
    act: impl FnOnce(&Control) + Send,
) -> Outcome<Result<(), Error>> {
    let control = precopy.control();
    device.write(WRITES)?;
    Ok(thread::scope(|scope| {
        scope.spawn(|| {
            wait_for_wire(&control, PART_OF_A_ROUND);
            act(&control);
        });
        precopy.round().map(drop)
    }))
}

/// Returns when so many bytes are on the wire, or never will be.
fn wait_for_wire(control: &Control, bytes: u64) {
    let deadline = Instant::now() + SOON;
    while control.progress().wire_bytes < bytes && !control.state().is_final() && Instant::now() < deadline {
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// Ends a QEMU as a power cut does, and returns when the kernel has closed its sockets.
fn kill(qemu: &mut Qemu) {
    let process = qemu.process();
    let ended = process.signal(Signal::KILL).and_then(|()| process.wait(SOON));
    assert!(ended.is_ok(), "{ended:?}");
}

/// The guest is still here, and a second attempt succeeds.
fn survives(fault: Fault, way: &Way) -> Outcome<Error> {
    let guest = Guest::new()?;
    let device = guest.device()?;
    let error = fault.strike(&guest, way, &device)?;
    assert!(error.source_may_resume(), "{fault:?}: {}", error.chain());
    // It runs on here, and is written to.
    device.write(WRITES)?;
    let (destination, uri) = guest.destination(way)?;
    let precopy = guest.source(way, &device, &uri).map_err(text)?;
    guest.move_over(precopy, &device, ROUNDS)?;
    guest.check_arrived(destination)?;
    Ok(error)
}

fn ways() -> [Way; 2] {
    [single(), parallel(Compression::Zstd(1))]
}

#[test]
fn a_second_attempt_after_a_cancel_in_a_round() -> Outcome {
    skip_without_qemu!();
    for way in ways() {
        let error = survives(Fault::CancelInRound, &way)?;
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.chain());
    }
    Ok(())
}

fn after_a_kill(fault: Fault) -> Outcome {
    for way in ways() {
        let error = survives(fault, &way)?;
        println!("{fault:?}: {}", error.chain());
        // It says what broke and where, not only that something did.
        let channel = error.channel().unwrap_or_default();
        assert!(channel.contains("tcp:127.0.0.1") || channel.contains("unix:"), "{}", error.chain());
        assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
    }
    Ok(())
}

#[test]
fn a_second_attempt_after_the_destination_died_in_a_round() -> Outcome {
    skip_without_qemu!();
    after_a_kill(Fault::KillInRound)
}

#[test]
fn a_second_attempt_after_the_destination_died_before_the_stop() -> Outcome {
    skip_without_qemu!();
    after_a_kill(Fault::KillBeforeStop)
}

#[test]
fn a_second_attempt_after_the_destination_died_before_the_commit() -> Outcome {
    skip_without_qemu!();
    after_a_kill(Fault::KillBeforeCommit)
}

fn bandwidth_changes(way: &Way) -> Outcome {
    let limit = NonZeroU64::new(MIB);
    let guest = Guest::new()?;
    let device = guest.device()?;
    let (destination, uri) = guest.destination(way)?;
    let limited = Way { max_bandwidth: limit, ..way.clone() };
    let mut precopy = guest.source(&limited, &device, &uri).map_err(text)?;
    let begun = Instant::now();
    let lift = |control: &Control| {
        let bytes = control.progress().wire_bytes;
        check_slow(bytes, begun.elapsed());
        control.set_max_bandwidth(None);
    };
    in_the_middle(&mut precopy, &device, lift)?.map_err(text)?;
    let wire = precopy.progress().now().wire_bytes;
    // Limited to the end it would have taken twice that time, which no machine needs by itself.
    assert!(begun.elapsed() < Duration::from_secs(wire / MIB / 2), "{:?} for {wire}", begun.elapsed());

    precopy.control().set_max_bandwidth(limit);
    device.write(WRITES / 2)?;
    let round = precopy.round().map_err(text)?;
    assert!(round.wire_bytes > MIB, "{round}");
    check_slow(round.wire_bytes, Duration::from_micros(round.duration_us));
    precopy.control().set_max_bandwidth(None);
    guest.move_over(precopy, &device, 1)?;
    guest.check_arrived(destination)
}

/// Fails if so many bytes went faster than 1 MiB/s: within 3 %, 20 ms of idle time, and one packet.
fn check_slow(bytes: u64, time: Duration) {
    const PACKET: f64 = 132.0 * 4096.0;
    let allowed = MIB as f64 * (time.as_secs_f64() * 1.03 + 0.02) + PACKET;
    assert!(bytes as f64 <= allowed, "{bytes} bytes in {time:?}, {allowed} are allowed");
}

#[test]
fn the_bandwidth_can_be_changed_in_a_round() -> Outcome {
    skip_without_qemu!();
    ways().iter().try_for_each(bandwidth_changes)
}
