//! What a source sends, in order and lane by lane; and what can go wrong with it.

use std::time::Duration;

use crate::fill::Random;

/// One of a migration's connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lane {
    /// A multifd channel: its place in the recording, which need not be the number in its hello.
    Channel(u8),
    /// The section stream.
    Main,
}

/// One thing that a scripted source does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Connects. A lane that was not told to connects when it first sends.
    Connect(Lane),
    /// Ends the connection.
    HangUp(Lane),
    /// Does nothing for this long.
    Pause(Duration),
    /// Sends `bytes` on main again and again until the other side has acknowledged the switch-over.
    /// A source that waits for that does so.
    UntilAcknowledged(Vec<u8>),
    /// Sends all of `bytes`; `what` names them.
    Send {
        /// Where.
        lane: Lane,
        /// What the bytes are: `hello`, `packet`, `payload`, `flush`, ...
        what: &'static str,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// What a source does when the steps are over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// Ends every connection at once: without a return path it is done.
    HangUp,
    /// Keeps all connections until it hears SHUT or the other side hangs up.
    Wait,
}

/// A source's script.
#[derive(Clone, Debug)]
pub struct Recording {
    /// What it does, in order.
    pub steps: Vec<Step>,
    /// What it does then.
    pub ending: Ending,
}

impl Recording {
    /// A script of these writes on main.
    pub fn of_main(bytes: &[u8]) -> Self {
        let step = Step::Send { lane: Lane::Main, what: "bytes", bytes: bytes.to_vec() };
        Self { steps: vec![step], ending: Ending::Wait }
    }

    /// All bytes of a lane.
    pub fn bytes(&self, lane: Lane) -> Vec<u8> {
        self.writes(lane).flatten().copied().collect()
    }

    /// Where the writes of a lane end, in bytes from its start.
    pub fn boundaries(&self, lane: Lane) -> Vec<usize> {
        let sum = |end: &mut usize, bytes: &Vec<u8>| {
            *end += bytes.len();
            Some(*end)
        };
        self.writes(lane).scan(0, sum).collect()
    }

    /// Where in the steps the `nth` write called `what` is, from 0.
    pub fn position(&self, what: &str, nth: usize) -> usize {
        let is = |step: &Step| matches!(step, Step::Send { what: name, .. } if *name == what);
        let mut found = self.steps.iter().enumerate().filter(|(_, step)| is(step)).map(|(index, _)| index);
        found.nth(nth).unwrap_or_else(|| panic!("no {what} number {nth} in the recording"))
    }

    /// The bytes of the `nth` write called `what`, to be changed.
    pub fn write(&mut self, what: &str, nth: usize) -> &mut Vec<u8> {
        let position = self.position(what, nth);
        match self.steps.get_mut(position) {
            Some(Step::Send { bytes, .. }) => bytes,
            _ => unreachable!("position() finds writes"),
        }
    }

    /// Overwrites bytes of the `nth` write called `what`, from `at` on.
    #[must_use]
    pub fn patched(mut self, what: &str, nth: usize, at: usize, with: &[u8]) -> Self {
        let bytes = self.write(what, nth).get_mut(at..at + with.len());
        bytes.expect("the write is that long").copy_from_slice(with);
        self
    }

    /// Replaces the `nth` write called `what`.
    #[must_use]
    pub fn replaced(mut self, what: &str, nth: usize, with: &[u8]) -> Self {
        *self.write(what, nth) = with.to_vec();
        self
    }

    /// Puts steps before the `nth` write called `what`.
    #[must_use]
    pub fn preceded(mut self, what: &str, nth: usize, steps: impl IntoIterator<Item = Step>) -> Self {
        let position = self.position(what, nth);
        self.steps.splice(position..position, steps);
        self
    }

    /// Puts bytes before the `nth` write called `what`, on its lane.
    #[must_use]
    pub fn inserted(self, what: &str, nth: usize, bytes: &[u8]) -> Self {
        let lane = match self.steps.get(self.position(what, nth)) {
            Some(Step::Send { lane, .. }) => *lane,
            _ => unreachable!("position() finds writes"),
        };
        self.preceded(what, nth, [Step::Send { lane, what: "inserted", bytes: bytes.to_vec() }])
    }

    /// Leaves out the `nth` write called `what`.
    #[must_use]
    pub fn without(mut self, what: &str, nth: usize) -> Self {
        self.steps.remove(self.position(what, nth));
        self
    }

    /// Connects these lanes first, in this order.
    #[must_use]
    pub fn connecting(mut self, lanes: impl IntoIterator<Item = Lane>) -> Self {
        self.steps.splice(0..0, lanes.into_iter().map(Step::Connect));
        self
    }

    /// Sends every write in pieces of at most `len` bytes.
    #[must_use]
    pub fn in_pieces(self, len: usize) -> Self {
        let split = |step: Step| match step {
            Step::Send { lane, what, bytes } => {
                bytes.chunks(len).map(|piece| Step::Send { lane, what, bytes: piece.to_vec() }).collect()
            }
            other => vec![other],
        };
        Self { steps: self.steps.into_iter().flat_map(split).collect(), ..self }
    }

    /// Ends `lane` after `at` bytes; all others go on.
    #[must_use]
    pub fn cut(self, lane: Lane, at: usize) -> Self {
        let cut = self.stopped(lane, at);
        let last =
            |step: &Step| matches!(step, Step::Send { lane: of, .. } | Step::Connect(of) if *of == lane);
        let after = cut.steps.iter().rposition(last).map_or(0, |last| last + 1);
        let mut steps = cut.steps;
        steps.insert(after, Step::HangUp(lane));
        Self { steps, ..cut }
    }

    /// Sends nothing on `lane` after `at` bytes, but keeps it; all others go on.
    #[must_use]
    pub fn stopped(self, lane: Lane, at: usize) -> Self {
        let mut left = at;
        let shorten = |step: Step| match step {
            Step::Send { lane: of, what, mut bytes } if of == lane => {
                bytes.truncate(left);
                left -= bytes.len();
                // A lane without a byte connects nevertheless.
                if bytes.is_empty() { Step::Connect(lane) } else { Step::Send { lane, what, bytes } }
            }
            other => other,
        };
        Self { steps: self.steps.into_iter().map(shorten).collect(), ending: self.ending }
    }

    /// Changes, drops, doubles or inserts a few bytes somewhere, and then ends every connection.
    #[must_use]
    pub fn mutated(mut self, seed: u64) -> Self {
        let mut random = Random(seed);
        let total: usize = self.steps.iter().map(|step| step.bytes().len()).sum();
        for _ in 0..=random.below(3) {
            let mut at = random.below(total);
            for step in &mut self.steps {
                let Step::Send { bytes, .. } = step else { continue };
                if at < bytes.len() {
                    mutate(bytes, at, &mut random);
                    break;
                }
                at -= bytes.len();
            }
        }
        self.ending = Ending::HangUp;
        self
    }

    fn writes(&self, lane: Lane) -> impl Iterator<Item = &Vec<u8>> {
        self.steps.iter().filter_map(move |step| match step {
            Step::Send { lane: of, bytes, .. } if *of == lane => Some(bytes),
            _ => None,
        })
    }
}

impl Step {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Send { bytes, .. } => bytes,
            _ => &[],
        }
    }

    pub(super) fn is_send(&self) -> bool {
        matches!(self, Self::Send { .. })
    }

    pub(super) fn lane(&self) -> Option<Lane> {
        match self {
            Self::Send { lane, .. } => Some(*lane),
            _ => None,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Send { what, .. } => what,
            _ => "",
        }
    }
}

/// Values that break things more often than others do.
const NASTY: [u8; 8] = [0x00, 0xff, 0x7f, 0x80, 0x01, 0x04, 0x06, 0x7e];

fn mutate(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let len = 1 + random.below(8);
    let end = bytes.len().min(at + len);
    match random.below(5) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..end)),
        2 => {
            let piece = bytes.get(at..end).unwrap_or_default().to_vec();
            bytes.splice(at..at, piece);
        }
        3 => {
            let nasty = NASTY.get(random.below(NASTY.len())).copied().unwrap_or_default();
            bytes.iter_mut().skip(at).take(len).for_each(|byte| *byte = nasty);
        }
        _ => {
            let bit = random.below(8);
            bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << bit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Recording {
        let send = |lane, what, bytes: &[u8]| Step::Send { lane, what, bytes: bytes.to_vec() };
        let steps = vec![
            send(Lane::Channel(0), "hello", b"hello"),
            send(Lane::Main, "header", b"QEVM"),
            send(Lane::Channel(0), "packet", b"packet"),
            send(Lane::Main, "end", b"end"),
        ];
        Recording { steps, ending: Ending::Wait }
    }

    #[test]
    fn a_cut_ends_one_lane_at_any_byte() {
        let recording = sample();
        assert_eq!(recording.boundaries(Lane::Channel(0)), [5, 11]);
        for at in 0..=11 {
            let cut = recording.clone().cut(Lane::Channel(0), at);
            assert_eq!(cut.bytes(Lane::Channel(0)), &b"hellopacket"[..at]);
            assert_eq!(cut.bytes(Lane::Main), b"QEVMend");
            assert_eq!(cut.steps.iter().filter(|step| matches!(step, Step::HangUp(_))).count(), 1);
        }
    }

    #[test]
    fn writes_are_found_by_name_and_changed() {
        let changed = sample().patched("packet", 0, 1, b"O").inserted("end", 0, b"the ").without("hello", 0);
        assert_eq!(changed.bytes(Lane::Channel(0)), b"pOcket");
        assert_eq!(changed.bytes(Lane::Main), b"QEVMthe end");
    }

    #[test]
    fn mutations_are_many_and_repeatable() {
        let bytes = |seed| format!("{:?}", sample().mutated(seed).steps);
        assert_eq!(bytes(1), bytes(1));
        let different: std::collections::HashSet<_> = (0..100).map(bytes).collect();
        assert!(different.len() > 50, "{}", different.len());
    }
}
