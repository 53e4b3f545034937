//! A QEMU that switches into memory of this process: threads use it while it comes, and QEMU serves
//! what they ask for.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "test code may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use multifd_engine::transports::{Listener, TlsServer};
use multifd_engine::{
    Destination, FreshRam, Incoming, MigrationState, PAGE, PostcopyEnd, PostcopyGuest, RamBlock,
};
use multifd_tests::qemu::PROGRAM;
use multifd_tests::{Authority, Failure, Fill, Member, Outcome, Qemu, QemuBuilder, Scratch, Settings, skip};

use crate::fixture::{ALWAYS, SOON, When, guest, missing_kvm, settings, switch};
use crate::memory::{load, start, text};

/// How both ends reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Tcp,
    Unix,
    Tls,
}

/// One of the ways in which a QEMU's guest goes on here.
#[derive(Clone, Copy, Debug)]
struct Cell {
    when: When,
    preempt: bool,
    over: Over,
    /// The link is cut while threads wait.
    cut: bool,
}

/// The guest's memory here, and what it has to be.
#[derive(Clone)]
struct Memory {
    here: RamBlock,
    source: PathBuf,
}

impl Memory {
    fn check(&self, pages: impl Iterator<Item = usize>) {
        let source = File::open(&self.source).unwrap();
        let mut expected = [0; PAGE];
        for page in pages {
            source.read_exact_at(&mut expected, (page * PAGE) as u64).unwrap();
            assert!(load(&self.here, page) == expected, "page {page} is not the source's");
        }
    }
}

/// Pages that a thread uses before all are here.
const USED: usize = 100;

/// A thread that uses memory as a vCPU does, in order or here and there.
fn use_memory(memory: &Memory, thread: usize) -> std::thread::JoinHandle<()> {
    let memory = memory.clone();
    start(move || {
        let pages = memory.here.pages();
        // A step that is prime to the number of pages, or one.
        let step = [1, 4099, 12_289][thread % 3];
        memory.check((0..USED).map(|turn| (pages / 2 + thread * 977 + turn * step) % pages));
    })
}

pub(crate) fn credentials(scratch: &Scratch) -> Outcome<PathBuf> {
    let dir = scratch.path("tls");
    Authority::new("test CA")?.issue(&dir, Some(&Member::server()), Some(&Member::client()))?;
    Ok(dir)
}

pub(crate) fn with_tls(machine: QemuBuilder, settings: &mut Settings, dir: &Path) -> QemuBuilder {
    settings.parameters.insert("tls-creds".into(), "tls0".into());
    let object = format!("tls-creds-x509,id=tls0,dir={},endpoint=client,verify-peer=on", dir.display());
    machine.argument("-object").argument(object)
}

/// A QEMU whose guest goes on here; `None`: it got no CPU in a round, and its source had nothing
/// left to send.
fn switched(
    machine: QemuBuilder,
    settings: &Settings,
    destination: Destination,
    when: When,
) -> Outcome<Option<(Qemu, PostcopyGuest)>> {
    let to = destination.endpoint().to_string();
    let mut source = machine.spawn("source")?;
    let receiving = start(move || destination.receive_live());
    let switched = switch(&mut source, &to, settings, when);
    if switched.is_err() && !source.migration()?.ended() {
        switched?;
    }
    let incoming = receiving.join().map_err(|_| Failure::new("the destination panicked"))?.map_err(text)?;
    Ok(match incoming {
        Incoming::Postcopy(guest) => Some((source, guest)),
        Incoming::Arrived(_) => None,
    })
}

/// Tries until a guest was written to up to the switch.
const TRIES: usize = 10;

fn runs_here(machine: impl Fn(QemuBuilder) -> QemuBuilder, cell: Cell) -> Outcome {
    for _ in 0..TRIES {
        if runs_here_once(&machine, cell)? {
            return Ok(());
        }
    }
    Err(Failure::new(format!("{TRIES} guests wrote nothing in a round")))
}

fn runs_here_once(machine: impl Fn(QemuBuilder) -> QemuBuilder, cell: Cell) -> Outcome<bool> {
    let scratch = Scratch::new()?;
    let mut machine = machine(guest(&scratch)?.ram_mib(32).fill(Fill::new(7)));
    let mut settings = settings();
    settings.capabilities.extend(cell.preempt.then_some("postcopy-preempt"));
    // Slow: what is used is asked for.
    settings.parameters.insert("max-postcopy-bandwidth".into(), (1 << 20).into());
    let ram = FreshRam::anonymous();
    let mut destination = Destination::builder(ram.clone()).postcopy(true).timeout(SOON);
    let mut tls = None;
    if cell.over == Over::Tls {
        let dir = credentials(&scratch)?;
        machine = with_tls(machine, &mut settings, &dir);
        tls = Some(TlsServer::from_directory(&dir)?);
        destination = destination.tls(TlsServer::from_directory(&dir)?);
    }
    let uri = |name: &str| match cell.over {
        Over::Unix => scratch.unix_uri(name),
        Over::Tcp | Over::Tls => "tcp:127.0.0.1:0".to_owned(),
    };
    let destination = destination.listen(&uri("in").parse()?).map_err(text)?;
    let Some((mut source, mut guest)) = switched(machine, &settings, destination, cell.when)? else {
        return Ok(false);
    };
    assert!(!guest.device_state().is_empty());
    guest.loaded().map_err(text)?;
    let here = ram.blocks().into_iter().find(|block| block.name().as_str() == "pc.ram");
    // Its guest is stopped: the file stays as it is.
    let memory = Memory { here: here.unwrap(), source: source.ram().to_owned() };
    let mut using: Vec<_> = (0..4).map(|thread| use_memory(&memory, thread)).collect();
    if cell.cut {
        // The last page of all: it is waited for, or will be, while there is no link.
        let waiting = memory.clone();
        using.push(start(move || waiting.check(std::iter::once(waiting.here.pages() - 1))));
        let listener = Listener::bind(&uri("again").parse()?)?.tls(tls);
        recover(&mut source, &mut guest, listener)?;
    }
    for thread in using {
        thread.join().map_err(|_| Failure::new("a page is not the source's"))?;
    }
    source.set_parameter("max-postcopy-bandwidth", 0)?;
    let end = guest.wait().map_err(text)?;
    let PostcopyEnd::Completed(report) = end else { return Err(Failure::new(format!("{end:?}"))) };
    source.wait_completed(SOON)?;
    memory.check(0..memory.here.pages());
    assert_eq!(report.progress.recoveries, u64::from(cell.cut));
    // In the third round all that is used may be here.
    let asked = report.postcopy.as_ref().is_some_and(|figures| figures.requests > 0);
    assert!(asked || matches!(cell.when, When::InThirdRound), "nothing was asked for");
    Ok(true)
}

fn recover(source: &mut Qemu, guest: &mut PostcopyGuest, listener: Listener) -> Outcome {
    source.wait_status("postcopy-active", SOON)?;
    source.execute("migrate-pause", serde_json::json!({}))?;
    source.wait_status("postcopy-paused", SOON)?;
    let end = guest.wait().map_err(text)?;
    assert!(matches!(end, PostcopyEnd::Paused(_)), "{end:?}");
    assert_eq!(guest.state(), MigrationState::PostcopyPaused);
    source.resume_postcopy(&listener.endpoint().to_string())?;
    guest.recover(listener, SOON).map_err(text)?;
    source.wait_status("postcopy-active", SOON).map(drop)
}

macro_rules! cells {
    ($($name:ident: $when:ident, $preempt:expr, $over:ident, $cut:expr;)*) => {
        $(#[test] fn $name() -> Outcome {
            if let Some(why) = skip::missing_qemu().or_else(missing_kvm) {
                skip!("{why}");
            }
            runs_here(
                |machine| machine,
                Cell { when: When::$when, preempt: $preempt, over: Over::$over, cut: $cut },
            )
        })*
    };
}

cells! {
    qemu_serves_what_is_used_here: InThirdRound, false, Tcp, false;
    qemu_serves_it_over_a_connection_of_its_own: InFirstRound, true, Unix, false;
    qemu_serves_it_encrypted_over_the_next_link_too: InFirstRound, false, Tls, true;
    qemu_serves_it_encrypted_over_a_connection_of_its_own_over_the_next_link_too: InThirdRound, true, Tls, true;
}

/// What the tests above are a sample of, and the machine type whose connection of its own comes
/// first.
#[test]
#[ignore = "takes minutes: MULTIFD_TEST_QEMU=qemu-system-x86_64 cargo test --test postcopy -- --ignored"]
fn qemu_serves_what_is_used_here_in_every_way() -> Outcome {
    if let Some(why) = skip::missing_qemu().or_else(missing_kvm) {
        skip!("{why}");
    }
    let program = std::env::var_os("MULTIFD_TEST_QEMU").unwrap_or_else(|| PROGRAM.into());
    let machines = ["pc", "pc-i440fx-7.2"];
    let run = |machine: &str, cell| {
        runs_here(|builder| builder.program(Path::new(&program)).machine(machine), cell)
            .map_err(|failure| Failure::new(format!("{machine} {cell:?}: {failure}")))
    };
    for when in ALWAYS {
        for preempt in [false, true] {
            for over in [Over::Tcp, Over::Unix, Over::Tls] {
                for cut in [false, true] {
                    let cell = Cell { when, preempt, over, cut };
                    machines.iter().try_for_each(|machine| run(machine, cell))?;
                }
            }
        }
    }
    Ok(())
}
