//! `multifd send DIR URI`

use multifd_engine::{Checkpoint, Error, Progress, Report};
use serde_json::json;

use crate::flags::{Common, Send};
use crate::outcome::Outcome;
use crate::progress::{self, Lines};
use crate::{signals, tls};

pub(crate) fn run(flags: &Send, common: &Common) -> Outcome {
    let mut reached = None;
    match send(flags, common, &mut reached) {
        Ok(report) => {
            let word = if report.confirmed { "by the destination" } else { "no: sent without a return path" };
            Outcome::migrated(&report, &format!("confirmed    {word}\n"))
                .with("confirmed", json!(report.confirmed))
        }
        Err(error) => Outcome::failed(&error, reached),
    }
}

fn send(flags: &Send, common: &Common, reached: &mut Option<Progress>) -> Result<Report, Error> {
    let checkpoint = Checkpoint::open(&flags.dir)?;
    let mut builder = checkpoint
        .source()?
        .channels(common.channels.unwrap_or(0))
        .max_bandwidth(common.max_bandwidth())
        .return_path(!flags.no_return_path)
        .timeout(common.timeout);
    if let Some(codec) = &common.codec {
        builder = builder.codec(codec.clone());
    }
    if let Some(detection) = flags.zero_page_detection {
        builder = builder.zero_pages(detection.into());
    }
    if let Some(tls) = tls::client(common)? {
        builder = builder.tls(tls);
    }
    let source = builder.build()?;
    signals::cancel_on_signal(source.canceller())?;
    let progress = source.progress();
    let result = progress::shown(common, &progress, Lines::Watched, || {
        let mut precopy = source.connect(&flags.uri)?;
        precopy.round()?;
        precopy.stop_copy()?.commit(checkpoint.device_state())
    });
    *reached = Some(progress.now());
    result
}
