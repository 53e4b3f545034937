//! What the process may do once it knows its files: Landlock for these, seccomp for system calls.
//!
//! ```text
//!  flags, TLS files, folders ── Sandbox::enter ── peer's bytes, a foreign file's bytes
//! ```
//!
//! It is for the case that such bytes make the process do what its code does not: then it reads and
//! writes no files but its own, starts no program and gains no rights. Each legal use goes on:
//! where a command runs (`exec:`) there is no sandbox, since the command would inherit it, and a
//! kernel without either is no error.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus,
};
use multifd_transports::Endpoint;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tracing::{debug, trace};

use crate::flags::Common;

/// The rights that the rules below speak of. Those of later kernels are not restricted: connecting
/// to a unix socket is one of them.
const RIGHTS: ABI = ABI::V4;

/// What name resolution, system libraries and the engine's looks at its own process read.
const SYSTEM: [&str; 12] = [
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix",
    "/proc",
    "/run",
    "/sys",
    "/usr",
    "/var/lib/sss",
    "/var/run",
    "/dev/vsock",
];

/// Devices that are written to.
const DEVICES: [&str; 6] =
    ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/userfaultfd"];

/// The files and addresses of a command.
#[derive(Debug)]
pub(crate) struct Sandbox {
    rules: Vec<(PathBuf, BitFlags<AccessFs>)>,
    files: bool,
    /// A command is started, which inherits what is forbidden here.
    commands: bool,
    /// TCP connections are made: dialled, or by the resolver.
    connects: bool,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        let read = AccessFs::from_read(RIGHTS);
        let mut rules: Vec<_> = SYSTEM.iter().map(|path| (PathBuf::from(path), read)).collect();
        let devices = DEVICES.iter().map(|path| (PathBuf::from(path), read | AccessFs::WriteFile));
        rules.extend(devices);
        // Backtraces are made from it.
        rules.extend(std::env::current_exe().map(|path| (path, read)));
        Self { rules, files: true, commands: false, connects: false }
    }

    /// For memory of other processes: Landlock has no rule that allows it.
    #[must_use]
    pub(crate) fn all_files(self) -> Self {
        Self { files: false, ..self }
    }

    /// For measurements over loopback.
    #[must_use]
    pub(crate) fn connecting(self) -> Self {
        Self { connects: true, ..self }
    }

    /// A file, or a folder with all in it, that is read.
    #[must_use]
    pub(crate) fn reading(self, path: &Path) -> Self {
        self.rule(path, AccessFs::from_read(RIGHTS))
    }

    /// A checkpoint or a file, by its path or its URI.
    #[must_use]
    pub(crate) fn at_rest(self, path: &Path) -> Self {
        match path.to_string_lossy().parse() {
            Ok(Endpoint::File { path, .. }) => self.reading(&path),
            _ => self.reading(path),
        }
    }

    /// A file that is written, and is there already or is made.
    #[must_use]
    pub(crate) fn writing(self, path: &Path) -> Self {
        let rights = AccessFs::from_read(RIGHTS) | AccessFs::WriteFile | AccessFs::Truncate;
        let made = rights | AccessFs::MakeReg | AccessFs::RemoveFile;
        self.rule(path, rights).rule(parent(path), made)
    }

    /// A folder that is filled, and gets another name in its parent.
    #[must_use]
    pub(crate) fn filling(self, folder: &Path) -> Self {
        let named = AccessFs::ReadDir | AccessFs::MakeDir | AccessFs::RemoveDir;
        self.rule(folder, AccessFs::from_all(RIGHTS)).rule(parent(folder), named)
    }

    /// Where to listen, or the file to read.
    #[must_use]
    pub(crate) fn listening(self, at: &Endpoint) -> Self {
        match at {
            Endpoint::File { path, .. } => self.reading(path),
            // A name is resolved, which may take a connection.
            Endpoint::Tcp { host, .. } if !host.is_empty() && host.parse::<IpAddr>().is_err() => {
                self.connecting()
            }
            other => self.socket(other),
        }
    }

    /// Where to dial, or the file to write.
    #[must_use]
    pub(crate) fn dialling(self, to: &Endpoint) -> Self {
        match to {
            Endpoint::File { path, .. } => self.writing(path),
            other => self.socket(other).connecting(),
        }
    }

    fn socket(mut self, endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Unix(path) | Endpoint::FdFrom(path) => {
                let made = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
                self.rule(parent(path), made)
            }
            Endpoint::Exec(_) => {
                self.commands = true;
                self
            }
            _ => self,
        }
    }

    fn rule(mut self, path: &Path, rights: impl Into<BitFlags<AccessFs>>) -> Self {
        self.rules.push((path.to_owned(), rights.into()));
        self
    }

    /// From here on the process does only this, unless the flags say otherwise.
    pub(crate) fn enter(self, common: &Common) {
        if common.no_sandbox || self.commands {
            trace!(commands = self.commands, "no sandbox");
            return;
        }
        match self.restrict_files() {
            Ok(status) => trace!(?status, "files restricted by Landlock"),
            Err(error) => debug!(%error, "files are not restricted by Landlock"),
        }
        match filter().and_then(|filter| seccompiler::apply_filter_all_threads(&filter)) {
            Ok(()) => trace!(refused = refused().len(), "system calls restricted by seccomp"),
            Err(error) => debug!(%error, "system calls are not restricted by seccomp"),
        }
    }

    /// Restricts the calling thread, and those that it makes.
    fn restrict_files(&self) -> Result<RulesetStatus, Refused> {
        if !self.files {
            return Ok(RulesetStatus::NotEnforced);
        }
        let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(RIGHTS))?;
        if !self.connects {
            ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
        }
        let mut created = ruleset.create()?;
        self.rules.iter().try_for_each(|(path, rights)| add(&mut created, path, *rights))?;
        Ok(created.restrict_self()?.ruleset)
    }
}

/// What is not there needs no rule: opening it fails as ever. Nor do pipes and sockets without a
/// name, for which the kernel has none and which it lets pass. A process without a descriptor to
/// spare gets no rules at all: with some missing it could not remove what it has begun.
fn add(ruleset: &mut RulesetCreated, path: &Path, rights: BitFlags<AccessFs>) -> Result<(), Refused> {
    let opened = match PathFd::new(path) {
        Ok(opened) => opened,
        Err(_) if !path.exists() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let rights = if path.is_dir() { rights } else { rights & AccessFs::from_file(RIGHTS) };
    if !rights.is_empty()
        && let Err(error) = ruleset.add_rule(PathBeneath::new(opened, rights))
    {
        debug!(%error, path = %path.display(), "no rule for a file");
    }
    Ok(())
}

/// Why there is no sandbox.
type Refused = Box<dyn std::error::Error + Send + Sync>;

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// System calls that no command makes once it runs: programs, rights, other processes, mounts,
/// kernel modules, the clock, and interfaces of the kernel that had many holes.
fn refused() -> Vec<libc::c_long> {
    let mut refused = vec![
        libc::SYS_acct,
        libc::SYS_add_key,
        libc::SYS_bpf,
        libc::SYS_chroot,
        libc::SYS_clock_settime,
        libc::SYS_delete_module,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fanotify_init,
        libc::SYS_finit_module,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fsopen,
        libc::SYS_init_module,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_io_uring_setup,
        libc::SYS_kexec_load,
        libc::SYS_keyctl,
        libc::SYS_mount,
        libc::SYS_mount_setattr,
        libc::SYS_move_mount,
        libc::SYS_open_by_handle_at,
        libc::SYS_open_tree,
        libc::SYS_perf_event_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pivot_root,
        libc::SYS_ptrace,
        libc::SYS_quotactl,
        libc::SYS_reboot,
        libc::SYS_request_key,
        libc::SYS_setdomainname,
        libc::SYS_setgid,
        libc::SYS_setgroups,
        libc::SYS_sethostname,
        libc::SYS_setns,
        libc::SYS_setregid,
        libc::SYS_setresgid,
        libc::SYS_setresuid,
        libc::SYS_setreuid,
        libc::SYS_settimeofday,
        libc::SYS_setuid,
        libc::SYS_swapoff,
        libc::SYS_swapon,
        libc::SYS_umount2,
        libc::SYS_unshare,
    ];
    #[cfg(target_arch = "x86_64")]
    refused.extend([libc::SYS_ioperm, libc::SYS_iopl, libc::SYS_kexec_file_load, libc::SYS_modify_ldt]);
    refused
}

/// Families of sockets that are used; netlink by name resolution.
const FAMILIES: [libc::c_int; 5] =
    [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK];

/// The refused calls, sockets of other families and writes to other processes fail with EPERM; all
/// else is allowed.
fn filter() -> seccompiler::Result<BpfProgram> {
    let others = FAMILIES.iter().map(|family| {
        let family = u64::from(family.unsigned_abs());
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
    });
    let others = SeccompRule::new(others.collect::<Result<_, _>>()?)?;
    let mut rules: std::collections::BTreeMap<_, _> =
        refused().into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, vec![others]);
    // Memory of its own the process writes by this call, where a fault must be an error.
    let own = u64::from(std::process::id());
    let foreign = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, own)?;
    rules.insert(libc::SYS_process_vm_writev, vec![SeccompRule::new(vec![foreign])?]);
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()?)
}

#[cfg(test)]
mod tests;
