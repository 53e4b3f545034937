//! How pages leave a source: on the main channel, on parallel channels, or into a file.
//!
//! ```text
//!  main ─────── records of the section that is open       on the caller's thread
//!  channels ─── packets; a SYNC where main has a FLUSH    one thread each, `mig-send-N`
//!  file ─────── a plain stream, as on main; or mapped:    one thread each, `mig-send-N`,
//!               pages at fixed places                     or the caller's
//! ```

mod channels;
mod encoding;
mod file;
mod main;
mod mapped;

use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Phase, Result};
use crate::run::session::HandOver;
use crate::source::main_writer::MainWriter;
use crate::source::return_path::ReturnPathReader;
use crate::source::rounds::RoundContext;
use crate::source::shared::SourceShared;
use crate::work::Round;

pub(super) use channels::{Channels, SyncPoints};
pub(super) use file::File;

/// How the pages of a migration leave. Chosen once, when main is connected.
pub(super) enum Carrier {
    /// Records on the main channel.
    Main,
    /// Packets on parallel channels.
    Channels(Channels),
    /// A file instead of a connection.
    File(File),
}

impl Carrier {
    /// Threads that send the pages of a round. 0: the caller's does.
    pub(super) fn workers(&self) -> usize {
        match self {
            Self::Main => 0,
            Self::Channels(channels) => channels.workers(),
            Self::File(file) => file.workers(),
        }
    }

    /// Pieces of RAM without a page, and without a sync point, may go out at any time.
    pub(super) fn takes_empty_pieces(&self) -> bool {
        match self {
            Self::Main => true,
            Self::Channels(channels) => channels.syncs_at_flush(),
            Self::File(_) => false,
        }
    }

    /// Begins the RAM section with the list of blocks.
    pub(super) fn announce(&self, main: &mut MainWriter, shared: &SourceShared) -> Result<()> {
        match self {
            Self::Main | Self::Channels(_) => {
                main.ram_start(&shared.ram);
                Ok(())
            }
            Self::File(file) => file.announce(main, shared),
        }
    }

    /// Sends the pages of `round`, with its sync point, within the section that is open on `main`.
    pub(super) fn send_round(
        &self,
        round: Round,
        context: RoundContext,
        main: &mut MainWriter,
        shared: &SourceShared,
    ) -> Result<()> {
        match self {
            Self::Main => main::send_round(&round, context, main, shared),
            Self::Channels(channels) => channels.send_round(round, context, main, shared),
            Self::File(file) => file.send_round(round, context, main, shared),
        }
    }

    /// Returns when all of a round has arrived, as far as that can be known: only then is the
    /// bandwidth known, and not that of the socket buffers. `ping` is larger than in the rounds
    /// before.
    pub(super) fn settle_round(
        &self,
        ping: u32,
        main: &mut MainWriter,
        return_path: Option<&ReturnPathReader>,
        shared: &SourceShared,
    ) -> Result<()> {
        match (self, return_path) {
            (Self::File(file), _) => file.sync(main),
            (_, None) => Ok(()),
            (_, Some(return_path)) => {
                main.ping(ping)?;
                return_path.wait_for_pong(ping, shared.session.timeout)
            }
        }
    }

    /// Sends `end`, the last bytes of the stream, and waits until the guest is known to have
    /// arrived. Gives when they were sent.
    ///
    /// # Errors
    /// [`Error::source_may_resume`] says whether the guest may be running at the destination.
    pub(super) fn finish(
        &self,
        end: &[u8],
        main: &mut MainWriter,
        return_path: Option<&ReturnPathReader>,
        shared: &SourceShared,
    ) -> Result<Instant> {
        match self {
            Self::Main | Self::Channels(_) => hand_over(end, main, return_path, shared),
            Self::File(file) => file.finish(end, main),
        }
    }

    /// Lets the workers end after [`Carrier::finish`].
    pub(super) fn dismiss_workers(&self) {
        match self {
            Self::Main => {}
            Self::Channels(channels) => channels.dismiss_workers(),
            Self::File(file) => file.dismiss_workers(),
        }
    }

    /// Throws away what did not come to its end. The switch has tripped and every worker has ended.
    pub(super) fn abort(&self) {
        match self {
            // The switch has closed every connection.
            Self::Main | Self::Channels(_) => {}
            Self::File(file) => file.abort(),
        }
    }
}

fn hand_over(
    end: &[u8],
    main: &mut MainWriter,
    return_path: Option<&ReturnPathReader>,
    shared: &SourceShared,
) -> Result<Instant> {
    shared.session.set_hand_over(HandOver::Begun);
    let channel = Arc::clone(main.channel());
    let before = channel.bytes_sent();
    return_path.iter().for_each(|return_path| return_path.expect_shut());
    let sent = channel.send_all(end);
    // The point of no return: with EOF, the first of these bytes, the destination has all it needs
    // to run the guest. If not even that one has left, because the destination died before, it has
    // not been reached.
    let handed_over = channel.bytes_sent() > before;
    if handed_over {
        main.enter(Phase::Commit);
    }
    let sent = sent.map(|()| Instant::now()).map_err(|error| main.error(error));
    let confirmed = sent.and_then(|sent| {
        match return_path {
            Some(return_path) => return_path.wait_for_shut(shared.session.timeout)?,
            None => end_unanswered(main, shared)?,
        }
        Ok(sent)
    });
    confirmed.map_err(|error| if handed_over { error.after_hand_over() } else { error })
}

/// Without a return path, the end of the connection is all that is known. A command behind it must
/// end well.
fn end_unanswered(main: &MainWriter, shared: &SourceShared) -> Result<()> {
    let channel = main.channel();
    channel.finish_sending().map_err(|error| main.error(error))?;
    channel
        .settle(shared.session.timeout)
        .map_err(|error| Error::io(Phase::Commit, "at the end", error).on(main.name()))
}
