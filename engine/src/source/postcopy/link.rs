//! One connection of a post-copy, from the switch or a recovery until it breaks or all is over.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_transports::{Channel, Pacer};

use super::PreemptStyle;
use super::sender::PageSender;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::ChannelCounters;
use crate::run::stop::lock;
use crate::run::workers::Crew;
use crate::source::main_writer::MainWriter;
use crate::source::return_path::ReturnPathReader;
use crate::source::shared::SourceShared;
use crate::work::{BlockIndex, HostPages, ScanPlace, UrgentPages};

/// Pages of the background stream in one go: what a page that is asked for meanwhile waits for, on main.
const BATCH: usize = 32;

/// Pages in a section of main.
const SECTION_PAGES: usize = 4096;

/// How long a wait for the bandwidth limit may be, before the limit is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The value of the PING behind the package, which is QEMU's.
const PACKAGE_PING: u32 = 4;

pub(super) struct Link {
    main: MainWriter,
    pages: PageSender,
    return_path: ReturnPathReader,
    crew: Crew,
    urgent: Option<UrgentChannel>,
    /// The package went over this link.
    first: bool,
}

/// The channel for pages that are asked for; its thread sends.
struct UrgentChannel {
    channel: Arc<Channel>,
    style: PreemptStyle,
    sending: Arc<Sending>,
}

/// What the thread of pages that are asked for shares with the background stream.
#[derive(Default)]
struct Sending {
    /// Held while pages are claimed and sent.
    busy: Mutex<()>,
    /// Behind the last page that was asked for: there the background stream goes on.
    behind: Mutex<Option<ScanPlace>>,
}

/// How a link has ended.
pub(super) struct LinkEnd {
    pub(super) cause: Error,
    /// When the devices had been loaded, as far as the destination could say.
    pub(super) loaded: Option<Instant>,
    /// The destination has ended it, or its process has ended.
    pub(super) by_peer: bool,
    /// It has said that it gives up.
    pub(super) refused: bool,
}

impl Link {
    /// The link over which the package went.
    pub(super) fn new(main: MainWriter, return_path: ReturnPathReader, crew: Crew) -> Self {
        Self { first: true, ..Self::recovered(main, return_path, crew) }
    }

    /// A link that replaces one that broke.
    pub(super) fn recovered(main: MainWriter, return_path: ReturnPathReader, crew: Crew) -> Self {
        let pages = PageSender::new(Arc::clone(main.channel()), main.name());
        Self { main, pages, return_path, crew, urgent: None, first: false }
    }

    /// Sends pages that are asked for on `channel` from now on.
    pub(super) fn start_urgent(
        &mut self,
        channel: Arc<Channel>,
        style: PreemptStyle,
        place: ScanPlace,
        shared: &Arc<SourceShared>,
    ) -> Result<()> {
        let sending = Arc::new(Sending::default());
        let name = format!("channel of pages that are asked for ({})", channel.peer());
        let mut worker = UrgentWorker {
            pages: PageSender::new(Arc::clone(&channel), name),
            counters: shared.session.counters.urgent(&channel),
            return_path: self.return_path.clone(),
            shared: Arc::clone(shared),
            sending: Arc::clone(&sending),
            place,
        };
        self.crew.spawn("mig-urgent", Phase::Postcopy, move || worker.run())?;
        let watch = Watch { channel: Arc::clone(&channel), return_path: self.return_path.clone() };
        self.crew.spawn("mig-urgent-in", Phase::Postcopy, move || watch.run())?;
        self.urgent = Some(UrgentChannel { channel, style, sending });
        Ok(())
    }

    /// Sends all that is dirty, what is wanted first, ends the stream, and waits for the destination's word.
    pub(super) fn serve(
        &mut self,
        shared: &SourceShared,
        pacer: &Pacer,
        place: &mut ScanPlace,
    ) -> Result<()> {
        self.main.enter(Phase::Postcopy);
        if self.first {
            self.main.ping(PACKAGE_PING)?;
        }
        let urgent = shared.urgent.get();
        let urgent = urgent.ok_or_else(|| Error::bug(Phase::Postcopy, "no queue for wanted pages"))?;
        self.stream(shared, urgent, pacer, place)?;
        self.finish(shared)
    }

    fn stream(
        &mut self,
        shared: &SourceShared,
        urgent: &UrgentPages,
        pacer: &Pacer,
        place: &mut ScanPlace,
    ) -> Result<()> {
        let host_pages = &shared.ram.host_pages;
        let counters = &shared.session.counters.main;
        let (mut claimed, mut in_section) = (Vec::new(), 0);
        loop {
            if self.crew.stop().tripped() {
                return Err(Error::stopped(Phase::Postcopy));
            }
            let block = match self.claim_wanted(host_pages, urgent, place, &mut claimed) {
                Some(block) => block,
                None => {
                    if let Some(wait) = pacer.debt() {
                        self.return_path.wait_for_request(urgent, wait.min(LOOK_AGAIN));
                        continue;
                    }
                    let Some(block) = host_pages.claim(place, batch(pacer), &mut claimed) else { break };
                    block
                }
            };
            let sent = self
                .begin_section(in_section)
                .and_then(|()| self.pages.send(shared, counters, block, &claimed))
                .inspect_err(|_| host_pages.put_back(block, &claimed))?;
            pacer.charge(sent);
            in_section += claimed.len();
            if in_section >= SECTION_PAGES {
                self.main.end_of_section()?;
                in_section = 0;
            }
        }
        if in_section > 0 { self.main.end_of_section() } else { Ok(()) }
    }

    /// Pages that are asked for and go on main; with a channel of their own, only the place behind them.
    fn claim_wanted(
        &self,
        host_pages: &HostPages,
        urgent: &UrgentPages,
        place: &mut ScanPlace,
        claimed: &mut Vec<usize>,
    ) -> Option<BlockIndex> {
        match &self.urgent {
            None => host_pages.claim_wanted(urgent, place, claimed),
            Some(own) => {
                if let Some(behind) = lock(&own.sending.behind).take() {
                    *place = behind;
                }
                None
            }
        }
    }

    fn begin_section(&mut self, in_section: usize) -> Result<()> {
        if in_section == 0 {
            self.main.ram_part();
            self.main.flush()?;
        }
        Ok(())
    }

    /// All pages are out: the end of RAM, of the stream, and the destination's answer.
    fn finish(&mut self, shared: &SourceShared) -> Result<()> {
        if let Some(own) = &self.urgent {
            // What was claimed there has been sent when this is free.
            drop(lock(&own.sending.busy));
        }
        if self.crew.stop().tripped() {
            return Err(Error::stopped(Phase::Postcopy));
        }
        self.main.ram_end();
        self.main.end_of_section()?;
        self.return_path.expect_shut();
        self.main.eof()?;
        if let Some(UrgentChannel { channel, style: PreemptStyle::AtSetup, .. }) = &self.urgent {
            // A destination that has seen the end on main may have closed this channel, or waits for its end: its SHUT tells.
            if let Err(error) = PageSender::end_of_records(channel) {
                tracing::debug!(%error, "ending the channel of pages that are asked for");
            }
        }
        self.return_path.wait_for_shut(shared.session.timeout)
    }

    /// When the devices had been loaded.
    pub(super) fn loaded(&self) -> Option<Instant> {
        self.return_path.loaded()
    }

    /// Ends the threads of a link that is not needed any more.
    pub(super) fn close(self) {
        self.return_path.close();
        if let Some(own) = &self.urgent {
            own.channel.closer().close();
        }
        self.crew.join();
    }

    /// Ends a link that broke: its threads, its connections.
    pub(super) fn end(self, error: Error) -> LinkEnd {
        let stop = self.crew.stop().clone();
        stop.trip(error);
        self.crew.join();
        let cause = stop.cause_or(Error::stopped(Phase::Postcopy));
        let refusal = self.return_path.refusal();
        let refused = refusal.is_some();
        // A destination that gives up hangs up as well: which of the two shows first is chance.
        let cause = refusal.filter(|_| cause.kind() == ErrorKind::Transport).unwrap_or(cause);
        let by_peer = refused || self.return_path.ended() || is_hang_up(&cause);
        LinkEnd { loaded: self.return_path.loaded(), by_peer, refused, cause }
    }
}

/// Whether the peer's system has said that nothing reads any more: not a silence, which may be the network's.
fn is_hang_up(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    let code = source
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(|error| error.raw_os_error());
    matches!(code, Some(libc::EPIPE | libc::ECONNRESET))
}

/// Pages of the background stream in one go: fewer at a low rate, for which they would be a burst.
fn batch(pacer: &Pacer) -> usize {
    let Some(rate) = pacer.rate() else { return BATCH };
    let pages = rate.get() / 40 / crate::guest::PAGE as u64;
    usize::try_from(pages).unwrap_or(BATCH).clamp(1, BATCH)
}

/// The thread that sends pages that are asked for.
struct UrgentWorker {
    pages: PageSender,
    counters: Arc<ChannelCounters>,
    return_path: ReturnPathReader,
    shared: Arc<SourceShared>,
    sending: Arc<Sending>,
    place: ScanPlace,
}

impl UrgentWorker {
    fn run(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let urgent = shared.urgent.get();
        let urgent = urgent.ok_or_else(|| Error::bug(Phase::Postcopy, "no queue for wanted pages"))?;
        let mut claimed = Vec::new();
        while self.return_path.next_request(urgent) {
            let sending = Arc::clone(&self.sending);
            let _busy = lock(&sending.busy);
            let host_pages = &shared.ram.host_pages;
            while let Some(block) = host_pages.claim_wanted(urgent, &mut self.place, &mut claimed) {
                self.pages
                    .send(&shared, &self.counters, block, &claimed)
                    .inspect_err(|_| host_pages.put_back(block, &claimed))?;
                *lock(&sending.behind) = Some(self.place);
            }
        }
        Ok(())
    }
}

/// The thread that sees when the channel of pages that are asked for ends: a page that is lost there would be waited for until
/// another is sent.
struct Watch {
    channel: Arc<Channel>,
    return_path: ReturnPathReader,
}

impl Watch {
    fn run(&self) -> Result<()> {
        let name = || format!("channel of pages that are asked for ({})", self.channel.peer());
        loop {
            let received = self.channel.recv(&mut [0]);
            // At the end, the destination closes it as it likes.
            if self.return_path.is_ending() {
                return Ok(());
            }
            match received {
                Ok(0) => {
                    let detail = "the destination closed it before the end";
                    return Err(Error::new(ErrorKind::Transport, Phase::Postcopy, detail).on(name()));
                }
                Ok(_) => {
                    let detail = "bytes came back, expected none";
                    return Err(Error::misbehaved(Phase::Postcopy, detail).on(name()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
                Err(error) => return Err(Error::io(Phase::Postcopy, "waiting for its end", error).on(name())),
            }
        }
    }
}
