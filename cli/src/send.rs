//! `multifd send DIR URI`

use std::time::Instant;

use multifd_engine::{Checkpoint, Error, ErrorKind, Phase, Progress, Remedy, Report, ZeroCopyStats};
use multifd_transports::Endpoint;
use serde_json::json;

use crate::flags::{CodecFlag, Common, Send};
use crate::human::show_bytes;
use crate::libvirt::Image;
use crate::outcome::{Failure, Outcome};
use crate::progress::{self, Lines};
use crate::sandbox::Sandbox;
use crate::{postcopy, signals, tls};

pub(crate) fn run(flags: &Send, common: &Common) -> Outcome {
    let mut reached = None;
    match send(flags, common, &mut reached) {
        Ok(report) => {
            let status = match (&flags.uri, report.confirmed) {
                (Endpoint::File { .. }, _) => "no: a file, written and synced",
                (_, true) => "by the destination",
                (_, false) => "no: sent without a return path",
            };
            let outcome = Outcome::migrated(&report, &format!("confirmed    {status}\n"))
                .with("confirmed", json!(report.confirmed));
            match report.zero_copy {
                Some(ZeroCopyStats { sends, copied, refused, .. }) => outcome
                    .with("zero_copy_sends", json!(sends))
                    .with("zero_copy_copied", json!(copied))
                    .with("zero_copy_refused", json!(refused)),
                None => outcome,
            }
        }
        Err(failure) => {
            let hint = match &failure {
                Failure::Migration(error) if error.remedy() == Some(Remedy::CompareSettings) => {
                    settings_to_compare(flags, common, error)
                }
                _ => None,
            };
            Outcome::failed(&failure, reached).hinting(hint)
        }
    }
}

fn send(flags: &Send, common: &Common, reached: &mut Option<Progress>) -> Result<Report, Failure> {
    let Some(from) = &flags.libvirt_header else { return send_to(&flags.uri, flags, common, reached) };
    let image = Image::begin(from, &flags.uri, flags.mapped_ram)?;
    match send_to(&image.stream(), flags, common, reached) {
        Ok(report) => image.finish().map(|()| report),
        Err(failure) => {
            image.abort();
            Err(failure)
        }
    }
}

fn send_to(
    uri: &Endpoint,
    flags: &Send,
    common: &Common,
    reached: &mut Option<Progress>,
) -> Result<Report, Failure> {
    let begun = Instant::now();
    let checkpoint = Checkpoint::open(&flags.dir)?;
    let mut builder = checkpoint
        .source()?
        .channels(common.channels.unwrap_or(0))
        .max_bandwidth(common.max_bandwidth())
        .mapped_ram(flags.mapped_ram)
        .direct_io(flags.direct_io)
        .postcopy(flags.postcopy)
        .postcopy_preempt(flags.following.postcopy_preempt)
        .max_postcopy_bandwidth(flags.following.max_bandwidth())
        .checksums(flags.proof.checksums())
        .digest(flags.proof.digest())
        .resume_for(flags.resumption.resume_for)
        .resume_anew(flags.resumption.resume_anew)
        .timeout(common.timeout)
        .socket_options(flags.sockets.options())
        .channel_endpoints(flags.sockets.channel_uri.clone())
        .zero_copy_send(flags.sockets.zero_copy_send());
    if let Some(channels) = flags.following.postcopy_urgent_channels {
        builder = builder.postcopy_urgent_channels(channels.into());
    }
    if flags.return_path || flags.no_return_path {
        builder = builder.return_path(flags.return_path);
    }
    match common.codec {
        Some(CodecFlag::Auto) => builder = builder.auto_codec(true),
        Some(CodecFlag::Fixed(choice)) => builder = builder.codec(choice.codec()),
        None => {}
    }
    if let Some(detection) = flags.zero_page_detection {
        builder = builder.zero_pages(detection.into());
    }
    if let Some(tls) = tls::client(common)? {
        builder = builder.tls(tls);
    }
    let source = builder.build()?;
    let sandbox = Sandbox::new().reading(&flags.dir).dialling(uri);
    flags.sockets.channel_uri.iter().fold(sandbox, Sandbox::dialling).enter(common);
    let before_source = begun.elapsed();
    signals::cancel_on_signal(source.canceller());
    let progress = source.progress();
    let result = progress::shown(common, &progress, Lines::Watched, || {
        let mut precopy = source.connect(uri)?;
        if flags.postcopy {
            let postcopy = precopy.switch_to_postcopy(checkpoint.device_state())?;
            return postcopy::serve(postcopy, uri, flags.following.recover);
        }
        precopy.round()?;
        precopy.stop_copy()?.commit(checkpoint.device_state())
    });
    *reached = Some(progress.now());
    let mut report = result?;
    if let Some(run_after) = report.postcopy.as_mut().and_then(|postcopy| postcopy.run_after.as_mut()) {
        *run_after += before_source;
    }
    Ok(report)
}

/// What must be the same at the destination, and where that says why it failed. `None` if the
/// checkpoint cannot be read any more.
fn settings_to_compare(flags: &Send, common: &Common, error: &Error) -> Option<String> {
    let checkpoint = Checkpoint::open(&flags.dir).ok()?;
    let manifest = checkpoint.manifest();
    let channels = common.channels.unwrap_or(0);
    let guess = match (error.kind(), error.phase()) {
        (ErrorKind::Transport, Phase::Connect) => "It takes fewer channels than these, it seems. ",
        (ErrorKind::Deadline, Phase::Active | Phase::Setup) => {
            "It waits for more channels than these, it seems. "
        }
        _ => "",
    };
    let multifd = match channels {
        0 => "capability multifd off".to_owned(),
        channels => {
            let codec = common.codec.map_or("none", CodecFlag::family);
            format!("capability multifd on, multifd-channels {channels}, multifd-compression {codec}")
        }
    };
    let blocks = manifest.blocks.iter().map(|block| format!("{} {}", block.idstr, show_bytes(block.length)));
    Some(format!(
        "{guess}The destination's own log says why (a QEMU's standard error). To compare with it: {multifd}; machine {}; RAM and ROM {}",
        manifest.machine,
        blocks.collect::<Vec<_>>().join(", "),
    ))
}
