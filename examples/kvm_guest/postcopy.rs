//! The same guest, which goes on before its RAM is there: a vCPU that needs a page waits for it
//! within KVM_RUN.
//!
//! ```text
//!  this process                                    the other one
//!  2 vCPUs count in memory; KVM logs what they write
//!  a round ─────────────────────────────────────>  RAM
//!  vCPUs stand; what is stale, registers ───────>  registers; 2 vCPUs count on
//!  pages <────────────────────────────── requests  page faults of the vCPUs
//!  the rest ────────────────────────────────────>  all of RAM: the counters add up
//! ```

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use multifd_engine::vm_memory::Bytes as _;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Destination, Incoming, KvmDirtyLog, PAGE, PostcopyEnd, RamBlock, Report, Served, Source,
};

use crate::guest::KvmGuest;
use crate::vcpus::{self, Vcpus};
use crate::{PACE, Result, There, VCPUS, hash, memory};

pub(crate) const DESTINATION: &str = "--postcopy-destination";

/// Requests that are served before anything else goes.
const SERVED: u64 = 32;

/// Pages that the guest has, and never touches.
fn quiet(ram: &RamBlock) -> Range<usize> {
    16..ram.pages() / 8
}

fn fill_quiet(ram: &RamBlock) -> Result<()> {
    for page in quiet(ram).filter(|page| page % 4 != 0) {
        let content = (page as u64 | 1 << 40).to_le_bytes().repeat(PAGE / 8);
        ram.memory().slice(page * PAGE, PAGE).ok_or("not in memory")?.write_slice(&content, 0)?;
    }
    Ok(())
}

/// Moves a fresh guest to another process; what its vCPUs had counted when they stood still.
pub(crate) fn migrate() -> Result<(Report, Vec<u64>)> {
    let ram = memory()?;
    let guest = KvmGuest::new(&ram)?;
    let slot = guest.add_memory()?;
    guest.load()?;
    fill_quiet(&ram)?;
    let vcpus = (0..VCPUS).map(|number| guest.add_vcpu(number, PACE)).collect::<Result<Vec<_>>>()?;
    // SAFETY: the VM has this one slot, as `add_memory` made it, for as long as the migration runs.
    #[expect(unsafe_code, reason = "KVM is told the slot's memory again")]
    let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), vec![slot]) };

    let mut there = There::start(DESTINATION)?;
    let running = Vcpus::start(vcpus);
    let source = Source::builder(vec![ram.clone()], Configuration::new("kvm-guest-1.0"))
        .dirty_log(log)
        .postcopy(true)
        .postcopy_preempt(true)
        .max_postcopy_bandwidth(NonZeroU64::new(1))
        .build()?;
    let control = source.control();
    let mut precopy = source.connect(&there.uri.parse()?)?;
    running.wait_for_laps(1);
    precopy.round()?;
    precopy.prepare_postcopy()?;
    // What they write now is stale at the other end.
    running.wait_for_laps(1);
    let mut states = running.pause()?;
    let counted = (0..VCPUS).map(|number| guest.counted(number)).collect::<Result<Vec<_>>>()?;
    let mut postcopy = precopy.switch_to_postcopy(&vcpus::save(&mut states)?)?;
    let served = thread::scope(|scope| {
        let serving = scope.spawn(move || postcopy.serve());
        while control.progress().requests < SERVED && !serving.is_finished() {
            thread::yield_now();
        }
        control.set_max_postcopy_bandwidth(None);
        serving.join().map_err(|_| "the source panicked")
    })??;
    let report = match served {
        Served::Completed(report) => *report,
        Served::Paused(error) => return Err(error.into()),
    };

    there.expect(&format!("quiet {:016x}", hash(&ram, quiet(&ram))))?;
    let now: Vec<u64> = serde_json::from_str(&there.line()?)?;
    assert!(counted.iter().zip(&now).all(|(before, now)| now > before), "{counted:?}, then {now:?}");
    there.end()?;
    Ok((report, counted))
}

/// The other process: runs the guest while its pages come, and says what it has.
pub(crate) fn destination() -> Result<()> {
    let ram = memory()?;
    let destination =
        Destination::builder(vec![ram.clone()]).postcopy(true).listen(&"tcp:127.0.0.1:0".parse()?)?;
    println!("listening on {}", destination.endpoint());
    let Incoming::Postcopy(mut incoming) = destination.receive_live()? else {
        return Err("the source did not switch".into());
    };
    let states = vcpus::load(VCPUS as usize, &incoming.sections()?)?;

    let guest = KvmGuest::new(&ram)?;
    guest.add_memory()?;
    let vcpus = (0..VCPUS).map(|number| guest.add_vcpu(number, PACE)).collect::<Result<Vec<_>>>()?;
    vcpus.iter().zip(&states).try_for_each(|(vcpu, state)| state.load(vcpu))?;
    incoming.loaded()?;
    let running = Vcpus::start(vcpus);
    let report = match incoming.wait()? {
        PostcopyEnd::Completed(report) => *report,
        PostcopyEnd::Paused(error) => return Err(error.into()),
    };
    running.wait_for_laps(5);
    running.pause()?;
    let postcopy = report.postcopy.ok_or("no post-copy")?;
    let faults = postcopy.faults.ok_or("no figures")?;
    assert!(faults.faults > 0 && postcopy.requests > 0, "{faults:?}");
    println!("quiet {:016x}", hash(&ram, quiet(&ram)));
    // Every addition is in the data and in the counter: a page that was lost, or came late, would
    // show here.
    let counted = (0..VCPUS).map(|number| guest.counted(number)).collect::<Result<Vec<_>>>()?;
    for (number, counted) in (0..).zip(&counted) {
        let sum = guest.sum(number)?;
        assert!(sum == *counted, "vCPU {number}: {counted} counted, {sum} in the data");
    }
    println!("{}", serde_json::to_string(&counted)?);
    Ok(())
}
