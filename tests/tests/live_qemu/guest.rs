//! A QEMU guest that was stopped and taken into a checkpoint, with its RAM mapped here: our own
//! source moves it on, while a device still writes to it.

use std::fs::File;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use multifd_engine::codecs::{Codec, Uncompressed, parse_codec};
use multifd_engine::transports::Endpoint;
use multifd_engine::{
    Checkpoint, Error, HostMemory, Limits, OnStall, PAGE, Precopy, RamBlock, Report, Served, Source,
    ZeroCopySend,
};
use multifd_tests::{
    BootSector, Compression, Failure, Fill, Outcome, Qemu, QemuBuilder, Receive, Scratch, Settings, Side,
    guest, ram,
};

use super::device::Device;

pub(crate) const SOON: Duration = Duration::from_secs(60);

const RAM_MIB: u32 = 64;

/// What the device writes to: 16 MiB in the middle of RAM, which the guest does not know of.
const DEVICE_PAGES: std::ops::Range<usize> = 0x1800..0x2800;

/// The stopped guest, and what is needed to move it.
pub(crate) struct Guest {
    vm: QemuBuilder,
    checkpoint: Checkpoint,
    blocks: Vec<RamBlock>,
    /// The file behind main memory.
    ram: PathBuf,
    /// All that the guest has said until it was stopped.
    said: String,
    _scratch: Scratch,
}

/// How our source differs from its defaults.
#[derive(Clone, Debug, Default)]
pub(crate) struct Way {
    pub(crate) channels: Option<u8>,
    pub(crate) compression: Compression,
    pub(crate) xbzrle: bool,
    /// Over a socket file, where the sender learns at once that the other end is gone. Default:
    /// TCP.
    pub(crate) unix: bool,
    pub(crate) zero_copy: ZeroCopySend,
    /// Bytes per second.
    pub(crate) max_bandwidth: Option<NonZeroU64>,
    /// It may go on before its RAM is there.
    pub(crate) postcopy: bool,
    /// The same, with a connection of its own for pages that are asked for.
    pub(crate) preempt: bool,
}

impl Guest {
    /// Boots a guest that counts, stops it, and takes it into a checkpoint.
    pub(crate) fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let vm = Qemu::builder().ram_mib(RAM_MIB).floppy(&floppy);
        let mut source = vm.clone().fill(Fill::new(3)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        source.stop()?;
        let out = scratch.path("checkpoint");
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
        source.set_up(&Settings { return_path: true, ..Settings::default() }, Side::Source)?;
        source.migrate(receive.uri())?;
        source.wait_completed(SOON)?;
        receive.wait_success(SOON)?;
        let checkpoint = Checkpoint::open(&out)?;
        let ram = scratch.path("ram");
        let blocks = writable(&checkpoint, &ram)?;
        Ok(Self { vm, checkpoint, blocks, ram, said: source.quit()?, _scratch: scratch })
    }

    /// A device that writes to the guest's memory.
    pub(crate) fn device(&self) -> Outcome<Device> {
        Device::new(main_memory(&self.blocks)?.clone(), DEVICE_PAGES)
    }

    /// A fresh QEMU that waits for the guest, and where.
    pub(crate) fn destination(&self, way: &Way) -> Outcome<(Qemu, Endpoint)> {
        let mut destination = self.vm.clone().incoming("defer").spawn("destination")?;
        destination.set_up(&way.settings(), Side::Destination)?;
        let uri = match way.unix {
            true => destination.scratch().unix_uri("incoming"),
            false => "tcp:127.0.0.1:0".to_owned(),
        };
        let uri = destination.listen(&uri)?;
        Ok((destination, uri.parse()?))
    }

    /// Connects a source of ours, which hears from the device what it writes.
    pub(crate) fn source(&self, way: &Way, device: &Device, to: &Endpoint) -> Result<Precopy, Error> {
        let mut builder = Source::builder(self.blocks.clone(), self.checkpoint.configuration().clone())
            .switchover_start(self.checkpoint.manifest().switchover_start)
            .dirty_log(device.log())
            .channels(way.channels.unwrap_or(0).into())
            .codec(way.codec())
            .max_bandwidth(way.max_bandwidth)
            .zero_copy_send(way.zero_copy)
            .postcopy(way.postcopy)
            .postcopy_preempt(way.preempt)
            .timeout(SOON);
        if way.postcopy {
            // Only what is written in a round keeps it from its end.
            let on_stall = OnStall::Postcopy;
            let deadline = Some(SOON);
            builder = builder.limits(Limits {
                downtime_limit: Duration::ZERO,
                on_stall,
                deadline,
                ..Limits::default()
            });
        }
        if way.xbzrle {
            builder = builder.xbzrle(CACHE);
        }
        builder.build()?.connect(to)
    }

    /// Connects a source of the guest as it stands, with one block more if that is given.
    pub(crate) fn still_source(&self, more: Option<RamBlock>, to: &Endpoint) -> Result<Precopy, Error> {
        let blocks = self.blocks.iter().cloned().chain(more).collect();
        Source::builder(blocks, self.checkpoint.configuration().clone())
            .switchover_start(self.checkpoint.manifest().switchover_start)
            .paused_guest()
            .timeout(SOON)
            .build()?
            .connect(to)
    }

    /// So many rounds while the device writes; it stops, and the guest goes over.
    pub(crate) fn move_over(&self, mut precopy: Precopy, device: &Device, rounds: u64) -> Outcome<Report> {
        for _ in 0..rounds {
            device.write(WRITES)?;
            precopy.round().map_err(text)?;
        }
        device.stand_still()?;
        let last = precopy.stop_copy().map_err(text)?;
        last.commit(self.checkpoint.device_state()).map_err(text)
    }

    /// The guest goes on, and its RAM follows.
    pub(crate) fn switch_over(&self, precopy: Precopy, device: &Device) -> Outcome<Report> {
        device.stand_still()?;
        let mut postcopy = precopy.switch_to_postcopy(self.checkpoint.device_state()).map_err(text)?;
        match postcopy.serve().map_err(text)? {
            Served::Completed(report) => Ok(*report),
            Served::Paused(error) => Err(text(error)),
        }
    }

    /// The memory is ours, but for what the guest has written since; its count goes on without a
    /// gap.
    pub(crate) fn check_goes_on(&self, mut destination: Qemu) -> Outcome {
        destination.wait_completed(SOON)?;
        if destination.run_state()? != "running" {
            destination.resume()?;
        }
        destination.serial().wait_lines(3, 0, SOON)?;
        destination.stop()?;
        let (here, there) = (std::fs::read(&self.ram)?, std::fs::read(destination.ram())?);
        assert_eq!(here.len(), there.len());
        let pages = here.chunks(PAGE).zip(there.chunks(PAGE)).enumerate().skip(GUEST_PAGES);
        let differ: Vec<_> = pages.filter(|(_, (here, there))| here != there).map(|(page, _)| page).collect();
        assert!(differ.is_empty(), "pages {differ:?} differ");
        let lines = guest::check_sequence(&(self.said.clone() + &destination.quit()?))?;
        assert!(lines > 3, "{lines} lines");
        Ok(())
    }

    /// The memory is ours, byte for byte, and the guest's count goes on without a gap.
    pub(crate) fn check_arrived(&self, mut destination: Qemu) -> Outcome {
        destination.wait_completed(SOON)?;
        assert_eq!(destination.run_state()?, "paused", "as it was at the source");
        ram::check_equal(&self.ram, destination.ram())?;
        destination.resume()?;
        destination.serial().wait_lines(3, 0, SOON)?;
        let lines = guest::check_sequence(&(self.said.clone() + &destination.quit()?))?;
        assert!(lines > 3, "{lines} lines");
        Ok(())
    }
}

/// Pages that the guest writes, and what is below them: the BIOS's and the boot sector's.
const GUEST_PAGES: usize = 0x90;

/// Writes of the device in each round: a third of its pages, some of them several times.
pub(crate) const WRITES: u64 = 2000;

/// xbzrle cache: all of the device's pages fit.
const CACHE: usize = 32 << 20;

impl Way {
    fn settings(&self) -> Settings {
        let mut capabilities = Vec::new();
        capabilities.extend(self.postcopy.then_some("postcopy-ram"));
        capabilities.extend(self.preempt.then_some("postcopy-preempt"));
        let (channels, compression) = (self.channels, self.compression);
        Settings { channels, compression, capabilities, ..Settings::default() }
    }

    fn codec(&self) -> Arc<dyn Codec> {
        parse_codec(self.compression.name()).unwrap_or_else(|_| Arc::new(Uncompressed))
    }
}

/// The checkpoint's blocks, main memory as a file of its own that can be written.
fn writable(checkpoint: &Checkpoint, path: &std::path::Path) -> Outcome<Vec<RamBlock>> {
    let mut blocks = checkpoint.ram()?;
    let main = main_memory(&blocks)?;
    let len = main.memory().len();
    let original = main.memory().file().ok_or_else(|| Failure::new("main memory has no file"))?;
    ram::copy_sparse(original.file(), path)?;
    let file = File::options().read(true).write(true).open(path)?;
    let copy = RamBlock::new(main.name().clone(), HostMemory::map_file(file, len)?);
    let places = blocks.iter_mut().filter(|block| block.name() == copy.name());
    places.for_each(|place| *place = copy.clone());
    Ok(blocks)
}

fn main_memory(blocks: &[RamBlock]) -> Outcome<&RamBlock> {
    let found = blocks.iter().find(|block| block.name().as_str() == "pc.ram");
    found.ok_or_else(|| Failure::new("no block pc.ram"))
}

/// With all its causes: a failure has the first alone.
pub(crate) fn text(error: Error) -> Failure {
    Failure::new(error.chain())
}
