//! `multifd receive URI --out DIR`

use multifd_codecs::Codecs;
use multifd_engine::{CheckpointWriter, Destination, Progress, Report};
use multifd_transports::Endpoint;
use serde_json::json;

use crate::flags::{Common, Receive};
use crate::human::tell;
use crate::outcome::{Failure, Outcome};
use crate::progress::{self, Lines};
use crate::{signals, tls};

pub(crate) fn run(flags: &Receive, common: &Common) -> Outcome {
    let mut reached = None;
    match receive(flags, common, &mut reached) {
        Ok(report) => {
            let place = flags.out.display();
            Outcome::migrated(&report, &format!("checkpoint   {place}\n"))
                .with("checkpoint", json!(flags.out))
        }
        Err(error) => Outcome::failed(&error, reached),
    }
}

fn receive(flags: &Receive, common: &Common, reached: &mut Option<Progress>) -> Result<Report, Failure> {
    let tls = tls::server(flags, common)?;
    let writer = CheckpointWriter::create(&flags.out)?;
    let mut builder = Destination::builder(writer.ram())
        .switchover_ack(flags.switchover_ack.into())
        .direct_io(flags.direct_io)
        .timeout(common.timeout)
        .socket_options(flags.sockets.options());
    if let Some(channels) = common.channels {
        builder = builder.channels(channels);
    }
    if let Some(choice) = common.codec {
        builder = builder.codecs(Codecs::empty().with(choice.codec()));
    }
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let destination = builder.listen(&flags.uri)?;
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
