//! One cell of the matrix: a running guest comes in from one release of QEMU, is stored on disk,
//! and goes out to the same or another one.

use std::fmt;
use std::fs::File;
use std::time::Duration;

use multifd_tests::{
    Authority, BootSector, CheckpointFiles, Failure, Fill, Member, Multifd, Outcome, Process, Qemu,
    QemuBuilder, Receive, Release, Scratch, Settings, Side, guest, ram,
};
use serde_json::json;

use crate::refusals;
use crate::way::{Link, Way};

const SOON: Duration = Duration::from_secs(60);

const UUID: &str = "8f0c1d5e-3f4a-4d0e-9b1c-2a6b7c8d9e0f";

/// A guest of `from` comes in, and goes on in `to`.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    pub(crate) from: Release,
    pub(crate) to: Release,
    pub(crate) way: Way,
}

/// What has become of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    /// RAM was the same at each place, and the guest went on.
    Moved,
    /// This QEMU does not do it, in its words.
    Refused(Release, String),
    /// We do not do it, in our words, and the guest ran on.
    NotOurs(String),
}

/// Why a cell went no further.
enum Stop {
    Refused(Release, String),
    Failed(Failure),
}

impl<F: Into<Failure>> From<F> for Stop {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}, {}", self.from, self.to, self.way.name)
    }
}

impl Cell {
    /// The machine type that both ends know.
    fn machine(&self) -> String {
        match self.from.cmp(&self.to) {
            std::cmp::Ordering::Equal => "q35".to_owned(),
            std::cmp::Ordering::Less => self.from.machine(),
            std::cmp::Ordering::Greater => self.to.machine(),
        }
    }

    /// Moves the guest in and out.
    ///
    /// # Errors
    /// When it neither arrived whole nor was refused by words that this QEMU may say.
    pub(crate) fn run(&self) -> Outcome<Fate> {
        let scratch = Scratch::new()?;
        match Journey::new(self, &scratch)?.run() {
            Ok(fate) => Ok(fate),
            Err(Stop::Refused(release, words)) => Ok(Fate::Refused(release, words)),
            Err(Stop::Failed(failure)) => Err(Failure::new(format!("{self}: {failure}"))),
        }
    }
}

struct Journey<'a> {
    cell: &'a Cell,
    way: &'a Way,
    scratch: &'a Scratch,
    vm: QemuBuilder,
}

impl<'a> Journey<'a> {
    fn new(cell: &'a Cell, scratch: &'a Scratch) -> Outcome<Self> {
        let firmware = scratch.path("firmware");
        BootSector::new().laps_per_line(16).write_firmware(&firmware)?;
        if cell.way.tls {
            let (server, client) = (Member::server(), Member::client());
            Authority::new("test CA")?.issue(&scratch.path("tls"), Some(&server), Some(&client))?;
        }
        let vm = Qemu::builder().machine(&cell.machine()).accel(cell.way.accel).ram_mib(16).uuid(UUID);
        Ok(Self { cell, way: &cell.way, scratch, vm: vm.firmware(&firmware) })
    }

    fn run(&self) -> Result<Fate, Stop> {
        let (from, to) = (&self.cell.from, &self.cell.to);
        let vm = self.vm.clone().fill(Fill::new(1));
        let mut source = self.start(vm, from, "client")?;
        source.serial().wait_lines(2, 0, SOON)?;
        // A snapshot is of the RAM of now: most releases let the guest run on, paused or not.
        let mut judge = source.ram().to_owned();
        if self.way.snapshot() {
            source.stop()?;
            judge = self.scratch.path("paused");
            ram::copy_sparse(&File::open(source.ram())?, &judge)?;
        }
        asked(from, source.set_up(&self.way.source_settings(), Side::Source))?;
        if let Some(words) = refusals::ours(self.way.name) {
            return self.refused_by_us(source, words);
        }
        let checkpoint = self.receive(&mut source)?;
        if self.way.judged_at_source() {
            ram::check_equal(&judge, &checkpoint.block("pc.ram")?)?;
        }
        let vm = self.vm.clone().incoming("defer").paused();
        let mut destination = self.start(vm, to, "server")?;
        asked(to, destination.set_up(&self.way.settings, Side::Destination))?;
        self.send(&checkpoint, &mut destination)?;
        ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
        destination.resume()?;
        destination.serial().wait_lines(3, 0, SOON)?;
        let before = source.quit()?;
        let before = if self.way.snapshot() { String::new() } else { before };
        let lines = guest::check_sequence(&(before + &destination.quit()?))?;
        if lines >= 3 { Ok(Fate::Moved) } else { Err(Failure::new(format!("{lines} lines")).into()) }
    }

    fn start(&self, vm: QemuBuilder, release: &Release, endpoint: &str) -> Result<Qemu, Stop> {
        let mut vm = vm.program(release.program());
        if self.way.tls {
            let dir = self.scratch.path("tls");
            let credentials =
                format!("tls-creds-x509,id=tls0,dir={},endpoint={endpoint},verify-peer=on", dir.display());
            vm = vm.argument("-object").argument(credentials);
        }
        asked(release, vm.spawn(endpoint))
    }

    fn uri(&self, name: &str) -> String {
        let path = self.scratch.path(name);
        match self.way.link {
            Link::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Link::Unix => self.scratch.unix_uri(name),
            Link::File => format!("file:{}", path.display()),
            Link::Exec => format!("exec:cat >{}", path.display()),
        }
    }

    /// What reads what [`Journey::uri`] wrote.
    fn reading(&self, name: &str) -> String {
        match self.way.link {
            Link::Exec => format!("exec:cat {}", self.scratch.path(name).display()),
            _ => self.uri(name),
        }
    }

    /// The flags that a command of ours has at either end.
    fn flags(&self) -> Vec<String> {
        let mut flags = vec!["--json".to_owned()];
        if self.way.tls {
            flags.extend(["--tls-dir".to_owned(), self.scratch.path("tls").display().to_string()]);
        }
        if self.way.direct() {
            flags.push("--direct-io".into());
        }
        flags
    }

    fn receive(&self, source: &mut Qemu) -> Result<CheckpointFiles, Stop> {
        let out = self.scratch.path("checkpoint");
        let live = matches!(self.way.link, Link::Tcp | Link::Unix);
        let flags = self.flags();
        let flags: Vec<_> = flags.iter().map(String::as_str).filter(|flag| *flag != "--json").collect();
        let mut receive =
            if live { Some(Receive::listen_with(&self.uri("in"), &out, &flags)?) } else { None };
        let uri = receive.as_ref().map_or_else(|| self.uri("in"), |receive| receive.uri().to_owned());
        asked(&self.cell.from, source.migrate(&uri))?;
        if self.way.held() {
            source.wait_status("pre-switchover", SOON)?;
            source.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        }
        let ended = source.settle(&self.way.source_settings(), SOON)?;
        let explain = |receive: Option<&mut Receive>, failure| match receive {
            Some(receive) => receive.process().explain(failure),
            None => failure,
        };
        if let Err(failure) = ended.check_completed() {
            let failure = source.explain(failure);
            return Err(refusals::at(&self.cell.from, &failure).map_or_else(
                || Stop::Failed(explain(receive.as_mut(), failure)),
                |words| Stop::Refused(self.cell.from.clone(), words),
            ));
        }
        match receive {
            Some(mut receive) => receive.process().wait_success(SOON)?,
            None => {
                let (uri, out) = (self.reading("in"), out.display().to_string());
                let mut arguments = vec!["receive".to_owned(), uri, "--out".into(), out];
                arguments.extend(self.flags());
                Multifd::spawn("receive", arguments)?.wait_success(SOON)?;
            }
        }
        Ok(CheckpointFiles::open(&out)?)
    }

    fn send(&self, checkpoint: &CheckpointFiles, destination: &mut Qemu) -> Result<(), Stop> {
        let live = matches!(self.way.link, Link::Tcp | Link::Unix);
        if live {
            let uri = asked(&self.cell.to, destination.listen(&self.uri("out")))?;
            let mut send = self.sending(checkpoint, &uri)?;
            send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        } else {
            self.sending(checkpoint, &self.uri("out"))?.wait_success(SOON)?;
            asked(&self.cell.to, destination.listen(&self.reading("out")))?;
        }
        destination.wait_completed(SOON)?;
        Ok(())
    }

    fn sending(&self, checkpoint: &CheckpointFiles, uri: &str) -> Outcome<Process> {
        let mut flags = self.flags();
        flags.retain(|flag| flag != "--json");
        flags.extend(self.way.mapped().then(|| "--mapped-ram".to_owned()));
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let file = self.way.link == Link::File;
        // A file has no return path, and no flag that says so.
        let settings =
            Settings { return_path: self.way.settings.return_path || file, ..self.way.settings.clone() };
        Multifd::send_with(checkpoint.directory(), uri, &settings, &flags)
    }

    /// The command says why it does not take it, and the source's guest runs on.
    fn refused_by_us(&self, mut source: Qemu, words: &str) -> Result<Fate, Stop> {
        let mut receive = Receive::listen(&self.uri("in"), &self.scratch.path("checkpoint"))?;
        asked(&self.cell.from, source.migrate(receive.uri()))?;
        let ended = source.wait_end(SOON)?;
        receive.process().wait(SOON)?;
        receive.process().stderr().settle(SOON);
        let said = receive.process().stderr().text();
        if ended.status != "failed" || !said.contains(words) {
            let failure = format!("{} instead of {words:?}: {said}", ended.status);
            return Err(Failure::new(failure).into());
        }
        let lines = source.serial().mark();
        source.serial().wait_lines(2, lines, SOON)?;
        Ok(Fate::NotOurs(words.to_owned()))
    }
}

/// What QEMU said to a command, before anything of ours was at work.
fn asked<T>(release: &Release, answer: Outcome<T>) -> Result<T, Stop> {
    answer.map_err(|failure| match refusals::at(release, &failure) {
        Some(words) => Stop::Refused(release.clone(), words),
        None => Stop::Failed(failure),
    })
}
