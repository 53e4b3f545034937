//! Which codec a channel's next packet has, decided from what was measured: no clock, no threads.
//!
//! What a byte of a guest costs by a codec is the longer of two times: encoding it and handing it
//! to the kernel, on the channel's thread, and what is left of it on the link. The first is
//! measured where the codec is used. The second shows when the thread waits for the link; as long
//! as it does not, the link may be faster than anything that was seen.

use std::fmt;
use std::time::Duration;

/// A packet that has gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Bytes of pages in it.
    pub(super) content: usize,
    /// Bytes that went.
    pub(super) wire: usize,
    pub(super) encode: Duration,
    /// In the kernel, waits for the link included.
    pub(super) send: Duration,
    /// Since the packet before it.
    pub(super) all: Duration,
}

/// A change of codec, with the numbers it was made from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    pub(super) from: String,
    pub(super) to: String,
    /// Nanoseconds that a KiB of the guest takes, as it is expected.
    before: f64,
    after: f64,
    /// Share of the time for which the channel waited for the link.
    waited: f64,
}

/// Chooses among codecs in the order of what they cost.
pub(super) struct Chooser {
    candidates: Vec<Candidate>,
    current: usize,
    /// Packets since another one than the current was tried.
    untried: u32,
    /// The last one that was tried was cheaper than the current.
    tried_cheaper: bool,
    window: Window,
    /// The least that a byte has taken in the kernel, in ns: more is a wait.
    kernel: Option<f64>,
    /// What a byte of content takes beside the codec and the kernel, in ns: copies and hashes.
    copies: f64,
    /// By how much the link is taken to become faster in a window without a wait.
    hope: f64,
    /// Windows since the last change to a cheaper codec, as long as no other followed.
    since_cheaper: Option<u32>,
    /// What a byte takes on the link, in ns; `None` as long as the channel has not waited for it.
    link: Option<f64>,
    /// Share of the last window's time that was waited for the link.
    waited: f64,
}

struct Candidate {
    name: String,
    /// ns a byte of content, to encode.
    encode: Option<f64>,
    /// Bytes on the wire, for a byte of content.
    ratio: f64,
    /// What it took on the thread by what was expected.
    correction: f64,
}

/// What was measured since the last decision.
#[derive(Default)]
struct Window {
    packets: u32,
    content: f64,
    wire: f64,
    encode: f64,
    send: f64,
    all: f64,
}

/// Packets between two decisions: 8 MiB of guest.
const WINDOW: u32 = 16;

/// Packets between two looks at another codec than the current.
const TRY_AFTER: u32 = 64;

/// How much faster the link may have become in a window without a wait, at the most and at the
/// least.
const MOST_HOPE: f64 = 0.02;
const LEAST_HOPE: f64 = 0.001;

/// Windows after which a change to a cheaper codec was right.
const PROVEN: u32 = 8;

/// Share of the time spent waiting from which on the link is the limit.
const WAITS: f64 = 0.1;

/// A change must promise this much.
const WORTH: f64 = 0.96;

impl Chooser {
    /// `names`: the codecs, cheapest first. There is at least one.
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let candidate = |name| Candidate { name, encode: None, ratio: 1.0, correction: 1.0 };
        Self {
            candidates: names.into_iter().map(candidate).collect(),
            current: 0,
            untried: 0,
            tried_cheaper: false,
            window: Window::default(),
            kernel: None,
            copies: 0.0,
            hope: MOST_HOPE,
            since_cheaper: None,
            link: None,
            waited: 0.0,
        }
    }

    /// The codec of the next packet, by its place in the list.
    pub(super) fn next(&mut self) -> usize {
        self.untried += 1;
        if !self.is_known(self.current) {
            return self.current;
        }
        // A dearer one is of use only where the link is waited for.
        let dearer =
            Some(self.current + 1).filter(|dearer| *dearer < self.candidates.len() && self.waited > WAITS);
        if let Some(dearer) = dearer.filter(|dearer| !self.is_known(*dearer)) {
            return dearer;
        }
        if self.untried < TRY_AFTER {
            return self.current;
        }
        self.untried = 0;
        self.tried_cheaper = !self.tried_cheaper;
        let cheaper = self.current.checked_sub(1);
        let (first, second) = if self.tried_cheaper { (cheaper, dearer) } else { (dearer, cheaper) };
        first.or(second).unwrap_or(self.current)
    }

    /// A packet of the codec at this place has gone.
    pub(super) fn record(&mut self, codec: usize, packet: Measured) -> Option<Change> {
        let (content, wire) = (packet.content as f64, packet.wire as f64);
        if content == 0.0 || wire == 0.0 {
            return None;
        }
        let send = nanos(packet.send);
        let per_byte = send / wire;
        self.kernel = Some(self.kernel.map_or(per_byte, |least| per_byte.min(least)));
        if let Some(candidate) = self.candidates.get_mut(codec) {
            candidate.learn(nanos(packet.encode) / content, wire / content);
        }
        if codec != self.current {
            return None;
        }
        let window = &mut self.window;
        window.packets += 1;
        window.content += content;
        window.wire += wire;
        window.encode += nanos(packet.encode);
        window.send += send;
        window.all += nanos(packet.all).max(send);
        if window.packets < WINDOW { None } else { self.decide() }
    }

    fn decide(&mut self) -> Option<Change> {
        let window = std::mem::take(&mut self.window);
        let kernel = self.kernel.unwrap_or(0.0);
        self.waited = ((window.send - kernel * window.wire) / window.all.max(1.0)).max(0.0);
        let seen = window.all / window.wire;
        let others = (window.all - window.encode - window.send).max(0.0) / window.content;
        self.copies = if self.copies == 0.0 { others } else { 0.75 * self.copies + 0.25 * others };
        if self.waited > WAITS {
            // All the time the link was busy.
            self.link = Some(self.link.map_or(seen, |link| 0.5 * link + 0.5 * seen));
        } else {
            // It may have become faster, and does at least what was seen.
            self.link = self.link.map(|link| (link * (1.0 - self.hope)).min(seen));
            self.correct(window.all / window.content);
        }
        self.since_cheaper =
            self.since_cheaper.map(|windows| windows + 1).filter(|windows| *windows < PROVEN);
        let before = self.expected(self.current)?;
        let known = (0..self.candidates.len()).filter_map(|codec| Some((codec, self.expected(codec)?)));
        let (best, after) = known.min_by(|one, other| one.1.total_cmp(&other.1))?;
        if best == self.current || after > before * WORTH {
            return None;
        }
        let name =
            |codec: usize| self.candidates.get(codec).map_or("none", |candidate| &candidate.name).to_owned();
        let (from, to) = (name(self.current), name(best));
        self.learn_to_hope(best < self.current);
        self.current = best;
        self.untried = 0;
        Some(Change { from, to, before: before * 1024.0, after: after * 1024.0, waited: self.waited })
    }

    /// A change to a cheaper codec that is soon taken back was made in hope of a faster link, in
    /// vain.
    fn learn_to_hope(&mut self, cheaper: bool) {
        match (cheaper, self.since_cheaper.take()) {
            (true, _) => self.since_cheaper = Some(0),
            (false, Some(_)) => self.hope = (self.hope / 2.0).max(LEAST_HOPE),
            (false, None) => self.hope = MOST_HOPE,
        }
    }

    /// What was not thought of shows in the sum: a destination that is slow to decode, a core that
    /// others use.
    fn correct(&mut self, took: f64) {
        let expected = self.here(self.current);
        for candidate in &mut self.candidates {
            candidate.correction += (1.0 - candidate.correction) * 0.02;
        }
        let (Some(expected), Some(candidate)) = (expected, self.candidates.get_mut(self.current)) else {
            return;
        };
        let correction = candidate.correction * took / expected.max(0.001);
        candidate.correction = (0.7 * candidate.correction + 0.3 * correction).clamp(0.5, 3.0);
    }

    /// ns that a byte of content takes by this codec; `None` before it was measured.
    fn expected(&self, codec: usize) -> Option<f64> {
        let candidate = self.candidates.get(codec)?;
        Some(self.here(codec)?.max(candidate.ratio * self.link.unwrap_or(0.0)))
    }

    /// The same on the channel's thread alone.
    fn here(&self, codec: usize) -> Option<f64> {
        let candidate = self.candidates.get(codec)?;
        let work = candidate.encode? + candidate.ratio * self.kernel? + self.copies;
        Some(work * candidate.correction)
    }

    fn is_known(&self, codec: usize) -> bool {
        self.candidates.get(codec).is_some_and(|candidate| candidate.encode.is_some())
    }
}

impl Candidate {
    fn learn(&mut self, encode: f64, ratio: f64) {
        match self.encode {
            None => (self.encode, self.ratio) = (Some(encode), ratio),
            Some(known) => {
                self.encode = Some(0.75 * known + 0.25 * encode);
                self.ratio = 0.75 * self.ratio + 0.25 * ratio;
            }
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, before, after, waited } = self;
        write!(
            f,
            "{to} instead of {from}: {after:.0} ns a KiB expected, {before:.0} before; {:.0} % of the time the link was waited for",
            waited * 100.0
        )
    }
}

fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ns to encode a byte, and bytes on the wire for 1000 of them: of the pages of a Linux guest,
    /// none, lz4, zstd 1, 3, 9.
    const LINUX: [(f64, usize); 5] = [(0.0, 1000), (0.6, 470), (1.34, 320), (2.2, 300), (10.7, 283)];
    /// Of pages that do not compress.
    const RANDOM: [(f64, usize); 5] = [(0.0, 1000), (0.3, 1000), (0.8, 1000), (0.9, 1000), (4.0, 1000)];
    const NAMES: [&str; 5] = ["none", "lz4", "zstd:1", "zstd:3", "zstd:9"];

    const PACKET: usize = 512 << 10;
    /// What copies and hashes take before a packet is encoded, and the kernel with each byte.
    const COPY: f64 = 0.15;
    const KERNEL: f64 = 0.25;
    /// What the sockets hold, in bytes.
    const BUFFER: f64 = 4e6;

    /// A channel in virtual time: the link drains what is in the sockets while the next packet is
    /// encoded.
    #[derive(Default)]
    struct Channel {
        held: f64,
        /// ns that have passed, and those of them at work.
        time: f64,
        work: f64,
    }

    impl Channel {
        /// `link`: ns a byte.
        fn send(&mut self, (encode, ratio): (f64, usize), link: f64) -> Measured {
            let (content, begun) = (PACKET as f64, self.time);
            let bytes = PACKET * ratio / 1000 + 1344;
            let wire = bytes as f64;
            self.pass(content * (COPY + encode), link);
            let kernel = wire * KERNEL;
            self.pass(kernel, link);
            self.work += content * (COPY + encode) + kernel;
            self.held += wire;
            let wait = ((self.held - BUFFER) * link).max(0.0);
            self.pass(wait, link);
            let ns = |time: f64| Duration::from_secs_f64(time / 1e9);
            Measured {
                content: PACKET,
                wire: bytes,
                encode: ns(content * encode),
                send: ns(kernel + wait),
                all: ns(self.time - begun),
            }
        }

        fn pass(&mut self, time: f64, link: f64) {
            self.time += time;
            self.held = (self.held - time / link.max(1e-9)).max(0.0);
        }

        /// The last byte has left.
        fn end(mut self, link: f64) -> (f64, f64) {
            let held = self.held;
            self.pass(held * link, link);
            (self.time, self.work)
        }
    }

    /// Time and work of a guest of so many packets by one codec.
    fn fixed(memory: &[(f64, usize)], codec: usize, links: &[(u32, f64)]) -> (f64, f64) {
        let mut channel = Channel::default();
        for (packets, link) in links {
            (0..*packets).for_each(|_| _ = channel.send(memory[codec], *link));
        }
        channel.end(links.last().unwrap().1)
    }

    /// The same as the chooser has it, and its changes.
    fn chosen(memory: &[(f64, usize)], links: &[(u32, f64)]) -> ((f64, f64), Vec<Change>) {
        let (mut channel, mut changes) = (Channel::default(), Vec::new());
        let mut chooser = Chooser::new(NAMES.map(str::to_owned));
        for (packets, link) in links {
            for _ in 0..*packets {
                let codec = chooser.next();
                changes.extend(chooser.record(codec, channel.send(memory[codec], *link)));
            }
        }
        (channel.end(links.last().unwrap().1), changes)
    }

    /// ns a byte at so many Gbit/s.
    fn at(gigabits: f64) -> f64 {
        8.0 / gigabits
    }

    fn best(memory: &[(f64, usize)], links: &[(u32, f64)]) -> f64 {
        (0..NAMES.len()).map(|codec| fixed(memory, codec, links).0).fold(f64::MAX, f64::min)
    }

    #[test]
    fn it_is_about_as_fast_as_the_best_fixed_codec_on_every_link_and_memory() {
        for (name, memory) in [("linux", LINUX), ("random", RANDOM)] {
            for gigabits in [0.1, 0.3, 1.0, 3.0, 10.0, 25.0, 100.0] {
                // 2 GiB of pages that are not zero.
                let links = [(4096, at(gigabits))];
                let ((time, _), changes) = chosen(&memory, &links);
                let best = best(&memory, &links);
                assert!(
                    time < best * 1.05,
                    "{name} at {gigabits} Gbit/s: {:.3} of the best; {changes:?}",
                    time / best
                );
            }
        }
    }

    #[test]
    fn on_a_link_that_changes_it_is_faster_than_every_fixed_codec() {
        let links = [(2000, at(20.0)), (2000, at(0.5)), (2000, at(20.0))];
        let ((time, _), changes) = chosen(&LINUX, &links);
        assert!(time < best(&LINUX, &links), "{changes:?}");
        assert!((2..40).contains(&changes.len()), "{changes:?}");
    }

    #[test]
    fn pages_that_do_not_compress_cost_no_work_of_a_codec() {
        let links = [(4096, at(1.0))];
        let ((_, work), _) = chosen(&RANDOM, &links);
        let (_, plain) = fixed(&RANDOM, 0, &links);
        assert!(work < plain * 1.1, "{:.2}", work / plain);
    }

    #[test]
    fn dearer_codecs_are_not_tried_where_the_link_is_not_waited_for() {
        let mut chooser = Chooser::new(NAMES.map(str::to_owned));
        let mut channel = Channel::default();
        for _ in 0..1000 {
            let codec = chooser.next();
            assert_eq!(codec, 0);
            chooser.record(codec, channel.send(LINUX[codec], 0.0));
        }
    }

    #[test]
    fn a_change_says_what_it_was_made_from() {
        let (_, changes) = chosen(&LINUX, &[(200, at(1.0))]);
        let text = changes.first().unwrap().to_string();
        assert!(
            text.starts_with("lz4 instead of none: ") && text.contains(" % of the time the link"),
            "{text}"
        );
    }

    #[test]
    fn a_single_codec_and_empty_packets_are_no_reason_to_panic() {
        let mut chooser = Chooser::new(["none".to_owned()]);
        let empty = Measured {
            content: 0,
            wire: 0,
            encode: Duration::ZERO,
            send: Duration::ZERO,
            all: Duration::ZERO,
        };
        let still = Measured { content: 1, wire: 1, ..empty };
        for packet in [empty, still].into_iter().cycle().take(200) {
            assert_eq!(chooser.next(), 0);
            assert_eq!(chooser.record(0, packet), None);
        }
    }
}
