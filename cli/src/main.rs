//! The `multifd` command: moves, stores and inspects live guests, with QEMU or another multifd at
//! the other end.
//!
//! ```text
//!  flags (what was typed) ─> one function a command ─> engine ─> Outcome (stdout, exit code)
//! ```

mod demo;
mod flags;
mod human;
mod inspect;
mod libvirt;
mod outcome;
mod postcopy;
mod progress;
mod receive;
mod sandbox;
mod send;
mod signals;
mod sockets;
mod tls;
mod tls_init;
mod tune;

use std::process::ExitCode;

use clap::Parser;

use flags::{Command, Flags};

fn main() -> ExitCode {
    // First of all: a signal that comes before ends a process that has nothing to clean up yet.
    if let Err(error) = signals::install() {
        human::tell(format_args!("multifd: no signals can be handled: {error}"));
        return ExitCode::from(outcome::FAILED);
    }
    let flags = Flags::parse();
    if flags.common.no_core_dump
        && let Err(error) = nix::sys::prctl::set_dumpable(false)
    {
        human::tell(format_args!("multifd: core dumps cannot be switched off: {error}"));
        return ExitCode::from(outcome::FAILED);
    }
    if !flags.command.migrates() {
        signals::end_on_signal();
    }
    if let Some(level) = flags.common.log_level() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level).init();
    }
    let outcome = match &flags.command {
        Command::Demo(demo) => demo::run(demo, &flags.common),
        Command::DemoDestination(there) => demo::destination::run(there, &flags.common),
        Command::Inspect(inspect) => inspect::run(inspect, &flags.common),
        Command::Receive(receive) => receive::run(receive, &flags.common),
        Command::Send(send) => send::run(send, &flags.common),
        Command::TlsInit(init) => tls_init::run(init),
        Command::Tune(tune) => tune::run(tune, &flags.common),
    };
    outcome.report(&flags.common)
}
