//! The other process of the demo: receives the guest into memory of its own and tells the hash of
//! every page. In post-copy the guest goes on here while its pages come.
//!
//! ```text
//!  demo ── starts ──> demo-destination
//!       <── "listening on URI" ───────   stdout, a line
//!       ═══ the migration ════════════>
//!       <── {"faults": ..} ───────────   stdout, a line: what the guest waited for, or null
//!       <── a hash a page, 8 bytes ───   stdout, the rest
//! ```

use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use multifd_engine::{
    Destination, FreshRam, Incoming, PAGE, PostcopyEnd, PostcopyGuest, PostcopyReport, RamBlock,
};
use serde_json::{Value, json};

use super::vcpus::{Found, Vcpus};
use super::{Result, state};
use crate::flags::{Common, DemoDestination};
use crate::outcome::Outcome;

const LISTENING: &str = "listening on ";

/// `multifd demo-destination`
pub(crate) fn run(flags: &DemoDestination, common: &Common) -> Outcome {
    match receive(flags, common) {
        Ok(()) => Outcome::silent(),
        Err(error) => Outcome::broken(error.to_string()),
    }
}

fn receive(flags: &DemoDestination, common: &Common) -> Result<()> {
    let ram = FreshRam::anonymous();
    let destination = Destination::builder(ram.clone())
        .postcopy(flags.postcopy)
        .timeout(common.timeout)
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    println!("{LISTENING}{}", destination.endpoint());
    let incoming = destination.receive_live()?;
    let blocks = ram.blocks();
    match incoming {
        Incoming::Arrived(arrived) => {
            state::load(&arrived.sections()?, blocks.iter().map(RamBlock::pages).sum())?;
            arrived.accept()?;
            let hashes = blocks.iter().flat_map(|block| (0..block.pages()).map(|page| hash(block, page)));
            tell(&Value::Null, hashes)
        }
        Incoming::Postcopy(guest) => {
            let [block] = &blocks[..] else { return Err("the demo's guest has one RAM block".into()) };
            let (figures, found) = run_on(guest, block)?;
            let mut figures = json!(figures);
            if let Value::Object(figures) = &mut figures {
                figures.insert("touched".to_owned(), json!(found.touched));
            }
            tell(&figures, found.hashes.into_iter())
        }
    }
}

fn tell(figures: &Value, hashes: impl Iterator<Item = u64>) -> Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    writeln!(out, "{figures}")?;
    for hash in hashes {
        out.write_all(&hash.to_be_bytes())?;
    }
    Ok(out.flush()?)
}

/// The guest goes on, and is looked at when all of its RAM is here.
fn run_on(mut guest: PostcopyGuest, block: &RamBlock) -> Result<(Option<PostcopyReport>, Found)> {
    state::load(&guest.sections()?, block.pages())?;
    guest.loaded()?;
    let vcpus = Vcpus::start(block)?;
    match guest.wait()? {
        PostcopyEnd::Completed(report) => Ok((report.postcopy, vcpus.stop()?)),
        // Its threads may wait for pages that will never come: they end with this process.
        PostcopyEnd::Paused(error) => Err(error.chain().into()),
    }
}

/// The hash of a page as it is now; the same in every process of this program.
pub(super) fn hash(block: &RamBlock, page: usize) -> u64 {
    let mut content = [0; PAGE];
    // A page outside of the block hashes as zeros here and as itself there: found as a difference.
    let _ = block.read_page(page, &mut content);
    hash_of(&content)
}

pub(super) fn hash_of(content: &[u8; PAGE]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

/// The guest at the destination.
pub(super) struct Arrival {
    /// What its threads waited for in post-copy, and `touched`: the pages that they used meanwhile.
    pub(super) figures: Value,
    /// The hashes of all pages as they came, in order.
    pub(super) hashes: Vec<u64>,
}

/// The destination's process, seen from the demo.
pub(super) struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
    pub(super) uri: String,
}

impl Process {
    pub(super) fn start(postcopy: bool) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["demo-destination", "--quiet"])
            .args(postcopy.then_some("--postcopy"))
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().ok_or("the destination has no stdout")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let uri =
            line.trim().strip_prefix(LISTENING).ok_or_else(|| format!("the destination said {line:?}"))?;
        let uri = uri.to_owned();
        Ok(Self { child, stdout, uri })
    }

    /// What the destination tells when the guest has arrived.
    pub(super) fn arrived(mut self) -> Result<Arrival> {
        let (mut line, mut bytes) = (String::new(), Vec::new());
        self.stdout.read_line(&mut line)?;
        self.stdout.read_to_end(&mut bytes)?;
        let status = self.child.wait()?;
        if !status.success() {
            return Err(format!("the destination failed ({status})").into());
        }
        let figures = serde_json::from_str(&line)?;
        let hashes = bytes.as_chunks::<8>().0.iter().map(|hash| u64::from_be_bytes(*hash)).collect();
        Ok(Arrival { figures, hashes })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already, unless something went wrong on this side.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
