//! One connection of a post-copy, from the switch or a recovery until it breaks or all is over.

use std::sync::Arc;
use std::time::Instant;

use multifd_transports::{Channel, Pacer};
use multifd_wire::{ALIVE_PING, pages_per_packet};

use super::PreemptStyle;
use super::bulk::{Bulk, LOOK_AGAIN};
use super::sender::PageSender;
use super::short_queue::ShortQueue;
use super::urgent::UrgentChannel;
use super::wanted::Wanted;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE_SIZE;
use crate::run::workers::Crew;
use crate::source::carrier::Channels;
use crate::source::main_writer::MainWriter;
use crate::source::return_path::ReturnPathReader;
use crate::stream::dialect::ALIVE_INTERVAL;

/// Pages of the background stream in one go where pages that are asked for go on main, too: what
/// such a page waits for.
const BATCH: usize = 32;

/// Pages in a section of main.
const SECTION_PAGES: usize = 4096;

/// The value of the PING behind the package, which is QEMU's.
const PACKAGE_PING: u32 = 4;

pub(super) struct Link {
    main: MainWriter,
    pages: PageSender,
    return_path: ReturnPathReader,
    crew: Crew,
    wanted: Arc<Wanted>,
    urgent: Vec<UrgentChannel>,
    /// What carries the background stream; without them, main does.
    channels: Option<Channels>,
    /// The package went over this link.
    first: bool,
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
    /// The link over which the package went, with the parallel channels that go on.
    pub(super) fn new(
        main: MainWriter,
        return_path: ReturnPathReader,
        crew: Crew,
        wanted: Wanted,
        channels: Option<Channels>,
    ) -> Self {
        Self { first: true, ..Self::recovered(main, return_path, crew, wanted, channels) }
    }

    /// A link that replaces one that broke.
    pub(super) fn recovered(
        main: MainWriter,
        return_path: ReturnPathReader,
        crew: Crew,
        wanted: Wanted,
        channels: Option<Channels>,
    ) -> Self {
        let pages = PageSender::new(Arc::clone(main.channel()), main.name());
        let (wanted, urgent) = (Arc::new(wanted), Vec::new());
        Self { main, pages, return_path, crew, wanted, urgent, channels, first: false }
    }

    /// Sends pages that are asked for on `channel` from now on, too.
    pub(super) fn start_urgent(&mut self, channel: Arc<Channel>, style: PreemptStyle) -> Result<()> {
        let urgent = UrgentChannel::start(channel, style, &self.wanted, &self.return_path, &self.crew)?;
        self.urgent.push(urgent);
        Ok(())
    }

    /// Sends all that is dirty, what is wanted first, ends the stream, and waits for the
    /// destination's word.
    pub(super) fn serve(&mut self) -> Result<()> {
        self.main.enter(Phase::Postcopy);
        if self.first {
            self.main.ping(PACKAGE_PING)?;
        }
        match &self.channels {
            Some(channels) => {
                let bulk = Bulk::new(&self.wanted, &self.return_path, channels.workers());
                channels.start_bulk(&bulk);
                self.oversee(&bulk)?;
            }
            None => self.stream()?,
        }
        self.finish()
    }

    /// The parallel channels have the background stream. Main says that this end is alive; what is
    /// asked for goes there if it has no channel of its own.
    fn oversee(&mut self, bulk: &Bulk) -> Result<()> {
        let wanted = Arc::clone(&self.wanted);
        let on_main = self.urgent.is_empty();
        let mut claimed = Vec::new();
        loop {
            self.check_goes_on()?;
            while on_main && self.send_wanted(&mut claimed)? > 0 {
                self.main.end_of_section()?;
            }
            if bulk.is_done() {
                return Ok(());
            }
            let ready = || bulk.is_done() || (on_main && !wanted.is_empty());
            let came = match on_main {
                true => self.return_path.wait_for_request(ALIVE_INTERVAL, ready),
                false => self.return_path.wait_until(ALIVE_INTERVAL, ready),
            };
            if !came {
                self.main.ping(ALIVE_PING)?;
            }
        }
    }

    fn check_goes_on(&self) -> Result<()> {
        if self.crew.stop().tripped() { Err(Error::stopped(Phase::Postcopy)) } else { Ok(()) }
    }

    /// Sends pages that are wanted in a section of main of their own, and gives how many.
    fn send_wanted(&mut self, claimed: &mut Vec<usize>) -> Result<usize> {
        let wanted = Arc::clone(&self.wanted);
        let Some(before) = wanted.claim(claimed)? else { return Ok(0) };
        let (shared, counters) = (wanted.shared(), &wanted.shared().session.counters.main);
        let sent = self
            .begin_section(0)
            .and_then(|()| self.pages.send(shared, counters, before.block, claimed))
            .inspect_err(|_| wanted.put_back(before, claimed))?;
        wanted.sent(before, claimed, sent);
        Ok(claimed.len())
    }

    /// Everything on main but what has a channel of its own.
    fn stream(&mut self) -> Result<()> {
        let wanted = Arc::clone(&self.wanted);
        let (shared, pacer) = (wanted.shared(), wanted.pacer());
        let counters = &shared.session.counters.main;
        let mut queue = ShortQueue::of(self.main.channel(), wanted.has_short_queues());
        let (mut claimed, mut in_section) = (Vec::new(), 0);
        loop {
            self.check_goes_on()?;
            let before = if self.urgent.is_empty() { wanted.claim(&mut claimed)? } else { None };
            let block = match before {
                Some(before) => before.block,
                None => {
                    if let Some(wait) = pacer.debt() {
                        match self.urgent.is_empty() {
                            true => {
                                _ = self
                                    .return_path
                                    .wait_for_request(wait.min(LOOK_AGAIN), || !wanted.is_empty())
                            }
                            false => self.return_path.rest(wait.min(LOOK_AGAIN)),
                        }
                        continue;
                    }
                    let most = batch(pacer, self.urgent.is_empty());
                    let Some(block) = wanted.scan().claim(shared, most, &mut claimed) else { break };
                    block
                }
            };
            let sent = self
                .begin_section(in_section)
                .and_then(|()| self.pages.send(shared, counters, block, &claimed))
                .inspect_err(|_| shared.ram.host_pages.put_back(block, &claimed))?;
            match before {
                Some(before) => wanted.sent(before, &claimed, sent),
                None => {
                    pacer.charge(sent);
                    queue.sent();
                }
            }
            in_section += claimed.len();
            if in_section >= SECTION_PAGES {
                self.main.end_of_section()?;
                in_section = 0;
            }
        }
        if in_section > 0 { self.main.end_of_section() } else { Ok(()) }
    }

    fn begin_section(&mut self, in_section: usize) -> Result<()> {
        if in_section == 0 {
            self.main.ram_part();
            self.main.flush()?;
        }
        Ok(())
    }

    /// All pages are out: the end of RAM, of the stream, and the destination's answer.
    fn finish(&mut self) -> Result<()> {
        self.urgent.iter().for_each(UrgentChannel::settle);
        self.check_goes_on()?;
        self.wait_until_loaded()?;
        self.main.ram_end();
        self.main.end_of_section()?;
        self.return_path.expect_shut();
        self.main.eof()?;
        self.urgent.iter().for_each(UrgentChannel::say_end);
        self.return_path.wait_for_shut(self.wanted.shared().session.timeout)
    }

    /// A destination may take any time to load the devices, and only then says that all has come.
    /// So the end, whose answer has a timeout, is held back until they are loaded. PINGs, which a
    /// QEMU answers meanwhile, too, tell whether it is alive.
    fn wait_until_loaded(&mut self) -> Result<()> {
        let timeout = self.wanted.shared().session.timeout;
        let (mut before, mut since) = (None, Instant::now());
        while self.first {
            let (loaded, heard) = self.return_path.wait_until_loaded(ALIVE_INTERVAL);
            self.check_goes_on()?;
            if loaded {
                break;
            }
            if before.replace(heard) != Some(heard) {
                since = Instant::now();
            } else if since.elapsed() >= timeout {
                let detail = format!(
                    "the destination has neither loaded the devices nor answered a PING within {timeout:?}; it may run                      the guest or not"
                );
                return Err(Error::new(ErrorKind::Deadline, Phase::Postcopy, detail));
            }
            self.main.ping(ALIVE_PING)?;
        }
        Ok(())
    }

    /// When the devices had been loaded.
    pub(super) fn loaded(&self) -> Option<Instant> {
        self.return_path.loaded()
    }

    /// Ends the threads of a link that is not needed any more.
    pub(super) fn close(self) {
        self.return_path.close();
        self.urgent.iter().for_each(UrgentChannel::close);
        self.channels.iter().for_each(Channels::close);
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
        // Another connection can break without main, for reasons of the network's: the guest may be
        // about to run there.
        let on_main = cause.channel() == Some(self.main.name().as_str());
        let by_peer = refused || self.return_path.ended() || (on_main && is_hang_up(&cause));
        LinkEnd { loaded: self.return_path.loaded(), by_peer, refused, cause }
    }
}

/// Whether the peer's system has said that nothing reads any more: not a silence, which may be the
/// network's.
fn is_hang_up(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    let code = source
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(|error| error.raw_os_error());
    matches!(code, Some(libc::EPIPE | libc::ECONNRESET))
}

/// Pages of the background stream in one go: fewer at a low rate, for which they would be a burst,
/// and where pages that are asked for go on main.
fn batch(pacer: &Pacer, asked_on_main: bool) -> usize {
    let most = if asked_on_main { BATCH } else { pages_per_packet(PAGE_SIZE) };
    let Some(rate) = pacer.rate() else { return most };
    let pages = rate.get() / 40 / crate::guest::PAGE as u64;
    usize::try_from(pages).unwrap_or(most).clamp(1, most)
}
