//! A guest that runs at its destination is served, over one link after the other.

use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::{Error, Postcopy, Report, Served};
use multifd_transports::Endpoint;

use crate::human::tell;

/// Time between two tries where a destination is dialled and does not go on.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// Serves until all of RAM is there. `recover`: for how long a link that broke is dialled again.
pub(crate) fn serve(
    mut postcopy: Postcopy,
    uri: &Endpoint,
    recover: Option<Duration>,
) -> Result<Report, Error> {
    loop {
        match postcopy.serve()? {
            Served::Completed(report) => return Ok(*report),
            Served::Paused(cause) => replace_link(&mut postcopy, cause, uri, recover)?,
        }
    }
}

fn replace_link(
    postcopy: &mut Postcopy,
    cause: Error,
    uri: &Endpoint,
    recover: Option<Duration>,
) -> Result<(), Error> {
    let Some(recover) = recover else { return Err(cause) };
    tell(format_args!("multifd: the link broke: {}; dialling {uri} for {recover:?}", cause.chain()));
    let begun = Instant::now();
    let mut last = cause;
    while let Some(within) = recover.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
        match postcopy.recover(uri, within) {
            Ok(()) => {
                tell("multifd: the link is back");
                return Ok(());
            }
            Err(error) => last = error,
        }
        // A destination that takes the connection and ends it again is not to be flooded. No event
        // is waited for.
        thread::park_timeout(TRY_AGAIN);
    }
    Err(last)
}
