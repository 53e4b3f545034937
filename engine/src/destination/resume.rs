//! A pre-copy whose link broke: what this end keeps, and how it knows its source again. Spec:
//! docs/wire.md §27.11.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_transports::Channel;
use multifd_wire::{BlockEntry, Command, Configuration, Item, MigrationId, ResumeOpening, ReturnMessage};

use super::place::{BlockSinks, DigestsDiffer, IncomingRam};
use super::return_path::ReturnPath;
use super::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::RamBlock;
use crate::run::secret::{self, KeyPair, Nonces, Prover, Secret, random};
use crate::run::stop::lock;
use crate::stream::vm_state::VmState;

/// Links that end because of what came over them: more are no accident.
const MOST_DAMAGED: usize = 16;

/// Connections that may introduce themselves at a time. A source makes one, strangers the others.
const MOST_CANDIDATES: usize = 16;

/// What outlives a link.
pub(super) struct Resumption {
    /// How long there may be no link.
    limit: Duration,
    id: MigrationId,
    keys: KeyPair,
    kept: Mutex<Kept>,
    candidates: Arc<()>,
}

#[derive(Default)]
struct Kept {
    /// From the source's word on that it would go on over another link.
    secret: Option<Secret>,
    sinks: Option<Arc<BlockSinks>>,
    vm: Option<VmState>,
    /// The value of the last PING behind a round that was answered.
    settled: u32,
    /// By which the source has authenticated itself, if it has.
    certificate: Option<Vec<u8>>,
    damaged: usize,
    outage: Option<Outage>,
}

/// A time without a link that moved pages.
#[derive(Clone)]
struct Outage {
    since: Instant,
    /// Pages that had come by then.
    pages: u64,
    cause: String,
}

/// A connection that introduces itself, as long as this lives.
pub(super) struct Candidate(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

impl Resumption {
    pub(super) fn new(limit: Duration) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            limit,
            id: MigrationId(random()?),
            keys: KeyPair::new()?,
            kept: Mutex::default(),
            candidates: Arc::default(),
        }))
    }

    /// What the source knows the migration by.
    pub(super) fn id(&self) -> MigrationId {
        self.id
    }

    /// The source would go on over another link, and has this public key; ours.
    ///
    /// # Errors
    /// It has said so before, or the key is none.
    pub(super) fn agree(&self, key: [u8; secret::LEN]) -> Result<[u8; secret::LEN]> {
        let secret = self.keys.secret(key, self.id)?;
        if lock(&self.kept).secret.replace(secret).is_some() {
            let detail = "a second offer to go on over another link";
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        Ok(self.keys.public())
    }

    /// The memory that pages go to over this link, and the next.
    pub(super) fn keep(&self, sinks: &Arc<BlockSinks>) {
        lock(&self.kept).sinks = Some(Arc::clone(sinks));
    }

    /// The memory that pages went to over the last link.
    pub(super) fn kept(&self) -> Option<Arc<BlockSinks>> {
        lock(&self.kept).sinks.clone()
    }

    /// What the source's embedder has said of its VM.
    pub(super) fn note_vm(&self, vm: &VmState) {
        lock(&self.kept).vm.get_or_insert_with(|| vm.clone());
    }

    /// The client at the other end of main is the source.
    pub(super) fn note_source(&self, main: &Channel) {
        lock(&self.kept).certificate = main.client_certificate().map(<[u8]>::to_vec);
    }

    /// The source switches to post-copy: what breaks from now on is not replaced so.
    pub(super) fn end(&self) {
        lock(&self.kept).secret = None;
    }

    /// A PING behind a round is about to be answered: what has come so far needs no further proof.
    pub(super) fn settle(&self, ping: u32) {
        let mut kept = lock(&self.kept);
        kept.settled = ping;
        if let Some(sinks) = &kept.sinks {
            sinks.forget_recent();
        }
    }

    /// Whether another link may do better than the one that ended so, and the source would make it.
    pub(super) fn goes_on_after(&self, cause: &Error) -> bool {
        let kept = lock(&self.kept);
        let agreed = kept.secret.is_some() && kept.sinks.is_some();
        let another_may = (cause.is_of_the_link() || is_damage(cause)) && !is_different(cause);
        agreed && another_may && (!is_damage(cause) || kept.damaged < MOST_DAMAGED)
    }

    /// A link has ended because of `cause`, when so many pages had come.
    pub(super) fn begin_outage(&self, cause: &Error, pages: u64) {
        let mut kept = lock(&self.kept);
        kept.damaged += usize::from(is_damage(cause));
        if kept.outage.as_ref().is_none_or(|outage| outage.pages < pages) {
            kept.outage = Some(Outage { since: Instant::now(), pages, cause: cause.chain() });
        }
    }

    /// What is left of the time without a link.
    ///
    /// # Errors
    /// Nothing.
    pub(super) fn left(&self) -> Result<Duration> {
        let outage = lock(&self.kept).outage.clone();
        let outage = outage.ok_or_else(|| Error::bug(Phase::Accept, "a link is waited for that is there"))?;
        let left = self.limit.checked_sub(outage.since.elapsed()).filter(|left| !left.is_zero());
        left.ok_or_else(|| {
            let (limit, cause) = (self.limit, outage.cause);
            let detail =
                format!("the source has not come back within {limit:?} after its link broke: {cause}");
            Error::new(ErrorKind::Deadline, Phase::Accept, detail)
        })
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Counts a connection that introduces itself.
    pub(super) fn candidate(&self) -> Result<Candidate> {
        let candidate = Arc::clone(&self.candidates);
        if Arc::strong_count(&self.candidates) <= MOST_CANDIDATES + 1 {
            return Ok(Candidate(candidate));
        }
        let detail = format!("more than {MOST_CANDIDATES} connections that would go on with a migration");
        Err(Error::misbehaved(Phase::Accept, detail))
    }

    /// Has the other end of `channel` prove that it is the source of this migration.
    ///
    /// # Errors
    /// It is not, or the connection broke.
    pub(super) fn admit(&self, channel: &Channel, opening: &ResumeOpening) -> Result<()> {
        let kept = lock(&self.kept);
        if kept.certificate.as_deref() != channel.client_certificate() {
            let detail = "another certificate than that of the source: it is another's";
            return Err(Error::misbehaved(Phase::Accept, detail));
        }
        let none = || Error::bug(Phase::Accept, "a source is to prove a secret that there is not");
        let secret = kept.secret.clone().ok_or_else(none)?;
        drop(kept);
        let nonces = Nonces { source: opening.nonce, destination: random()? };
        let mut said = Vec::new();
        let proof = secret.proof(Prover::Destination, nonces)?;
        ReturnMessage::Challenge { nonce: nonces.destination, proof }.encode(&mut said);
        let io = |error| Error::io(Phase::Accept, "asking for a proof of which migration it is", error);
        channel.send_all(&said).map_err(io)?;
        let mut expected = Vec::new();
        Item::Command(Command::Proof([0; secret::LEN])).encode(&mut expected);
        let mut answer = vec![0; expected.len()];
        channel.recv_exact(&mut answer).map_err(io)?;
        let proof = match Item::parse(&answer).map_err(|invalid| Error::invalid(Phase::Accept, invalid))? {
            Some((Item::Command(Command::Proof(proof)), _)) => proof,
            _ => return Err(Error::misbehaved(Phase::Accept, "another answer than a proof")),
        };
        if secret.is_proved(Prover::Source, nonces, &proof)? {
            return Ok(());
        }
        let detail = "the source of another guest: it does not know the secret of this migration";
        Err(Error::misbehaved(Phase::Accept, detail))
    }

    /// Tells the source what has come.
    pub(super) fn tell_standing(&self, return_path: &ReturnPath) -> Result<()> {
        let (settled, sinks) = {
            let kept = lock(&self.kept);
            (kept.settled, kept.sinks.clone())
        };
        let sinks = sinks.ok_or_else(|| Error::bug(Phase::Setup, "no memory to tell of"))?;
        return_path.send(Phase::Setup, &ReturnMessage::Standing(settled))?;
        sinks.all().try_for_each(|sink| return_path.send_bitmap(sink.block().name(), &sink.recent()))
    }
}

/// What came over the link is not what was sent, as far as can be seen.
fn is_damage(cause: &Error) -> bool {
    matches!(cause.kind(), ErrorKind::Codec | ErrorKind::InvalidStream) && !is_different(cause)
}

/// What was placed is not what was sent: no link helps.
fn is_different(cause: &Error) -> bool {
    std::error::Error::source(cause).is_some_and(<dyn std::error::Error>::is::<DigestsDiffer>)
}

/// Tells the source of a migration that is not known here that it is not.
pub(super) fn say_not_known(channel: &Channel) -> Error {
    let mut said = Vec::new();
    ReturnMessage::NotKnown.encode(&mut said);
    let told = channel.send_all(&said);
    let error =
        Error::misbehaved(Phase::Accept, "the source of a migration that is not known here, any more or yet");
    match told {
        Ok(()) => error,
        Err(cause) => error.because(cause),
    }
}

/// The memory of a guest of which something has come.
pub(super) struct OpenAlready(pub(super) Arc<Resumption>);

type Refusal = Box<dyn std::error::Error + Send + Sync>;

impl IncomingRam for OpenAlready {
    fn configure(&mut self, name: &str, version: u32, state: &[u8]) -> Result<(), Refusal> {
        let kept = lock(&self.0.kept);
        let same = |vm: &VmState| vm.name == name && vm.version == version && vm.bytes == state;
        if kept.vm.as_ref().is_some_and(same) {
            Ok(())
        } else {
            Err("it is another than over the last link".into())
        }
    }

    fn open(&mut self, _: &Configuration, _: &[BlockEntry]) -> Result<Vec<RamBlock>, Refusal> {
        Err("the memory is there already".into())
    }
}

impl DestinationShared {
    /// The memory that pages went to over the last link, checked to be what is announced again.
    pub(super) fn kept_sinks(&self, announced: &[BlockEntry]) -> Result<Option<Arc<BlockSinks>>> {
        let Some(sinks) = self.resumption.as_ref().filter(|_| self.resumed).and_then(|kept| kept.kept())
        else {
            return Ok(None);
        };
        let same = |entry: &BlockEntry| {
            sinks.find(entry.name.as_str()).is_ok_and(|sink| sink.block().used_len() == entry.used_len)
        };
        if announced.len() != sinks.len() || !announced.iter().all(same) {
            let detail = "other RAM blocks than over the last link";
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        sinks.begin_link();
        Ok(Some(sinks))
    }
}
