//! Guests move from host to host for as long as is asked for, and everything goes wrong that may:
//! cancels, refusals, ends that are dropped, connections that are cut. After every move RAM is
//! compared, page by page.
//!
//! `cargo run --release --package multifd-soak -- --seconds 1800`
//!
//! ```text
//!  threads that write ─ balloon ─ memory that comes and goes      a guest of this process, A -> B -> C -> ...
//!  a vCPU that writes ─ slots that come and go                    a KVM guest, where /dev/kvm works
//!     every move: channels, codec, xbzrle, log by the seed; half of the attempts fail, and the guest runs on at the source
//! ```

mod guest;
mod kvm;
#[path = "../../../engine/tests/kvm_guest/mod.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod kvm_guest;
mod moves;
mod random;
mod threads;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use crate::guest::Guest;
use crate::moves::Tally;
use crate::random::Random;
use crate::threads::Threads;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Moves guests until the time is over, and compares RAM after every move.
#[derive(Parser)]
struct Flags {
    /// How long to go on; the move that is under way then is finished.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What happens, and to what: the same seed makes the same moves, though not the same timing.
    #[arg(long)]
    seed: Option<u64>,
    /// RAM of a guest, in MiB.
    #[arg(long, default_value_t = 16)]
    ram: usize,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let seed = flags.seed.unwrap_or_else(|| std::process::id().into());
    println!("seed {seed}");
    match soak(&flags, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seed {seed}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn soak(flags: &Flags, seed: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(flags.seconds);
    let mut random = Random::new(seed);
    let (mut of_threads, mut of_kvm) = (Tally::default(), Tally::default());
    let mut threads = Threads::new(flags.ram, &mut random)?;
    let mut vm = kvm::Vm::new(flags.ram).inspect_err(|error| println!("no KVM guest: {error}")).ok();
    while Instant::now() < end {
        threads = moves::hop(threads, &mut random, &mut of_threads)?;
        if let Some(guest) = vm.take() {
            vm = Some(moves::hop(guest, &mut random, &mut of_kvm)?);
        }
    }
    threads.pause()?;
    println!("threads  {of_threads}");
    if let Some(mut vm) = vm {
        vm.pause()?;
        println!("kvm      {of_kvm}");
    }
    println!("soak: RAM was equal after every one of {} moves", of_threads.moves + of_kvm.moves);
    Ok(())
}
