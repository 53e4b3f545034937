//! The process by name, and why it cannot be looked at.

use std::path::PathBuf;
use std::{fmt, fs, io};

use crate::tune::Result;

/// `process 4711 (qemu-system-x86)`
#[derive(Debug)]
pub(super) struct Target {
    pid: u32,
    /// Its short name.
    command: String,
}

impl Target {
    pub(super) fn find(pid: u32) -> Result<Self> {
        let command = fs::read(format!("/proc/{pid}/comm")).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => format!("process {pid}: there is no such process"),
            _ => format!("process {pid}: {error}"),
        })?;
        let printable = |letter: char| if letter.is_control() { '?' } else { letter };
        let command = String::from_utf8_lossy(&command).trim_end().chars().map(printable).collect();
        Ok(Self { pid, command })
    }

    /// A file of the kernel about it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    pub(super) fn ended(&self) -> String {
        format!("{self}: it has ended, or runs another program now")
    }

    pub(super) fn refuses(&self, error: &io::Error) -> String {
        match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => self.forbidden(),
            Some(libc::ENOENT | libc::ESRCH) => self.ended(),
            _ => format!("{self}: {error}"),
        }
    }

    fn forbidden(&self) -> String {
        let refused = format!(
            "{self}: no permission to read its memory, which takes the same user (and no more capabilities than \
            this process has), or CAP_SYS_PTRACE"
        );
        // Documentation/admin-guide/LSM/Yama.rst
        let scope = match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default().trim()
        {
            "1" => "; kernel.yama.ptrace_scope is 1: only a parent may without CAP_SYS_PTRACE",
            "2" => "; kernel.yama.ptrace_scope is 2: nobody may without CAP_SYS_PTRACE",
            "3" => "; kernel.yama.ptrace_scope is 3: nobody may until the next boot",
            _ => "",
        };
        refused + scope
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}
