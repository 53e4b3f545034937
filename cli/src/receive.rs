//! `multifd receive URI --out DIR`

use std::path::Path;

use multifd_codecs::Codecs;
use multifd_engine::{CheckpointWriter, Destination, Progress, Report};
use multifd_transports::Endpoint;
use nix::sys::statvfs::statvfs;
use serde_json::json;

use crate::flags::{CodecFlag, Common, Receive};
use crate::human::tell;
use crate::outcome::{Failure, Outcome};
use crate::progress::{self, Lines};
use crate::sandbox::Sandbox;
use crate::{libvirt, signals, tls};

pub(crate) fn run(flags: &Receive, common: &Common) -> Outcome {
    let mut reached = None;
    match receive(flags, common, &mut reached) {
        Ok(report) => {
            let place = flags.out.display();
            let verified = report.audit.map_or_else(String::new, |audit| {
                format!("verified     {} pages, read again as they were placed\n", audit.pages)
            });
            let outcome = Outcome::migrated(&report, &format!("{verified}checkpoint   {place}\n"))
                .with("checkpoint", json!(flags.out));
            match flags.verify {
                true => outcome.with("verified", json!(report.audit.is_some())),
                false => outcome,
            }
        }
        Err(error) => Outcome::failed(&error, reached),
    }
}

fn receive(flags: &Receive, common: &Common, reached: &mut Option<Progress>) -> Result<Report, Failure> {
    let tls = tls::server(flags, common)?;
    let uri = libvirt::stream_in(&flags.uri)?;
    let writer = CheckpointWriter::create(&flags.out)?;
    Sandbox::new().filling(writer.folder()).listening(&uri).enter(common);
    let mut builder = Destination::builder(writer.ram())
        .switchover_ack(flags.switchover_ack.into())
        .direct_io(flags.direct_io)
        .postcopy(true)
        .verify(flags.verify)
        .resume_for(flags.resume_for)
        .timeout(common.timeout)
        .max_memory(flags.max_memory)
        .deadline(flags.deadline)
        .socket_options(flags.sockets.options());
    match flags.max_ram {
        Some(0) => {}
        Some(limit) => builder = builder.max_ram(limit),
        None => builder = builder.max_ram(free_space(&flags.out)?),
    }
    if let Some(channels) = common.channels {
        builder = builder.channels(channels);
    }
    if let Some(choice) = common.codec.and_then(CodecFlag::fixed) {
        builder = builder.codecs(Codecs::empty().with(choice.codec()));
    }
    if let Some(limit) = flags.recover {
        builder = builder.recover(limit);
    }
    if let Some(limit) = flags.hold_timeout {
        builder = builder.hold_timeout(limit);
    }
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let destination = builder.listen(&uri)?;
    signals::cancel_on_signal(destination.canceller());
    if !common.quiet {
        let endpoint = destination.endpoint();
        let doing = if matches!(endpoint, Endpoint::File { .. }) { "reading" } else { "listening on" };
        tell(format_args!("{doing} {endpoint}"));
    }
    let progress = destination.progress();
    let result = progress::shown(common, &progress, Lines::Watched, || {
        let arrived = destination.receive()?;
        let checkpoint = writer.finish(&arrived)?;
        arrived.accept().inspect_err(|error| {
            if !error.source_may_resume() {
                tracing::warn!(checkpoint = %checkpoint.display(), "complete, but the source may run the guest, too");
            }
        })
    });
    *reached = Some(progress.now());
    Ok(result?)
}

/// Bytes that are free where the checkpoint will be.
fn free_space(out: &Path) -> Result<u64, Failure> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = statvfs(parent).map_err(|error| {
        Failure::Usage(format!("{}: free space cannot be told: {error}; see --max-ram", parent.display()))
    })?;
    Ok(found.blocks_available().saturating_mul(found.fragment_size()))
}
