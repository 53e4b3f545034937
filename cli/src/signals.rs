//! First Ctrl-C cancels cleanly, the second kills.

use std::thread;

use multifd_engine::{Canceller, Error, ErrorKind, Phase};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Exit code of a command that was killed by the second signal.
const KILLED: i32 = 130;

/// Cancels by `canceller` on the first SIGINT or SIGTERM, from now to the end of the process.
///
/// # Errors
/// `ApiMisuse`: the system lets us have no handler.
pub(crate) fn cancel_on_signal(canceller: Canceller) -> Result<(), Error> {
    watch(canceller)
        .map_err(|error| Error::new(ErrorKind::ApiMisuse, Phase::Setup, "no signal handler").because(error))
}

fn watch(canceller: Canceller) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut signals = signals.forever();
        if signals.next().is_some() {
            eprintln!("multifd: cancelling, once more to kill");
            canceller.cancel();
        }
        if signals.next().is_some() {
            std::process::exit(KILLED);
        }
    })?;
    Ok(())
}
