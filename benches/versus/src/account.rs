//! What a process has cost so far, from `/proc`.

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use multifd_tests::Outcome;

/// The kernel counts in 100ths of a second, whatever its own tick.
const TICK: Duration = Duration::from_millis(10);

/// Between two looks at a process's memory: short against the shortest move, and cheap.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Time on a core of a process that runs, its threads that have ended included; to 10 ms.
pub(crate) fn cpu(pid: u32) -> Outcome<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in brackets, may contain anything. After it: state is field 3, utime and stime are
    // 14 and 15.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace()).into_iter().flatten();
    let ticks: u32 = fields.skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    Ok(TICK * ticks)
}

/// Private memory of a process, in bytes: guest RAM is a shared file on both sides and does not
/// count. 0 for one that has ended.
pub(crate) fn private_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// The most private memory that each of two processes had, looked at again and again until `done`
/// is dropped.
pub(crate) fn watch(pids: [u32; 2], done: &Receiver<()>) -> [u64; 2] {
    let mut peak = [0; 2];
    loop {
        for (peak, pid) in peak.iter_mut().zip(pids) {
            *peak = private_bytes(pid).max(*peak);
        }
        if !matches!(done.recv_timeout(LOOK_AGAIN), Err(RecvTimeoutError::Timeout)) {
            return peak;
        }
    }
}
