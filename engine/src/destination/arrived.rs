//! A guest that has arrived, but does not run anywhere yet.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_wire::{Configuration, SectionHead, VmDescription};

use super::alive::Alive;
use super::driver::ReceivedMain;
use super::return_path::ReturnPath;
use super::shared::{DestinationShared, DevicePacket};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::report::{DigestVerdict, Report};
use crate::run::counters::Progress;
use crate::run::session::HandOver;
use crate::run::workers::Crew;
use crate::source::AuditReport;
use crate::stream::dialect;
use crate::stream::sections::EarlySections;

/// How long a source may take to close its channels after it was told of success. It has nothing
/// left to say.
const LINGER: Duration = Duration::from_secs(1);

/// How long a command behind the main channel may take to end then.
const SETTLE: Duration = Duration::from_secs(5);

/// RAM and device state are here. Load the device state, then [`Arrived::accept`]: that lets the
/// source know that its guest lives here now. Dropped without that, or [refused](Arrived::refuse),
/// the source is told of a failure and runs on. A source that is multifd, too, waits for as long as
/// it takes.
#[must_use = "the source waits to be told whether its guest has arrived"]
pub struct Arrived {
    stream: Arc<ReceivedMain>,
    device_packets: Vec<DevicePacket>,
    return_path: ReturnPath,
    shared: Arc<DestinationShared>,
    crew: Arc<Crew>,
    /// The source has let go of the guest before this: nothing that fails here gives it back.
    switched: bool,
    ended: bool,
    alive: Alive,
    /// What was read again.
    audit: Option<AuditReport>,
    /// When all of it was here.
    since: Instant,
}

impl Arrived {
    pub(super) fn new(
        stream: Arc<ReceivedMain>,
        return_path: ReturnPath,
        shared: Arc<DestinationShared>,
        crew: Arc<Crew>,
        alive: Alive,
    ) -> Self {
        let since = Instant::now();
        let device_packets = shared.take_device_packets();
        Self {
            stream,
            device_packets,
            return_path,
            shared,
            crew,
            switched: false,
            ended: false,
            alive,
            audit: None,
            since,
        }
    }

    /// RAM was read again.
    pub(super) fn verified(mut self, audit: Option<AuditReport>) -> Self {
        self.audit = audit;
        self
    }

    /// A guest that came by post-copy.
    pub(super) fn switched(mut self) -> Self {
        self.switched = true;
        self
    }

    /// Machine type, and what else the source said of itself.
    pub fn configuration(&self) -> &Configuration {
        &self.stream.configuration
    }

    /// Device sections that came before the end of RAM (virtio-mem), as they came.
    pub fn early_sections(&self) -> &EarlySections {
        &self.stream.early
    }

    /// The devices' sections behind RAM, up to the end of the stream, as they came.
    pub fn device_state(&self) -> &[u8] {
        &self.stream.tail.bytes
    }

    /// The one section that a source made by [`DeviceState::opaque`](crate::DeviceState::opaque):
    /// its version and bytes. `None` if the device state is anything else.
    pub fn opaque_state(&self, name: &str) -> Option<(u32, &[u8])> {
        self.stream.tail.opaque(name)
    }

    /// The devices' sections one by one: their heads and payloads, such as a source made by
    /// [`DeviceState::described`](crate::DeviceState::described).
    ///
    /// # Errors
    /// `InvalidStream` if they are no sections.
    pub fn sections(&self) -> Result<Vec<(SectionHead, &[u8])>> {
        self.stream.tail.split()
    }

    /// What the source said of the fields in its device sections; not every source does.
    pub fn description(&self) -> Option<&VmDescription> {
        self.stream.tail.described.as_ref().map(|described| &described.description)
    }

    /// The same as the source wrote it: JSON.
    #[cfg(feature = "at-rest")]
    pub(crate) fn description_text(&self) -> Option<&[u8]> {
        self.device_state().get(self.stream.tail.described.as_ref()?.end.vmdesc.clone())
    }

    /// Device state that came over parallel channels (VFIO).
    pub fn device_packets(&self) -> &[DevicePacket] {
        &self.device_packets
    }

    /// The guest's uuid, if it has one: QEMU says all zeros for a guest without.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.shared.uuid().filter(|uuid| *uuid != [0; 16])
    }

    /// The stream announced the switch-over by SWITCHOVER_START.
    pub fn switchover_start(&self) -> bool {
        self.stream.switchover_start
    }

    /// The source waits for an answer; otherwise it has ended already and will never know.
    pub fn return_path_is_open(&self) -> bool {
        self.return_path.is_open()
    }

    /// Takes the guest over: from here on the source never runs it again. Returns when the source
    /// has closed its channels, at the latest after a second: then they are closed here. Only a
    /// command that carries the stream has 5 s to end.
    ///
    /// # Errors
    /// It was cancelled before, or the source has closed the connection instead of waiting for the
    /// word: then the guest runs on there. Or the source could not be told, or hung up without
    /// hearing it, or the command that had to pass it on failed ([`Error::source_may_resume`] is
    /// false): it may or may not run the guest, find out before this end does.
    pub fn accept(mut self) -> Result<Report> {
        self.seal()?;
        self.ended = true;
        // The point of no return: a source that has read this has handed its guest over.
        let load = self.since.elapsed();
        let told = self.return_path.shut(load).and_then(|()| self.return_path.confirm(LINGER));
        self.shared.session.complete();
        let (total, stopped) = (self.shared.session.elapsed(), self.stream.guest_stopped);
        let downtime = stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
        self.shared.channels.drain(LINGER);
        let told = told.and(self.return_path.settle(SETTLE));
        if told.is_ok() {
            self.shared.session.set_hand_over(HandOver::Done);
        }
        let mut report = Report::of(&self.shared.session, total, self.codec());
        report.downtime = downtime;
        let compared = self.shared.wishes().digest && !self.switched;
        report.audit = self.audit;
        report.digest = compared.then_some(DigestVerdict::Equal);
        report.ledger.load_us = u64::try_from(load.as_micros()).unwrap_or(u64::MAX);
        self.wind_up();
        told.map(|()| report)
    }

    /// Refuses the guest: it runs on at the source, which is told `reason` if it is multifd, too.
    pub fn refuse(mut self, reason: impl Display) {
        self.fail(Error::new(ErrorKind::Incompatible, Phase::Device, reason.to_string()));
    }

    /// The peer's address: `tcp:10.0.0.7:51234`.
    pub fn source(&self) -> &str {
        self.return_path.peer()
    }

    /// The counters now.
    pub fn progress(&self) -> Progress {
        self.shared.session.progress()
    }

    /// How long the migration has taken so far.
    pub fn elapsed(&self) -> Duration {
        self.shared.session.elapsed()
    }

    /// The codec that the pages came with: `none`, `zlib`, `zstd`.
    pub fn codec(&self) -> String {
        self.shared.codec_in_use().map_or_else(|| "none".to_owned(), |codec| codec.name().to_owned())
    }

    /// From here on no cancel comes through; an error if one has, or if the source has gone.
    pub(crate) fn seal(&self) -> Result<()> {
        // Once it is sealed, this end has the guest under its name: what becomes of the source is
        // found out with SHUT.
        if self.shared.session.hand_over() != HandOver::Before {
            return Ok(());
        }
        self.return_path.check_source_listens().map_err(|error| self.marked(error))?;
        let stop = &self.shared.session.stop;
        if stop.seal() {
            self.shared.session.set_hand_over(HandOver::Begun);
            return Ok(());
        }
        Err(self.marked(stop.cause_or(Error::stopped(Phase::Device))))
    }

    /// An error of a guest that the source has let go of says so.
    fn marked(&self, error: Error) -> Error {
        if self.switched { error.after_hand_over() } else { error }
    }

    fn fail(&mut self, error: Error) {
        self.ended = true;
        // What ended it before is the better reason.
        let stop = &self.shared.session.stop;
        let why = stop.look_at_cause(dialect::failure).unwrap_or_else(|| dialect::failure(&error));
        if self.switched {
            // The source keeps its memory as long as it is not told that the guest is gone.
            self.return_path.hang_up();
        } else {
            self.return_path.abort(Some(why));
        }
        self.shared.session.note_end_of_failed();
        self.wind_up();
    }

    fn wind_up(&self) {
        self.alive.end();
        // No thread is left that could add a channel behind this.
        self.shared.session.close_channels();
        self.shared.end_of_service();
        self.crew.join();
        self.shared.session.stop.release();
    }
}

impl Drop for Arrived {
    fn drop(&mut self) {
        if !self.ended {
            let detail = "the guest was dropped without having been taken over";
            self.fail(Error::new(ErrorKind::Incompatible, Phase::Device, detail));
        }
    }
}

impl fmt::Debug for Arrived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrived").field("stream", &self.stream).finish_non_exhaustive()
    }
}
