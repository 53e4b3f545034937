//! The other process of the demo: receives the guest into memory of its own and tells the hash of
//! every page.
//!
//! ```text
//!  demo ── starts ──> demo-destination
//!       <── "listening on URI" ───────   stdout, a line
//!       ═══ the migration ════════════>
//!       <── a hash a page, 8 bytes ───   stdout, the rest
//! ```

use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use multifd_engine::wire::{BlockEntry, Configuration};
use multifd_engine::{Destination, HostMemory, IncomingRam, PAGE, RamBlock};

use super::Result;
use crate::flags::Common;
use crate::outcome::Outcome;

const LISTENING: &str = "listening on ";

/// `multifd demo-destination`
pub(crate) fn run(common: &Common) -> Outcome {
    match receive(common) {
        Ok(()) => Outcome::silent(),
        Err(error) => Outcome::broken(error.to_string()),
    }
}

fn receive(common: &Common) -> Result<()> {
    let ram = FreshRam::default();
    let blocks = std::sync::Arc::clone(&ram.0);
    let destination =
        Destination::builder(ram).timeout(common.timeout).listen(&"tcp:127.0.0.1:0".parse()?)?;
    println!("{LISTENING}{}", destination.endpoint());
    destination.receive()?.accept()?;
    let mut out = BufWriter::new(io::stdout().lock());
    for block in blocks.lock().map_err(|_| "poisoned")?.iter() {
        for page in 0..block.pages() {
            out.write_all(&hash(block, page).to_be_bytes())?;
        }
    }
    Ok(out.flush()?)
}

/// Fresh memory for whatever the source announces.
#[derive(Default)]
struct FreshRam(std::sync::Arc<std::sync::Mutex<Vec<RamBlock>>>);

impl IncomingRam for FreshRam {
    fn open(
        &mut self,
        _configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> std::result::Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>> {
        let open = |entry: &BlockEntry| -> io::Result<RamBlock> {
            let len = usize::try_from(entry.used_len).map_err(io::Error::other)?;
            Ok(RamBlock::new(entry.name.clone(), HostMemory::anonymous(len)?).fresh())
        };
        let blocks = announced.iter().map(open).collect::<io::Result<Vec<_>>>()?;
        *self.0.lock().map_err(|_| "poisoned")? = blocks.clone();
        Ok(blocks)
    }
}

/// The hash of a page as it is now; the same in every process of this program.
pub(super) fn hash(block: &RamBlock, page: usize) -> u64 {
    let mut content = [0; PAGE];
    // A page outside of the block hashes as zeros here and as itself there: found as a difference.
    let _ = block.read_page(page, &mut content);
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(&content);
    hasher.finish()
}

/// The destination's process, seen from the demo.
pub(super) struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
    pub(super) uri: String,
}

impl Process {
    pub(super) fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["demo-destination", "--quiet"])
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

    /// The hashes of all pages that arrived, in order.
    pub(super) fn hashes(mut self) -> Result<Vec<u64>> {
        let mut bytes = Vec::new();
        self.stdout.read_to_end(&mut bytes)?;
        let status = self.child.wait()?;
        if !status.success() {
            return Err(format!("the destination failed ({status})").into());
        }
        Ok(bytes.as_chunks::<8>().0.iter().map(|hash| u64::from_be_bytes(*hash)).collect())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already, unless something went wrong on this side.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
