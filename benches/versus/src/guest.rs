//! The guests that are moved. Each is in a QEMU that is paused, and in a checkpoint
//! with the same content.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use multifd_codecs::zero::is_zero;
use multifd_tests::ram::PAGE;
use multifd_tests::{
    CheckpointFiles, During, Failure, Fill, Host, Linux, Multifd, Network, Outcome, Qemu, QemuBuilder,
    Receive, Scratch, Settings, Side, skip,
};
use rustix::fs::{FallocateFlags, fallocate};
use serde_json::json;

use crate::tls::Credentials;

/// What is in the memory.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Guest {
    /// Synthetic: zero, text, pattern and random pages.
    Filled { ram_mib: u32 },
    /// Linux that has worked with real files: text, libraries, compressed data, heap, page cache,
    /// zeros.
    Linux { ram_mib: u32 },
    /// 8 GiB of which 256 MiB were ever touched.
    Sparse,
}

/// A guest, ready to be moved again and again.
///
/// ```text
///  left host ── cable, of the rate that the scenario wants ── right host
///  the source; the destination of a move                      the destination of a move over a link
///  that stays on its machine
/// ```
///
/// A QEMU cannot be taken to another network, and this one makes many moves: it is started at the
/// left host, and the hosts live as long as it does. Only the cable between them is shaped anew for
/// each link. The hosts' names are no other run's and their network is theirs alone, so that
/// nothing of this machine's own is touched and runs do not meet.
pub(crate) struct Stage {
    /// Its only CPU is halted with interrupts off: nothing changes its RAM, whether it is paused or
    /// not.
    pub(crate) qemu: Qemu,
    /// The same guest.
    pub(crate) checkpoint: PathBuf,
    pub(crate) builder: QemuBuilder,
    pub(crate) credentials: Credentials,
    /// Or why there is none: then everything runs outside, and there are no links.
    network: Outcome<Network>,
    scratch: Scratch,
}

/// How long anything about a guest may take; a Linux that works through its files under emulation
/// takes longest.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(600);

impl Guest {
    pub(crate) fn ram_mib(self) -> u32 {
        match self {
            Self::Filled { ram_mib } | Self::Linux { ram_mib } => ram_mib,
            Self::Sparse => 8 << 10,
        }
    }

    /// Brings the guest up and stops it.
    pub(crate) fn stage(self) -> Outcome<Stage> {
        let scratch = Scratch::new()?;
        let builder = Qemu::builder().machine("q35").ram_mib(self.ram_mib());
        let builder = match self {
            // What the machine has of the way it was booted must be at both ends, the files that it
            // booted need not.
            Self::Linux { .. } => builder.argument("-kernel").argument(kernel().display().to_string()),
            Self::Filled { .. } | Self::Sparse => builder.floppy(&halting_floppy(&scratch)?),
        };
        let network = Network::new();
        let source = builder.clone().inside(&inside(&network, Host::Left));
        let qemu = match self {
            Self::Linux { ram_mib } => linux(&source, ram_mib, &network)?,
            Self::Filled { .. } => halted(&source.fill(Fill::new(1)))?,
            Self::Sparse => {
                let qemu = halted(&source)?;
                touch(qemu.ram(), self.ram_mib(), 1)?;
                qemu
            }
        };
        let credentials = Credentials::new(&scratch)?;
        let checkpoint = scratch.path("checkpoint");
        let mut stage = Stage { qemu, checkpoint, builder, credentials, network, scratch };
        stage.credentials.give_to(&mut stage.qemu, "client")?;
        receive(&mut stage.qemu, &stage.checkpoint, &inside(&stage.network, Host::Left))?;
        Ok(stage)
    }
}

impl Stage {
    /// What a command begins with to run at a host.
    pub(crate) fn inside(&self, host: Host) -> Vec<&str> {
        inside(&self.network, host)
    }

    /// From now on there are that many Mbit/s between the hosts.
    pub(crate) fn shape(&self, mbit: u32) -> Outcome {
        match &self.network {
            Ok(network) => network.shape(mbit),
            Err(failure) => Err(Failure::new(failure.to_string())),
        }
    }

    /// Before each move: pages that hold nothing are no memory of the host, as in a guest that
    /// never touched them. A QEMU that has looked at them has made them.
    pub(crate) fn forget_untouched(&self) -> Outcome {
        let file = File::options().read(true).write(true).open(self.qemu.ram())?;
        let mut untouched = 0..0;
        let forget = |range: &Range<u64>| {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if range.is_empty() {
                Ok(())
            } else {
                fallocate(&file, flags, range.start, range.end - range.start)
            }
        };
        each_page(&file, |offset, zero, _| {
            if zero && untouched.end == offset {
                untouched.end += PAGE;
            } else if zero {
                forget(&untouched)?;
                untouched = offset..offset + PAGE;
            }
            Ok(())
        })?;
        Ok(forget(&untouched)?)
    }

    /// A file of the pages that hold something, one after the other: what a move moves.
    pub(crate) fn packed(&self) -> Outcome<PathBuf> {
        let path = self.scratch.path("packed");
        if !path.exists() {
            let ram = File::open(CheckpointFiles::open(&self.checkpoint)?.block("pc.ram")?)?;
            let mut packed = BufWriter::new(File::create(&path)?);
            each_page(&ram, |_, zero, page| if zero { Ok(()) } else { packed.write_all(page) })?;
            packed.flush()?;
        }
        Ok(path)
    }
}

fn inside(network: &Outcome<Network>, host: Host) -> Vec<&str> {
    network.as_ref().map_or_else(|_| Vec::new(), |network| network.inside(host).to_vec())
}

/// Calls `visit` with the offset of each page of `ram`, whether it is zero, and its bytes.
fn each_page(ram: &File, mut visit: impl FnMut(u64, bool, &[u8]) -> io::Result<()>) -> Outcome {
    let mut chunk = vec![0; CHUNK];
    let page_len = usize::try_from(PAGE)?;
    for start in (0..ram.metadata()?.len()).step_by(CHUNK) {
        ram.read_exact_at(&mut chunk, start)?;
        for (offset, page) in (start..).step_by(page_len).zip(chunk.chunks(page_len)) {
            visit(offset, is_zero(page), page)?;
        }
    }
    Ok(())
}

/// Bytes read at a time. Guests have whole MiB.
const CHUNK: usize = 1 << 20;

/// Saves what `qemu` holds as a checkpoint; `near` is what a command begins with to run at the same
/// host.
pub(crate) fn receive(qemu: &mut Qemu, checkpoint: &Path, near: &[&str]) -> Outcome {
    let settings = Settings { channels: Some(2), return_path: true, ..Settings::default() };
    let mut receive = Receive::listen_in(near, "tcp:127.0.0.1:0", checkpoint, &[])?;
    qemu.set_up(&settings, Side::Source)?;
    qemu.migrate(receive.uri())?;
    receive.wait_success(TIMEOUT)?;
    qemu.wait_completed(TIMEOUT).map(drop)
}

/// A guest that has switched its only CPU off.
fn halted(builder: &QemuBuilder) -> Outcome<Qemu> {
    let mut qemu = builder.spawn("source")?;
    qemu.serial().wait_for("H", 0, TIMEOUT)?;
    come_to_rest(&mut qemu)?;
    Ok(qemu)
}

fn halting_floppy(scratch: &Scratch) -> Outcome<PathBuf> {
    let mut image = HALT.to_vec();
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    // The length says which kind of floppy it is.
    image.resize(1_474_560, 0);
    let floppy = scratch.path("floppy");
    fs::write(&floppy, image)?;
    Ok(floppy)
}

fn kernel() -> PathBuf {
    skip::guest_dir().join("vmlinuz")
}

/// A boot sector: `mov dx, 3f8; mov al, 'H'; out dx, al; cli; hlt; jmp hlt`.
const HALT: [u8; 10] = [0xba, 0xf8, 0x03, 0xb0, b'H', 0xee, 0xfa, 0xf4, 0xeb, 0xfd];

/// The Linux guest, from the image that the first run has made, at the left host.
fn linux(builder: &QemuBuilder, ram_mib: u32, network: &Outcome<Network>) -> Outcome<Qemu> {
    let image = skip::guest_dir().join(format!("versus-{ram_mib}"));
    if !image.is_dir() {
        eprintln!("making the guest image {}: takes some minutes, once", image.display());
        let made = work_and_save(ram_mib, &image);
        // It gets its name when it is whole. Another run may have been faster.
        if !image.is_dir() {
            made?;
        }
    }
    let mut qemu = builder.clone().incoming("defer").paused().spawn("source")?;
    let settings = Settings { channels: Some(2), ..Settings::default() };
    qemu.set_up(&settings, Side::Destination)?;
    let uri = qemu.listen("tcp:127.0.0.1:0")?;
    let near = inside(network, Host::Left);
    Multifd::send_in(&near, &image, &uri, &settings, &[])?.wait_success(TIMEOUT)?;
    qemu.wait_completed(TIMEOUT)?;
    come_to_rest(&mut qemu)?;
    Ok(qemu)
}

/// Lets a guest that is about to halt do so, and stops it.
fn come_to_rest(qemu: &mut Qemu) -> Outcome {
    let deadline = Instant::now() + TIMEOUT;
    qemu.resume()?;
    let registers = json!({ "command-line": "info registers" });
    while !qemu.execute("human-monitor-command", registers.clone())?.to_string().contains("HLT=1") {
        if Instant::now() > deadline {
            return Err(Failure::new("the guest does not halt"));
        }
        qemu.gather_events(Duration::from_millis(5))?;
    }
    qemu.stop()
}

/// Boots Linux, has it work with real files of this machine, and saves it.
fn work_and_save(ram_mib: u32, image: &Path) -> Outcome {
    let builder = Qemu::builder().machine("q35").ram_mib(ram_mib);
    let scratch = Scratch::new()?;
    let mut system = Linux::new();
    for (name, content) in real_files()? {
        system = system.file(&name, content);
    }
    let mut qemu = builder.linux(&system.build(&scratch)?).spawn("guest")?;
    qemu.wait_linux(TIMEOUT)?;
    for step in WORK {
        qemu.run_in_guest(step, TIMEOUT)?;
    }
    qemu.type_text("halt -f\n")?;
    qemu.serial().wait_for("System halted", 0, TIMEOUT)?;
    qemu.stop()?;
    receive(&mut qemu, image, &[])
}

/// What the guest does: compressed copies, text tools with their heaps, files that come and go.
const WORK: [&str; 4] = [
    "cd /tmp && for f in /real-*; do gzip -c $f > ${f#/}.gz; done",
    "cat /real-* | strings | sort | uniq -c | sort -rn > words",
    "tar cf all.tar /real-* && md5sum all.tar && rm all.tar",
    "awk '{ seen[$2] += $1 } END { for (word in seen) print word, seen[word] }' words > counted && sync",
];

/// Libraries and texts of this machine, at most 96 MiB: enough to fill the page cache, few enough
/// for an emulated guest.
fn real_files() -> Outcome<Vec<(String, Vec<u8>)>> {
    let (mut files, mut left) = (Vec::new(), 96 << 20);
    for folder in ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/share/perl5", "/usr/bin"]
    {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| path.is_file() && !path.is_symlink()).take(400) {
            let content = fs::read(&path).during(path.display())?;
            if content.len() <= left.min(16 << 20) {
                left -= content.len();
                files.push((format!("real-{}", files.len()), content));
            }
        }
    }
    Ok(files)
}

/// Writes into a RAM file, in runs of `run_mib` MiB, of which each 32 MiB have one.
pub(crate) fn touch(ram: &Path, ram_mib: u32, run_mib: u64) -> Outcome {
    let file = File::options().write(true).open(ram).during(ram.display())?;
    let fill = Fill::new(2);
    let mut page = Vec::new();
    // From 1 MiB on: below is what the firmware needs.
    for run in 0..u64::from(ram_mib / 32) {
        let first = (1 + run * 32) * ((1 << 20) / PAGE);
        for index in first..first + (run_mib << 8) {
            page.clear();
            fill.page(index, &mut page);
            file.write_all_at(&page, index * PAGE)?;
        }
    }
    Ok(())
}
