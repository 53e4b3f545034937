//! A live source of ours into a real QEMU: pages change while they are sent, and nothing may be
//! lost.

mod device;
mod faults;
mod guest;
mod postcopy;

use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

use device::Device;
use guest::{Guest, SOON, WRITES, Way, text};
use multifd_engine::{Control, Error, Precopy, Report, ZeroCopySend};
use multifd_tests::{Compression, Outcome, skip_without_qemu};

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

/// A local network copies nevertheless: one goes on regardless, the other gives it up.
#[test]
fn parallel_channels_without_a_copy_on_our_side() -> Outcome {
    skip_without_qemu!();
    let way = |zero_copy| Way { zero_copy, ..parallel(Compression::None) };
    let always = moves(&way(ZeroCopySend::Always))?.zero_copy.unwrap_or_default();
    assert!(always.sends > WRITES / 128, "{always:?}");
    let while_it_pays = moves(&way(ZeroCopySend::WhileItPays))?.zero_copy.unwrap_or_default();
    assert!(while_it_pays.sends > 0, "{while_it_pays:?}");
    assert!(while_it_pays.copied == 0 || while_it_pays.sends < always.sends, "{while_it_pays:?} {always:?}");
    Ok(())
}

/// QEMU takes no differences on parallel channels: a cache must not make us send them.
#[test]
fn no_differences_on_parallel_channels_to_qemu() -> Outcome {
    skip_without_qemu!();
    let report = moves(&Way { xbzrle: true, ..parallel(Compression::None) })?;
    assert_eq!(report.progress.pages_xbzrle, 0);
    Ok(())
}

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

/// Returns when that many bytes are on the wire, or never will be.
fn wait_for_wire(control: &Control, bytes: u64) {
    let deadline = Instant::now() + SOON;
    while control.progress().wire_bytes < bytes && !control.state().is_final() && Instant::now() < deadline {
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// The two data paths.
fn ways() -> [Way; 2] {
    [single(), parallel(Compression::Zstd(1))]
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
    // Limited to the end, it would have taken longer.
    let unlifted = Duration::from_secs(wire / MIB).mul_f64(0.9);
    assert!(begun.elapsed() < unlifted, "{:?} for {wire} bytes", begun.elapsed());

    precopy.control().set_max_bandwidth(limit);
    device.write(WRITES / 2)?;
    let round = precopy.round().map_err(text)?;
    assert!(round.wire_bytes > MIB, "{round}");
    check_slow(round.wire_bytes, Duration::from_micros(round.duration_us));
    precopy.control().set_max_bandwidth(None);
    guest.move_over(precopy, &device, 1)?;
    guest.check_arrived(destination)
}

/// Fails if that many bytes went faster than 1 MiB/s: within 3 %, 20 ms of idle time, and one
/// packet.
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
