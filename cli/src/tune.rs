//! `multifd tune SOURCE`: what a move of this memory will cost over a link, and what to set. Flags
//! and outcome; the rest is `multifd-tune`.

use std::fs::File;
use std::io::{self, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use multifd_codecs::CodecChoice;
use multifd_tune::{Config, Findings, Source};
use serde_json::json;

use crate::flags::{CodecFlag, Common, Rate, Tune};
use crate::outcome::Outcome;
use crate::progress;
use crate::sandbox::Sandbox;

pub(crate) fn run(flags: &Tune, common: &Common) -> Outcome {
    match tune(flags, common) {
        Ok(findings) if common.json => Outcome::shown(String::new(), json!(findings)),
        Ok(findings) => Outcome::shown(multifd_tune::text(&findings), json!({})),
        Err(error) => Outcome::broken(error),
    }
}

/// Finds, and writes the page.
fn tune(flags: &Tune, common: &Common) -> Result<Findings, String> {
    if let Some(CodecFlag::Auto | CodecFlag::Fixed(CodecChoice::Lz4)) = common.codec {
        return Err("--codec auto and lz4 are not predicted; expected none, zlib or zstd".to_owned());
    }
    let is_input = |page: &Path| flags.source.as_ref().is_some_and(|source| is_same(source, page));
    if let Some(path) = flags.html.as_deref().filter(|path| is_input(path)) {
        return Err(format!("refusing to overwrite the input {}", path.display()));
    }
    // Opened first: a wrong path is an error before the measurement, not after it.
    let page = flags.html.as_deref().map(|path| {
        // It tells what a guest's memory is like, and whose: for its owner, as a checkpoint is.
        let file = File::options().create(true).write(true).truncate(false).mode(0o600).open(path);
        file.map(|file| (file, path)).map_err(|error| unwritten(path, &error))
    });
    let page = page.transpose()?;
    let sandbox = Sandbox::new().connecting();
    match &flags.source {
        Some(source) => sandbox.at_rest(source),
        None => sandbox.all_files(),
    }
    .enter(common);
    let bar = progress::bar(common, "{bar:24} {percent} % {msg}");
    let findings = multifd_tune::find(&config(flags, common), &|progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(progress.codec.map(|codec| codec.to_string()).unwrap_or_default());
    });
    bar.finish_and_clear();
    let findings = findings.map_err(|error| error.chain())?;
    if let Some((mut file, path)) = page {
        let html = multifd_tune::html(&findings);
        let written = file.set_len(0).and_then(|()| file.write_all(html.as_bytes()));
        written.map_err(|error| unwritten(path, &error))?;
    }
    Ok(findings)
}

fn config(flags: &Tune, common: &Common) -> Config {
    let source = match (&flags.source, flags.pid) {
        (Some(path), _) => Source::Path(path.clone()),
        (None, pid) => Source::Process(pid.unwrap_or_default()),
    };
    let mut config = Config::new(source);
    if !flags.link.is_empty() {
        config.links.clone_from(&flags.link);
    }
    if !flags.channels.is_empty() {
        config.channels.clone_from(&flags.channels);
    }
    config.codec = common.codec.and_then(CodecFlag::fixed);
    config.cores = flags.cores.map(usize::from).and_then(NonZeroUsize::new);
    config.dirty_rate = flags.dirty_rate.map(|Rate(rate)| rate.map_or(0, NonZeroU64::get));
    config.downtime_limit = common.downtime_limit;
    config.max_bandwidth = common.max_bandwidth();
    config.quick = flags.quick;
    config.sample = flags.sample;
    config.tls = common.tls_dir.is_some();
    config
}

fn is_same(one: &Path, other: &Path) -> bool {
    one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}

fn unwritten(path: &Path, error: &io::Error) -> String {
    format!("writing {}: {error}", path.display())
}
