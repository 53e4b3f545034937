//! Settings of a destination.

use std::time::Duration;

use multifd_transports::{Endpoint, SocketOptions};
use serde::Serialize;

use super::parameter;
use crate::destination::SwitchoverAck;
use crate::run::session::DEFAULT_TIMEOUT;

/// How a destination receives a guest: plain data. What is an object (memory, codecs, TLS
/// credentials) is the [`DestinationBuilder`](crate::DestinationBuilder)'s.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DestinationConfig {
    /// Requires exactly this many parallel channels, and waits for all of them at the first sync
    /// point. Default: any number up to 255, fixed at the first sync point. Of a `mapped-ram` file:
    /// this many threads read it; default: one a core, up to 4.
    pub channels: Option<usize>,
    /// Reads the pages of a `mapped-ram` file past the page cache (O_DIRECT); anything else that
    /// comes is refused then. The memory must begin at a multiple of the disk's block size.
    /// Default: no.
    pub direct_io: bool,
    /// Lets the source switch to post-copy, also one that makes a connection of its own for urgent
    /// pages then. Connections are accepted until the end, if the source announces that it may
    /// switch. Default: no.
    pub postcopy: bool,
    /// Threads that hear of page faults while RAM follows a guest in post-copy, each with a
    /// userfaultfd for a slice of every block: 1 to 16. More than 1 help where many vCPUs fault at
    /// the same time on as many cores. Default: 1.
    pub fault_threads: usize,
    /// When the link of a post-copy is gone, listen again at the same address, for this long each
    /// time; `None`: give up. Default: `None`.
    pub recover: Option<Duration>,
    /// When the link of another multifd breaks before the guest is handed over, keep what has come,
    /// and listen again at the same address, for this long each time that pages have moved: the
    /// source goes on where it was ([`SourceConfig::resume_for`](crate::SourceConfig::resume_for)).
    /// It has to know a secret of the migration. A source that was cancelled is waited for, too.
    /// Not shorter than `timeout`, or a source may come back before its silence is noticed. Over
    /// tcp, unix and vsock; elsewhere it has no effect. Default: `None`.
    pub resume_for: Option<Duration>,
    /// When to acknowledge the switch-over unasked. Default: [`SwitchoverAck::Auto`].
    pub switchover_ack: SwitchoverAck,
    /// Most bytes of devices' sections, and as many over parallel channels, which are kept in
    /// memory until the guest is loaded. Default: `None`, half of the machine's memory. A VMM that
    /// knows its devices may well set less, on a port that others can reach above all.
    pub max_device_state: Option<usize>,
    /// How long to wait for the source: to connect, for the next byte of the main stream, for the
    /// rest of a packet. Default: 60 s. A multifd source that is held says that it is alive; for a
    /// QEMU that is held there is `hold_timeout`.
    pub timeout: Duration,
    /// How long the source may be silent between two rounds, when it is held there and cannot say
    /// so: a QEMU with pause-before-switchover. Its host must answer keepalive meanwhile (see
    /// `socket`), its process must not end. A process that hangs is waited for, too. Not shorter
    /// than `timeout`, which holds within rounds. Default: `None`, `timeout`.
    pub hold_timeout: Option<Duration>,
    /// Bytes of guest RAM, all blocks together, that a source may announce. Default: any number
    /// that the memory's provider takes.
    pub max_ram: Option<u64>,
    /// Bytes of memory that the source can make this end use beside guest RAM: buffers and windows
    /// of all channels, device state, its description. A channel takes up to 2 MiB, with zstd and a
    /// window of the highest level 34 MiB. Digests of pages that have come are not in it: 2 MiB for
    /// a GiB of them. Default: half of the machine's memory.
    pub max_memory: Option<u64>,
    /// Time from the first byte of the main channel until everything has come, however slowly it
    /// comes. Default: none; a peer that sends a byte per `timeout` is patiently served.
    pub deadline: Option<Duration>,
    /// Takes device state over parallel channels (VFIO), which is kept in memory:
    /// [`Arrived::device_packets`](crate::Arrived::device_packets). Default: no, a source that
    /// sends some is refused.
    pub device_packets: bool,
    /// Reads all RAM again when the last page is there, on all cores, and compares each page with a
    /// digest of what was placed there, from whatever source: memory that was changed since, or is
    /// bad, is refused with [`ChangedPages`](crate::ChangedPages), and the guest runs on at its
    /// source. The guest is paused meanwhile. Not of pages that follow a switch to post-copy, nor
    /// of a `mapped-ram` file, which is refused. Default: no.
    pub verify: bool,
    /// How the connections' sockets are tuned. Default: as for
    /// [`SourceConfig`](crate::SourceConfig).
    pub socket: SocketOptions,
}

/// Threads that hear of page faults.
const MAX_FAULT_THREADS: usize = 16;

impl Default for DestinationConfig {
    fn default() -> Self {
        Self {
            channels: None,
            direct_io: false,
            postcopy: false,
            fault_threads: 1,
            recover: None,
            resume_for: None,
            switchover_ack: SwitchoverAck::Auto,
            max_device_state: None,
            timeout: DEFAULT_TIMEOUT,
            hold_timeout: None,
            max_ram: None,
            max_memory: None,
            deadline: None,
            device_packets: false,
            verify: false,
            socket: SocketOptions::default(),
        }
    }
}

impl DestinationConfig {
    /// What may come over `endpoint`. What the stream itself must be shows when it comes.
    pub(crate) fn check(
        &self,
        endpoint: &Endpoint,
        tls: bool,
        takes_several: bool,
        is_file: bool,
    ) -> Result<(), String> {
        if self.timeout.is_zero() {
            return Err("timeout is 0, expected more".to_owned());
        }
        if !(1..=MAX_FAULT_THREADS).contains(&self.fault_threads) {
            return Err(format!("{} fault threads, expected 1 to {MAX_FAULT_THREADS}", self.fault_threads));
        }
        if let Some(hold) = self.hold_timeout.filter(|hold| *hold < self.timeout) {
            return Err(format!("hold timeout {hold:?}, expected at least the timeout, {:?}", self.timeout));
        }
        if let Some(channels @ 1..) = self.channels {
            parameter::MULTIFD_CHANNELS.check(channels as u64).map_err(|error| error.to_string())?;
        }
        if tls && !takes_several {
            return Err(format!("TLS over {endpoint}, expected tcp, unix or vsock"));
        }
        match self.channels {
            // Of a file they are threads, if its pages have fixed places; the stream says whether
            // they do.
            Some(channels @ 1..) if !takes_several && !is_file => {
                Err(format!("{channels} parallel channels over {endpoint}, which is one channel"))
            }
            _ => Ok(()),
        }
    }
}
