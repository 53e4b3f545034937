//! The channels of a post-copy for pages that are asked for. Spec: docs/wire.md §15.3 and §27.10.

use std::io;
use std::sync::{Arc, Mutex};

use multifd_transports::Channel;

use super::PreemptStyle;
use super::batch::Batch;
use super::sender::PageSender;
use super::wanted::Wanted;
use super::{wait_for_main, watch};
use crate::error::{Phase, Result};
use crate::run::counters::ChannelCounters;
use crate::run::stop::lock;
use crate::run::workers::Crew;
use crate::source::return_path::ReturnPathReader;
use crate::stream::dialect::FEATURE_URGENT_CHANNELS;

/// One of them; its thread sends.
pub(super) struct UrgentChannel {
    channel: Arc<Channel>,
    style: PreemptStyle,
    /// Held while pages are claimed and sent.
    busy: Arc<Mutex<()>>,
}

impl UrgentChannel {
    /// Sends what is `wanted` on `channel` from now on.
    pub(super) fn start(
        channel: Arc<Channel>,
        style: PreemptStyle,
        wanted: &Arc<Wanted>,
        return_path: &ReturnPathReader,
        crew: &Crew,
    ) -> Result<Self> {
        let busy = Arc::default();
        let mut worker = UrgentWorker {
            pages: PageSender::new(Arc::clone(&channel), name(&channel)),
            counters: wanted.shared().session.counters.urgent(&channel),
            return_path: return_path.clone(),
            wanted: Arc::clone(wanted),
            busy: Arc::clone(&busy),
        };
        let end = End { wanted: Arc::clone(wanted), return_path: return_path.clone() };
        let (end_too, watched) = (end.clone(), Arc::clone(&channel));
        // A QEMU closes the channel before it says on main that this is the end.
        let closes_early = !wanted.shared().peer_can(FEATURE_URGENT_CHANNELS);
        crew.spawn("mig-urgent", Phase::Postcopy, move || worker.run().inspect_err(|_| end.wait_for_main()))?;
        // A page that is lost there would be waited for until another is sent.
        crew.spawn("mig-urgent-in", Phase::Postcopy, move || {
            let End { return_path, .. } = &end_too;
            match watch(&watched, &name(&watched), return_path) {
                Err(_) if closes_early && return_path.is_ending() => Ok(()),
                ended => ended.inspect_err(|_| end_too.wait_for_main()),
            }
        })?;
        Ok(Self { channel, style, busy })
    }

    /// Returns when what was claimed here has been sent.
    pub(super) fn settle(&self) {
        drop(lock(&self.busy));
    }

    /// Nothing follows: a destination may wait for a record that says so.
    pub(super) fn say_end(&self) {
        if self.style != PreemptStyle::AtSetup {
            return;
        }
        // A destination that has seen the end on main may have closed this channel, or waits for
        // its end: its SHUT tells.
        if let Err(error) = say_end_of_records(&self.channel) {
            tracing::debug!(%error, "ending the channel of pages that are asked for");
        }
    }

    pub(super) fn close(&self) {
        self.channel.closer().close();
    }
}

/// A record that is no page: the last one on a channel, or the first, by which a multifd
/// destination knows the channel.
pub(super) fn say_end_of_records(channel: &Channel) -> io::Result<()> {
    PageSender::end_of_records(channel)
}

fn name(channel: &Channel) -> String {
    format!("channel of pages that are asked for ({})", channel.peer())
}

/// What a thread of the channel needs when the channel has broken.
#[derive(Clone)]
struct End {
    wanted: Arc<Wanted>,
    return_path: ReturnPathReader,
}

impl End {
    fn wait_for_main(&self) {
        wait_for_main(&self.wanted.shared().session, &self.return_path);
    }
}

/// The thread that sends pages that are asked for.
struct UrgentWorker {
    pages: PageSender,
    counters: Arc<ChannelCounters>,
    return_path: ReturnPathReader,
    wanted: Arc<Wanted>,
    busy: Arc<Mutex<()>>,
}

impl UrgentWorker {
    fn run(&mut self) -> Result<()> {
        let (wanted, busy) = (Arc::clone(&self.wanted), Arc::clone(&self.busy));
        let mut batch = Batch::default();
        while self.return_path.next_request(|| !wanted.is_empty()) {
            let _busy = lock(&busy);
            while let Some(block) = batch.claim(&wanted)? {
                let sent = self
                    .pages
                    .send(wanted.shared(), &self.counters, block, batch.pages())
                    .inspect_err(|_| batch.put_back(&wanted))?;
                batch.sent(&wanted, sent);
            }
        }
        Ok(())
    }
}
