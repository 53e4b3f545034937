//! The process by name, and the reasons why it cannot be read.

use std::path::PathBuf;
use std::{fmt, fs, io};

use super::PAGE;

/// Why the memory of a live process cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It has ended, or executed another program.
    #[error("{process}: it has ended, or runs another program now")]
    Ended {
        /// The process by number and name.
        process: String,
    },
    /// The kernel does not permit it.
    #[error(
        "{process}: no permission to read its memory, which takes the same user (and no more capabilities than \
         this process has), or CAP_SYS_PTRACE{scope}"
    )]
    Forbidden {
        /// The process by number and name.
        process: String,
        /// The setting of the Yama security module that forbids it, if one does.
        scope: &'static str,
    },
    /// It has no memory that could be a guest's RAM.
    #[error("{process}: no memory that could be a guest's RAM (a kernel thread, or it has ended)")]
    NoRam {
        /// The process by number and name.
        process: String,
    },
    /// There is no process with this number.
    #[error("process {pid}: there is no such process")]
    NotFound {
        /// The number.
        pid: u32,
    },
    /// This machine's pages have another size.
    #[error("process {pid}: pages of this machine have {found} bytes, expected {PAGE}")]
    PageSize {
        /// Number of the process.
        pid: u32,
        /// Bytes of a page.
        found: usize,
    },
    /// The kernel fails to read it.
    #[error("{process}")]
    Unreadable {
        /// The process by number, and by name where that is known.
        process: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// `process 4711 (qemu-system-x86)`
#[derive(Debug)]
pub(super) struct Target {
    pid: u32,
    /// Its short name, as the kernel has it.
    command: String,
}

impl Target {
    pub(super) fn find(pid: u32) -> Result<Self, ProcessError> {
        let command =
            fs::read(format!("/proc/{pid}/comm")).map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => ProcessError::NotFound { pid },
                _ => ProcessError::Unreadable { process: format!("process {pid}"), source },
            })?;
        let printable = |letter: char| if letter.is_control() { '?' } else { letter };
        let command = String::from_utf8_lossy(&command).trim_end().chars().map(printable).collect();
        Ok(Self { pid, command })
    }

    /// Path of a file in its folder of /proc.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    pub(super) fn ended(&self) -> ProcessError {
        ProcessError::Ended { process: self.to_string() }
    }

    pub(super) fn refuses(&self, source: io::Error) -> ProcessError {
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => self.forbidden(),
            Some(libc::ENOENT | libc::ESRCH) => self.ended(),
            _ => ProcessError::Unreadable { process: self.to_string(), source },
        }
    }

    fn forbidden(&self) -> ProcessError {
        // Documentation/admin-guide/LSM/Yama.rst
        let scope = match fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default().trim()
        {
            "1" => "; kernel.yama.ptrace_scope is 1: without CAP_SYS_PTRACE only a parent has it",
            "2" => "; kernel.yama.ptrace_scope is 2: no process has it without CAP_SYS_PTRACE",
            "3" => "; kernel.yama.ptrace_scope is 3: no process has it until the next boot",
            _ => "",
        };
        ProcessError::Forbidden { process: self.to_string(), scope }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}
