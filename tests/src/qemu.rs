//! One QEMU process: how it is started, its RAM file, its serial port and its control connection.
//!
//! The control connection and the guest's serial port are socket pairs on QEMU's stdin and stdout:
//! no socket files, no waiting for QEMU to listen, and the end of the process is the end of both.

use std::{
    io::Write as _,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{During, Failure, Fill, Outcome, Process, Qmp, Scratch, Transcript, process::wrapped};

/// The emulator that all tests run.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How long a QEMU may take from its start to its greeting. It takes 20 ms on an idle machine.
const START: Duration = Duration::from_secs(30);

/// How long a QEMU may take to quit.
const QUIT: Duration = Duration::from_secs(30);

/// What to start. Cloned for the two sides of a migration, which must agree on everything that the
/// guest can see.
#[derive(Clone, Debug)]
pub struct QemuBuilder {
    program: PathBuf,
    machine: String,
    ram_mib: u32,
    accel: String,
    fill: Option<Fill>,
    wrapper: Vec<String>,
    arguments: Vec<String>,
}

impl QemuBuilder {
    /// The machine type and its options: `pc` (default), `q35`, `pc-q35-7.2`, `q35,smm=off`.
    #[must_use]
    pub fn machine(mut self, machine: &str) -> Self {
        machine.clone_into(&mut self.machine);
        self
    }

    /// Another emulator than [`PROGRAM`].
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// Guest RAM in MiB, default 64.
    #[must_use]
    pub fn ram_mib(mut self, mib: u32) -> Self {
        self.ram_mib = mib;
        self
    }

    /// `tcg` (default) or `kvm`.
    #[must_use]
    pub fn accel(mut self, accel: &str) -> Self {
        accel.clone_into(&mut self.accel);
        self
    }

    /// Boots from this floppy image, which is only read. Call it after [`QemuBuilder::machine`]:
    /// q35 has no floppy controller and gets one.
    #[must_use]
    pub fn floppy(self, image: &Path) -> Self {
        let drive = format!("format=raw,read-only=on,file={}", image.display());
        if self.machine.contains("q35") {
            let builder = self.argument("-drive").argument(format!("if=none,id=floppy,{drive}"));
            builder.device("isa-fdc,id=fdc").device("floppy,drive=floppy,bus=fdc.0")
        } else {
            self.argument("-drive").argument(format!("if=floppy,{drive}"))
        }
    }

    /// Firmware of 64 KiB in the place of QEMU's own.
    #[must_use]
    pub fn firmware(self, image: &Path) -> Self {
        self.argument("-bios").argument(image.display().to_string())
    }

    /// Content of the guest's RAM above 1 MiB before it starts. For the source side only: a
    /// destination starts with zeros.
    #[must_use]
    pub fn fill(mut self, fill: Fill) -> Self {
        self.fill = Some(fill);
        self
    }

    /// Waits for a migration: `defer`, to be followed by [`Qemu::listen`], or a URI.
    #[must_use]
    pub fn incoming(self, uri: &str) -> Self {
        self.argument("-incoming").argument(uri)
    }

    /// Starts with stopped vCPUs; the destination of a migration then stays stopped until
    /// [`Qemu::resume`].
    #[must_use]
    pub fn paused(self) -> Self {
        self.argument("-S")
    }

    /// The guest's UUID.
    #[must_use]
    pub fn uuid(self, uuid: &str) -> Self {
        self.argument("-uuid").argument(uuid)
    }

    /// Runs QEMU by this command: `ip netns exec NAME`, for example. It must become QEMU, not start
    /// it.
    #[must_use]
    pub fn inside(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// One more `-device`.
    #[must_use]
    pub fn device(self, device: &str) -> Self {
        self.argument("-device").argument(device)
    }

    /// One more argument as it is.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts QEMU and waits until it takes commands. `name` is what failures call it.
    ///
    /// # Errors
    /// When it does not start; the failure quotes its stderr.
    pub fn spawn(&self, name: &str) -> Outcome<Qemu> {
        let scratch = Scratch::new()?;
        let ram = scratch.path("ram");
        if let Some(fill) = &self.fill {
            fill.write(&ram, u64::from(self.ram_mib) << 20)?;
        }
        let (control, their_control) = UnixStream::pair()?;
        let (serial, their_serial) = UnixStream::pair()?;
        let mut command = self.command(&ram);
        command.stdin(OwnedFd::from(their_control)).stdout(OwnedFd::from(their_serial));
        let process = Process::spawn(name, &mut command)?;
        // The command holds QEMU's ends of the two socket pairs: while it lives they never look
        // closed.
        drop(command);
        let qmp = Qmp::greet(control, START).map_err(|failure| process.explain_end(failure))?;
        let transcript = Transcript::follow(format!("{name}'s serial port"), serial.try_clone()?)?;
        Ok(Qemu { process, qmp, serial, transcript, ram, scratch })
    }

    fn command(&self, ram: &Path) -> Command {
        let mut command = wrapped(&self.wrapper, &self.program);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-accel",
            &self.accel,
        ]);
        // With this id the block is called as it is without a backend of our own.
        let backend = format!(
            "memory-backend-file,id=pc.ram,size={}M,share=on,mem-path={}",
            self.ram_mib,
            ram.display()
        );
        command.args(["-m", &format!("{}M", self.ram_mib), "-object", &backend]);
        command.args(["-machine", &format!("{},memory-backend=pc.ram", self.machine)]);
        command.args(["-chardev", "socket,id=control,fd=0", "-mon", "chardev=control,mode=control"]);
        command.args(["-chardev", "socket,id=serial,fd=1", "-serial", "chardev:serial"]);
        command.args(&self.arguments);
        command
    }
}

/// A running QEMU. Killed on drop.
#[derive(Debug)]
pub struct Qemu {
    process: Process,
    qmp: Qmp,
    serial: UnixStream,
    transcript: Transcript,
    ram: PathBuf,
    scratch: Scratch,
}

impl Qemu {
    /// A 64 MiB `pc` under TCG without any device that QEMU would add by itself.
    pub fn builder() -> QemuBuilder {
        QemuBuilder {
            program: PROGRAM.into(),
            machine: "pc".into(),
            ram_mib: 64,
            accel: "tcg".into(),
            fill: None,
            wrapper: Vec::new(),
            arguments: Vec::new(),
        }
    }

    /// Runs a QMP command.
    ///
    /// # Errors
    /// QEMU's words when it refuses; its stderr too when it is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        let answer = self.qmp.execute(command, arguments);
        answer.map_err(|failure| self.explain(failure))
    }

    /// Hands it a descriptor, which `fd:name` then stands for.
    ///
    /// # Errors
    /// QEMU's words when it refuses.
    pub fn getfd(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Outcome {
        let answer = self.qmp.getfd(name, descriptor);
        answer.map_err(|failure| self.explain(failure))
    }

    /// Waits for an event; see [`Qmp::wait_event`].
    ///
    /// # Errors
    /// When the time is over or QEMU ends without it; the failure quotes its stderr.
    pub fn wait_event(
        &mut self,
        what: impl std::fmt::Display,
        within: Duration,
        accept: impl FnMut(&Value) -> bool,
    ) -> Outcome<Value> {
        let event = self.qmp.wait_event(what, within, accept);
        event.map_err(|failure| self.explain(failure))
    }

    /// Waits for one more event and keeps it; see [`Qmp::gather`].
    ///
    /// # Errors
    /// When QEMU ends; the failure quotes its stderr.
    pub fn gather_events(&mut self, within: Duration) -> Outcome {
        let gathered = self.qmp.gather(within);
        gathered.map_err(|failure| self.explain(failure))
    }

    /// Forgets the events that came so far.
    pub fn forget_events(&mut self) {
        self.qmp.forget_events();
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn stop(&mut self) -> Outcome {
        self.execute("stop", json!({})).map(drop)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn resume(&mut self) -> Outcome {
        self.execute("cont", json!({})).map(drop)
    }

    /// The run state: `running`, `paused`, `inmigrate`, `postmigrate` ...
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn run_state(&mut self) -> Outcome<String> {
        let status = self.execute("query-status", json!({}))?;
        let state = status.pointer("/status").and_then(Value::as_str);
        state.map(str::to_owned).ok_or_else(|| self.process.explain(format!("query-status: {status}")))
    }

    /// What the guest said on its serial port.
    pub fn serial(&self) -> &Transcript {
        &self.transcript
    }

    /// Types on the guest's serial port.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn type_text(&mut self, text: &str) -> Outcome {
        self.serial.write_all(text.as_bytes()).during("serial port")
    }

    /// The file that is the guest's RAM. Its content is stable only while the vCPUs are paused.
    pub fn ram(&self) -> &Path {
        &self.ram
    }

    /// Writes `len` bytes of what the guest sees from this physical address on to a file: its RAM
    /// as well as its firmware.
    ///
    /// # Errors
    /// When QEMU refuses or cannot write the file.
    pub fn save_memory(&mut self, address: u64, len: u64, path: &Path) -> Outcome {
        let arguments = json!({ "val": address, "size": len, "filename": path.display().to_string() });
        self.execute("pmemsave", arguments).map(drop)
    }

    /// A folder that lives as long as this QEMU, for sockets and the like.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The process: its stderr, its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Quits QEMU and gives everything that the guest said on its serial port, to the last byte.
    ///
    /// # Errors
    /// When QEMU does not quit in time or reports a failure.
    pub fn quit(mut self) -> Outcome<String> {
        self.execute("quit", json!({}))?;
        self.process.wait_success(QUIT)?;
        self.transcript.wait_end(QUIT)
    }

    /// A failure of this QEMU: its name, the failure, and what it said on stderr.
    pub fn explain(&self, failure: Failure) -> Failure {
        // A QEMU that closed its control connection is ending: its last output may still arrive.
        if self.qmp.closed() { self.process.explain_end(failure) } else { self.process.explain(failure) }
    }
}
