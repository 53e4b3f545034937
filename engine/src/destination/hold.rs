//! A source that is held between two rounds, and cannot say so.
//!
//! A QEMU that waits for `migrate-continue` (pause-before-switchover) sends nothing and answers
//! nothing: its protocol has no word for it. That its host and its process are there, the kernel
//! knows: keepalive ends a connection whose peer has gone, and a process that ends closes it. A
//! process that is stopped cannot be told from one that is held, so the wait has a limit. The
//! footer of the last round's section is still in QEMU's buffer then.

use std::time::{Duration, Instant};

use crate::error::{ErrorKind, Phase, Result};
use crate::stream::MainReader;

/// Waits up to `limit` for the first byte of what comes next, a footer or an item, where the
/// timeout holds for the rest.
///
/// # Errors
/// As reading gives them. An end of the stream is none: it shows when the item is read.
pub(super) fn wait_between_rounds(reader: &mut MainReader, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut told = false;
    while reader.buffered().is_empty() {
        match reader.fill(Phase::Active, "what follows a round") {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Deadline && begun.elapsed() < limit => {
                if !std::mem::replace(&mut told, true) {
                    let (peer, silent) = (reader.name(), begun.elapsed());
                    tracing::warn!(
                        "{peer} has been silent between two rounds for {silent:.0?}, and its connection stands: \
                         waiting up to {limit:?}, as for a source that is held before the switch-over"
                    );
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
