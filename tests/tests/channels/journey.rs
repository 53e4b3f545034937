//! A running guest comes in from QEMU, is stored on disk, and goes out to QEMU, over one kind of
//! link.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use multifd_tests::qmp::send_descriptor;
use multifd_tests::{
    BootSector, CheckpointFiles, CommandReport, Failure, Fill, Inherited, Multifd, Outcome, Process, Qemu,
    QemuBuilder, Receive, Scratch, Settings, Side, guest, ram,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::pipe::{PipeFlags, pipe, pipe_with};

use super::SOON;

/// What lies between QEMU and us.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Link {
    /// A command at either end, with a FIFO between them.
    Exec,
    /// One end of a socket pair, handed over on a unix socket that we connect to.
    HandedOver,
    /// A socket that listens, inherited by us. On the way out there is none: a connected one then.
    InheritedDoor,
    /// A pipe, inherited; on the way in as standard input.
    Pipe,
    /// A command of ours that connects, and passes on what both sides say. On the way in QEMU has
    /// it.
    Relay,
    /// One end of a socket pair, inherited.
    SocketPair,
}

pub(crate) struct Journey {
    scratch: Scratch,
    vm: QemuBuilder,
    settings: Settings,
    link: Link,
}

impl Journey {
    pub(crate) fn new(settings: Settings, link: Link) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let vm = Qemu::builder().ram_mib(32).floppy(&floppy);
        Ok(Self { scratch, vm, settings, link })
    }

    /// In: the checkpoint's RAM is the paused guest's. Out: so is the destination's, and the
    /// guest's count goes on.
    pub(crate) fn run(&self) -> Outcome {
        let mut source = self.vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        let checkpoint = self.receive(&mut source)?;
        let mut destination = self.vm.clone().incoming("defer").paused().spawn("destination")?;
        self.send(&checkpoint, &mut destination)?;
        assert_eq!(destination.serial().mark(), 0, "the guest is paused");
        destination.resume()?;
        destination.serial().wait_lines(3, 0, SOON)?;
        let before = source.quit()?;
        let lines = guest::check_sequence(&(before + &destination.quit()?))?;
        assert!(lines > 3, "{lines} lines");
        Ok(())
    }

    fn receive(&self, source: &mut Qemu) -> Outcome<CheckpointFiles> {
        let out = self.scratch.path("checkpoint");
        source.set_up(&self.settings, Side::Source)?;
        let (mut receive, uri) = self.incoming(source, &out)?;
        source.migrate(&uri)?;
        if let Err(failure) = source.settle(&self.settings, SOON)?.check_completed() {
            return Err(receive.process().explain(source.explain(failure)));
        }
        let report = receive.wait_success(SOON)?;
        assert_eq!(report.text("status")?, "completed");
        assert_eq!(report.number("channels")?, u64::from(self.settings.channels.unwrap_or(0)));
        let checkpoint = CheckpointFiles::open(&out)?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok(checkpoint)
    }

    fn send(&self, checkpoint: &CheckpointFiles, destination: &mut Qemu) -> Outcome {
        destination.set_up(&self.settings, Side::Destination)?;
        let mut send = self.outgoing(destination, checkpoint.directory())?;
        send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        let report = CommandReport::by(&send)?.to_string();
        let confirmed = format!("\"confirmed\":{}", self.settings.return_path);
        assert!(report.contains(&confirmed), "{report}");
        ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())
    }

    /// Starts to receive; QEMU migrates to the URI.
    fn incoming(&self, source: &mut Qemu, out: &Path) -> Outcome<(Receive, String)> {
        let handed = "fd:link".to_owned();
        match self.link {
            Link::SocketPair => {
                let (theirs, ours) = UnixStream::pair()?;
                source.getfd("link", theirs.as_fd())?;
                let ours = Inherited::new(ours)?;
                Ok((Receive::listen(&ours.uri(), out)?, handed))
            }
            Link::HandedOver => {
                let (theirs, ours) = UnixStream::pair()?;
                source.getfd("link", theirs.as_fd())?;
                self.hand_over(ours, |uri| Receive::listen(uri, out)).map(|receive| (receive, handed))
            }
            Link::Pipe => {
                // A copy of the writing end in our process would keep the pipe open.
                let (reading, writing) = pipe_with(PipeFlags::CLOEXEC)?;
                source.getfd("link", writing.as_fd())?;
                Ok((Receive::listen_reading("fd:0", out, reading)?, handed))
            }
            Link::Exec => {
                let fifo = self.fifo("in")?;
                Ok((Receive::listen(&format!("exec:cat {fifo}"), out)?, format!("exec:cat > {fifo}")))
            }
            Link::InheritedDoor => {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                let uri = format!("tcp:{}", listener.local_addr()?);
                let listener = Inherited::new(listener)?;
                Ok((Receive::listen(&listener.uri(), out)?, uri))
            }
            Link::Relay => {
                let listener = Receive::listen("tcp:127.0.0.1:0", out)?;
                let relay = relay(listener.uri())?;
                Ok((listener, relay))
            }
        }
    }

    /// Has QEMU listen, and starts to send.
    fn outgoing(&self, destination: &mut Qemu, checkpoint: &Path) -> Outcome<Process> {
        let send = |uri: &str| Multifd::send(checkpoint, uri, &self.settings);
        match self.link {
            Link::SocketPair => {
                let (theirs, ours) = UnixStream::pair()?;
                destination.getfd("link", theirs.as_fd())?;
                destination.listen("fd:link")?;
                send(&Inherited::new(ours)?.uri())
            }
            Link::HandedOver => {
                let (theirs, ours) = UnixStream::pair()?;
                destination.getfd("link", theirs.as_fd())?;
                destination.listen("fd:link")?;
                self.hand_over(ours, send)
            }
            Link::Pipe => {
                let (reading, writing) = pipe()?;
                destination.getfd("link", reading.as_fd())?;
                destination.listen("fd:link")?;
                send(&Inherited::new(writing)?.uri())
            }
            Link::Exec => {
                let fifo = self.fifo("out")?;
                destination.listen(&format!("exec:cat {fifo}"))?;
                send(&format!("exec:cat > {fifo}"))
            }
            Link::InheritedDoor => {
                let uri = destination.listen("tcp:127.0.0.1:0")?;
                send(&uri)
            }
            Link::Relay => {
                let relay = relay(&destination.listen("tcp:127.0.0.1:0")?)?;
                let checkpoint = checkpoint.display().to_string();
                Multifd::spawn("send", ["send", &checkpoint, &relay, "--json", "--return-path"])
            }
        }
    }

    /// Gives a descriptor to the process that `start` starts, on a socket whose URI it gets.
    fn hand_over<T>(
        &self,
        descriptor: impl Into<OwnedFd>,
        start: impl FnOnce(&str) -> Outcome<T>,
    ) -> Outcome<T> {
        let (path, descriptor) = (self.scratch.path("giver"), descriptor.into());
        let giver = UnixListener::bind(&path)?;
        let uri = format!("fd:unix:{}", path.display());
        thread::scope(|scope| {
            let giving = scope.spawn(move || send_descriptor(&giver.accept()?.0, b"!", descriptor.as_fd()));
            let started = start(&uri);
            if started.is_err() {
                // Lets the giver go.
                drop(UnixStream::connect(&path));
            }
            giving.join().map_err(|_| Failure::new("the giver panicked"))??;
            std::fs::remove_file(&path)?;
            started
        })
    }

    fn fifo(&self, name: &str) -> Outcome<String> {
        let path = self.scratch.path(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        Ok(path.display().to_string())
    }
}

/// A command that connects to a `tcp:` URI and passes on what both sides say.
fn relay(uri: &str) -> Outcome<String> {
    let address = uri.strip_prefix("tcp:").and_then(|address| address.rsplit_once(':'));
    let (host, port) = address.ok_or_else(|| Failure::new(format!("{uri} is not TCP")))?;
    Ok(format!("exec:exec bash -c 'exec 3<>/dev/tcp/{host}/{port}; cat <&3 & exec cat >&3'"))
}
