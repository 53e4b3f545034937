//! `multifd demo`: a generated guest goes from this process to another, and every page is compared.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use multifd_codecs::parse_codec;
use multifd_engine::{Checkpoint, PAGE, Report};
use serde_json::json;

use crate::flags::{Common, Demo, Rate};
use crate::generated;
use crate::outcome::Outcome;
use crate::progress;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const DEFAULT_CHANNELS: usize = 2;
const DEFAULT_CODEC: &str = "zstd:1";

pub(crate) fn run(flags: &Demo, common: &Common) -> Outcome {
    let result = tempfile::Builder::new().prefix("multifd-demo-").tempdir().map_err(Into::into);
    match result.and_then(|place| migrate(flags, common, place.path())) {
        Ok((report, pages)) => {
            let proof = format!("verified     {pages} pages, all equal\n");
            Outcome::migrated(&report, &proof).with("verified", json!(true))
        }
        Err(error) => Outcome::broken(error.to_string()).with("verified", json!(false)),
    }
}

fn migrate(flags: &Demo, common: &Common, place: &Path) -> Result<(Report, usize)> {
    let (from, to) = (place.join("source"), place.join("destination"));
    generated::checkpoint(&from, flags.ram)?;
    let mut destination = Destination::start(&to)?;
    let checkpoint = Checkpoint::open(&from)?;
    let codec = match &common.codec {
        Some(codec) => codec.clone(),
        None => parse_codec(DEFAULT_CODEC)?,
    };
    let Rate(max_bandwidth) = common.max_bandwidth.unwrap_or(Rate(None));
    let source = checkpoint
        .source()?
        .channels(common.channels.unwrap_or(DEFAULT_CHANNELS))
        .codec(codec)
        .max_bandwidth(max_bandwidth)
        .timeout(common.timeout)
        .build()?;
    let progress = source.progress();
    let report = progress::shown(common, &progress, || {
        let mut precopy = source.connect(&destination.uri.parse()?)?;
        precopy.round()?;
        Ok::<_, Box<dyn std::error::Error>>(precopy.stop_copy()?.commit(checkpoint.device_state())?)
    })?;
    destination.wait()?;
    Ok((report, compare(&checkpoint, &Checkpoint::open(&to)?)?))
}

/// The same command as another process: the destination.
struct Destination {
    child: Child,
    uri: String,
}

impl Destination {
    fn start(out: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["receive", "tcp:127.0.0.1:0", "--out"])
            .arg(out)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let mut stderr = BufReader::new(child.stderr.take().ok_or("no stderr")?);
        stderr.read_line(&mut line)?;
        let uri = line
            .trim()
            .strip_prefix("listening on ")
            .ok_or_else(|| format!("the destination said {line:?}"))?;
        let uri = uri.to_owned();
        child.stderr = Some(stderr.into_inner());
        Ok(Self { child, uri })
    }

    fn wait(&mut self) -> Result<()> {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        let status = self.child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the destination failed ({status}): {said}").into())
        }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // Ended already, unless something went wrong on this side.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Compares every page of every block; the count of pages.
fn compare(here: &Checkpoint, there: &Checkpoint) -> Result<usize> {
    let (ours, theirs) = (here.ram()?, there.ram()?);
    if ours.len() != theirs.len() {
        return Err(format!("{} blocks were sent, {} arrived", ours.len(), theirs.len()).into());
    }
    let mut compared = 0;
    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        if ours.name() != theirs.name() || ours.pages() != theirs.pages() {
            return Err(format!("block {} arrived as {}", ours.name(), theirs.name()).into());
        }
        for page in 0..ours.pages() {
            if !ours.read_page(page, &mut a) || !theirs.read_page(page, &mut b) || a != b {
                return Err(format!("page {page} of block {} differs", ours.name()).into());
            }
        }
        compared += ours.pages();
    }
    Ok(compared)
}
