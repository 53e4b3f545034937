//! A real guest: Linux with busybox, on a serial console, with virtio devices.
//!
//! The kernel, its modules and busybox are what `tests/peers/install` unpacked. Under TCG it is at
//! its prompt in about 5 s.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{During, Failure, Outcome, Qemu, QemuBuilder, Scratch, cpio::Archive, skip::guest_dir};

/// Which Linux to make.
#[derive(Clone, Debug)]
pub struct Linux {
    modules: Vec<String>,
    files: Vec<(String, Vec<u8>)>,
}

/// A kernel and an initramfs to boot.
#[derive(Clone, Debug)]
pub struct LinuxImage {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Linux {
    /// Linux with the drivers for virtio-blk and virtio-net over PCI.
    pub fn new() -> Self {
        let modules = ["virtio_pci", "virtio_blk", "virtio_net"].map(str::to_owned).to_vec();
        Self { modules, files: Vec::new() }
    }

    /// One more module, `virtio_rng` for example; what it depends on comes with it. A module that
    /// the kernel does not have is taken to be built in.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// One more file in the root folder.
    #[must_use]
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), content.into()));
        self
    }

    /// Writes the initramfs, about 2.5 MB, into `scratch`.
    ///
    /// # Errors
    /// When the guest's parts are not there (see [`crate::skip_without_linux!`]) or cannot be used.
    pub fn build(&self, scratch: &Scratch) -> Outcome<LinuxImage> {
        let dir = guest_dir();
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
            archive.folder(folder)?;
        }
        archive.file("bin/busybox", &fs::read(dir.join("busybox")).during("busybox")?)?;
        archive.link("bin/sh", "busybox")?;
        let mut load_order = Vec::new();
        let available = modules_below(&dir.join("modules"))?;
        for module in &self.modules {
            add_module(module, &available, &mut load_order, &mut archive)?;
        }
        archive.file("modules/order", load_order.join("\n").as_bytes())?;
        archive.file("init", INIT.as_bytes())?;
        for (name, content) in &self.files {
            archive.file(name, content)?;
        }
        let initramfs = scratch.path("initramfs");
        fs::write(&initramfs, archive.finish()?)?;
        Ok(LinuxImage { kernel: dir.join("vmlinuz"), initramfs })
    }
}

impl Default for Linux {
    fn default() -> Self {
        Self::new()
    }
}

impl QemuBuilder {
    /// Boots this Linux. It wants 256 MiB of RAM or more.
    #[must_use]
    pub fn linux(self, image: &LinuxImage) -> Self {
        let builder = self.argument("-kernel").argument(image.kernel.display().to_string());
        let builder = builder.argument("-initrd").argument(image.initramfs.display().to_string());
        builder.argument("-append").argument(KERNEL_ARGUMENTS)
    }

    /// A virtio-blk disk with this raw image. Both sides of a migration may have the same image:
    /// QEMU hands it over.
    #[must_use]
    pub fn disk(self, image: &Path) -> Self {
        let drive = format!("if=none,id=disk,format=raw,file={}", image.display());
        self.argument("-drive").argument(drive).device("virtio-blk-pci,drive=disk")
    }

    /// A virtio-net card on a network that is inside QEMU and leads nowhere else.
    #[must_use]
    pub fn network(self) -> Self {
        self.argument("-netdev").argument("user,id=net,restrict=on").device("virtio-net-pci,netdev=net")
    }
}

impl Qemu {
    /// Waits until the Linux guest takes commands on its console.
    ///
    /// # Errors
    /// When it does not in time; the failure quotes what it said last.
    pub fn wait_linux(&mut self, within: Duration) -> Outcome {
        self.serial().wait_for(READY, 0, within).map(drop)
    }

    /// Runs a shell command on the Linux guest's console and gives what it printed, stderr
    /// included, without the last newline.
    ///
    /// # Errors
    /// When the command reports a failure or does not end in time.
    pub fn run_in_guest(&mut self, command: &str, within: Duration) -> Outcome<String> {
        let deadline = Instant::now() + within;
        let start = self.serial().mark();
        // The console echoes nothing, so the mark appears only when the command has ended.
        self.type_text(&format!("{{ {command}\n}} 2>&1; echo \"{MARK}$?.\"\n"))?;
        let mark = self.serial().wait_for(MARK, start, within).during(command)?;
        let end = self.serial().wait_for(".\n", mark, deadline.saturating_duration_since(Instant::now()))?;
        let said = self.serial().text();
        let part = |from, to| said.get(from..to).unwrap_or_default();
        let output = part(start, mark - MARK.len()).trim_end().to_owned();
        match part(mark, end) {
            "0.\n" => Ok(output),
            status => Err(Failure::new(format!("{command}: exit status {} {output}", status.trim_end()))),
        }
    }
}

/// `panic=-1`: reboot at once, which ends QEMU. `no_timer_check`: on a busy host the kernel may see
/// no timer tick in time and give up.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check";

/// What the guest prints when its shell is about to start.
const READY: &str = "multifd-guest: ready\n";

/// Stands between the output of a command and its exit status.
const MARK: &str = "multifd-guest: status ";

/// The guest's first process. `dmesg -n 1`: the kernel must not write between the lines of a
/// command.
const INIT: &str = "#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
dmesg -n 1
for module in $(cat /modules/order); do insmod /modules/$module; done
stty -F /dev/ttyS0 -echo -onlcr
echo 'multifd-guest: ready' >/dev/ttyS0
export PS1= PS2=
exec setsid cttyhack sh
";

/// All modules by name, with `_` for `-` as the kernel has it.
fn modules_below(dir: &Path) -> Outcome<HashMap<String, PathBuf>> {
    let mut found = HashMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).during(folder.display())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                folders.push(path);
            } else if let Some((stem, "ko")) = name.split_once('.') {
                found.insert(stem.replace('-', "_"), path);
            } else if name.contains(".ko.") {
                return Err(Failure::new(format!(
                    "{}: a compressed module cannot be loaded",
                    path.display()
                )));
            }
        }
    }
    Ok(found)
}

/// Adds a module, after those that it depends on, unless it is in the order already.
fn add_module(
    name: &str,
    available: &HashMap<String, PathBuf>,
    order: &mut Vec<String>,
    archive: &mut Archive,
) -> Outcome {
    let file = format!("{name}.ko");
    let Some(path) = available.get(name).filter(|_| !order.contains(&file)) else { return Ok(()) };
    let content = fs::read(path).during(path.display())?;
    for other in dependencies(&content) {
        add_module(&other, available, order, archive)?;
    }
    archive.file(&format!("modules/{file}"), &content)?;
    order.push(file);
    Ok(())
}

/// The modules that a module says it depends on, in its `.modinfo` section: strings with a NUL
/// after each.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let entry = module.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(KEY)).unwrap_or_default();
    let names = String::from_utf8_lossy(entry).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_the_modinfo_strings() {
        let module = b"\x7fELF\0\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(module), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"depends=\0name=x\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }

    #[test]
    fn a_module_is_loaded_once_and_after_what_it_needs() {
        let scratch = Scratch::new().unwrap();
        let module = |name: &str, depends: &str| {
            fs::write(scratch.path(name), format!("\0depends={depends}\0")).unwrap();
        };
        module("a.ko", "b,c-d,built_in");
        module("b.ko", "c_d");
        module("c-d.ko", "");
        let available = modules_below(scratch.dir()).unwrap();
        let (mut order, mut archive) = (Vec::new(), Archive::default());
        for name in ["a", "b"] {
            add_module(name, &available, &mut order, &mut archive).unwrap();
        }
        assert_eq!(order, ["c_d.ko", "b.ko", "a.ko"]);
        module("e.ko.xz", "");
        assert!(modules_below(scratch.dir()).is_err());
    }
}
