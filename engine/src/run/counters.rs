//! What a migration counts: one table, from which the counters, [`Progress`] and the keys of JSON
//! are made.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_utils::CachePadded;
use multifd_transports::Channel;
use serde::Serialize;

use crate::guest::PAGE;
use crate::run::fault_figures::FaultFigures;
use crate::run::stop::lock;

macro_rules! counters {
    (
        migration { $($(#[$of_migration:meta])* $migration:ident,)* }
        channel { $($(#[$of_channel:meta])* $channel:ident,)* }
    ) => {
        /// Plain numbers about a migration that is under way. All of them only grow, but for what
        /// is expected and for percentiles.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        #[non_exhaustive]
        pub struct Progress {
            $($(#[$of_migration])* pub $migration: u64,)*
            /// Bytes on the wire, all channels, both directions.
            pub wire_bytes: u64,
            /// Guest bytes that are still to be sent, as far as it is known: what was dirty at the
            /// last bitmap sync, without what went since. 0 at a destination.
            pub remaining_bytes: u64,
            /// Expected downtime if the guest were paused now, in µs. 0 before the end of the first
            /// round, and at a destination.
            pub expected_downtime_us: u64,
            /// Guest bytes with content per second in the last round. 0 as long as there is none.
            pub bandwidth_bytes_per_s: u64,
            $($(#[$of_channel])* pub $channel: u64,)*
            /// Waits of a guest's threads for pages in a post-copy, at the destination, that are
            /// over.
            pub faults: u64,
            /// Half of these waits were shorter, in µs, to within an eighth: from when a fault was
            /// heard of until its page was there.
            pub fault_p50_us: u64,
            /// 99 % of these waits were shorter.
            pub fault_p99_us: u64,
            /// The longest of these waits.
            pub fault_max_us: u64,
            /// The sum of these waits. Each thread's:
            /// [`PostcopyGuest::figures`](crate::PostcopyGuest::figures).
            pub blocktime_us: u64,
            /// Parallel channels; 0 while there is only the main one.
            pub channels: u64,
            /// What was counted on each channel. The first is main.
            pub per_channel: Vec<ChannelProgress>,
        }

        /// Plain numbers about one channel.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        #[non_exhaustive]
        pub struct ChannelProgress {
            /// `main`, or `channel 3`; for threads at a file, whose bytes are those of main,
            /// `thread 3`; `urgent` for pages that are asked for in a post-copy. A channel that was
            /// replaced in a post-copy comes once for each connection.
            pub name: String,
            /// Bytes sent.
            pub bytes_sent: u64,
            /// Bytes received.
            pub bytes_received: u64,
            $($(#[$of_channel])* pub $channel: u64,)*
        }

        /// The counters of a migration. Those of the migration itself are written by the thread of
        /// main.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $migration: AtomicU64,)*
            estimate: Mutex<Estimate>,
            /// Waits of a guest's threads for pages.
            pub(crate) faults: Mutex<FaultFigures>,
            pub(crate) main: ChannelCounters,
            parallel: Mutex<Vec<Arc<ChannelCounters>>>,
            /// Of a post-copy's channels for pages that are asked for, and of those that replaced
            /// parallel ones.
            later: Mutex<Vec<Arc<ChannelCounters>>>,
        }

        /// The counters of a [`ChannelCounters`].
        #[derive(Default)]
        pub(crate) struct PerChannel {
            $(pub(crate) $channel: AtomicU64,)*
        }

        impl Counters {
            /// The numbers now. `wire_bytes`: of all connections.
            pub(crate) fn read(&self, wire_bytes: u64) -> Progress {
                let mut progress = Progress {
                    $($migration: self.$migration.load(Ordering::Relaxed),)*
                    wire_bytes,
                    ..Progress::default()
                };
                let parallel = lock(&self.parallel);
                progress.channels = parallel.len() as u64;
                progress.per_channel.push(self.main.read());
                progress.per_channel.extend(parallel.iter().map(|channel| channel.read()));
                progress.per_channel.extend(lock(&self.later).iter().map(|channel| channel.read()));
                for channel in &progress.per_channel {
                    $(progress.$channel += channel.$channel;)*
                }
                lock(&self.estimate).clone().show_in(&mut progress);
                lock(&self.faults).show_in(&mut progress);
                progress
            }
        }

        impl ChannelCounters {
            fn read(&self) -> ChannelProgress {
                let (bytes_sent, bytes_received) = lock(&self.bytes).read();
                ChannelProgress {
                    name: self.name.clone(),
                    bytes_sent,
                    bytes_received,
                    $($channel: self.counters.$channel.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

counters! {
    migration {
        /// Bytes of guest RAM in all blocks. 0 until the list of blocks is known.
        ram_bytes,
        /// Passes over RAM (dirty sync count).
        rounds,
        /// Requests of a post-copy for pages that a guest waits for.
        requests,
        /// Pages that were asked for so, each as often as it was.
        pages_requested,
        /// Pages that came in a post-copy before anything asked for them, at the destination.
        pages_pushed,
        /// Pages that a post-copy's source has sent before they were asked for, because those
        /// before them were in order.
        neighbours_pushed,
        /// Pages that were asked for when they had gone already, and went again: the other copy was
        /// behind others.
        pages_repeated,
        /// New links of a post-copy whose link had gone.
        recoveries,
        /// New links of a pre-copy whose link had gone (`--resume-for`).
        resumptions,
        /// Guest bytes that were at the destination when a pre-copy went on over a new link, and
        /// would have gone again if it had begun anew: those of all such links. At the source.
        bytes_not_repeated,
    }
    channel {
        /// Packets with pages, of a parallel channel.
        packets,
        /// Pages that went with their content, compressed or not.
        pages_normal,
        /// Those of them that no codec makes shorter, and that went without one although there is
        /// one.
        pages_uncompressed,
        /// Pages that went as "is zero".
        pages_zero,
        /// Pages that went as a difference to their older content.
        pages_xbzrle,
        /// Microseconds in which pages were encoded, or decoded.
        codec_us,
        /// Bytes that this has saved on the wire.
        bytes_saved,
        /// System calls that were to send without copying.
        zero_copy_sends,
        /// Those of them that the kernel has copied after all.
        zero_copy_copied,
        /// Calls that had to be plain ones, because the kernel had no room to keep track of more.
        zero_copy_refused,
    }
}

/// The counters of one channel, written by its worker: on cache lines that no other worker writes.
pub(crate) struct ChannelCounters {
    name: String,
    bytes: Mutex<Bytes>,
    counters: CachePadded<PerChannel>,
}

/// The bytes of a channel, whose connection may be replaced by another.
#[derive(Default)]
struct Bytes {
    /// `None`: bytes are counted elsewhere, or the connection is gone.
    channel: Option<Arc<Channel>>,
    /// Over connections that are gone: sent, received.
    before: (u64, u64),
}

impl Bytes {
    /// Sent, received.
    fn read(&self) -> (u64, u64) {
        let (sent, received) = self.before;
        let now = self.channel.as_ref();
        now.map_or(self.before, |now| (sent + now.bytes_sent(), received + now.bytes_received()))
    }

    fn replace(&mut self, channel: Option<Arc<Channel>>) {
        self.before = self.read();
        self.channel = channel;
    }
}

/// What a source expects, as of the last bitmap sync.
#[derive(Clone, Debug, Default)]
pub(crate) struct Estimate {
    /// Dirty then.
    pub(crate) remaining_bytes: u64,
    pub(crate) bandwidth_bytes_per_s: u64,
    pub(crate) downtime_us: u64,
    /// Pages that had gone until then.
    pub(crate) pages_before: u64,
}

impl Estimate {
    fn show_in(self, progress: &mut Progress) {
        let pages = progress.pages_normal + progress.pages_zero + progress.pages_xbzrle;
        let gone = pages.saturating_sub(self.pages_before).saturating_mul(PAGE as u64);
        progress.remaining_bytes = self.remaining_bytes.saturating_sub(gone);
        progress.expected_downtime_us = self.downtime_us;
        progress.bandwidth_bytes_per_s = self.bandwidth_bytes_per_s;
    }
}

impl Counters {
    /// From now on this is what is expected.
    pub(crate) fn expect(&self, estimate: Estimate) {
        *lock(&self.estimate) = estimate;
    }

    /// Counts a parallel channel, with its bytes.
    pub(crate) fn channel(&self, id: u8, channel: &Arc<Channel>) -> Arc<ChannelCounters> {
        let name = format!("channel {id}");
        if lock(&self.parallel).iter().any(|known| known.name == name) {
            return self.replaced_channel(id, channel);
        }
        self.parallel(ChannelCounters::new(name).with_bytes_of(channel))
    }

    /// Counts a thread that moves pages between memory and a file; the bytes are main's.
    pub(crate) fn thread(&self, id: usize) -> Arc<ChannelCounters> {
        self.parallel(ChannelCounters::new(format!("thread {id}")))
    }

    /// Counts a channel for pages that are asked for, with its bytes.
    pub(crate) fn urgent(&self, channel: &Arc<Channel>) -> Arc<ChannelCounters> {
        self.late(ChannelCounters::new("urgent".to_owned()).with_bytes_of(channel))
    }

    /// Counts a channel that replaces parallel channel `id`, with its bytes.
    pub(crate) fn replaced_channel(&self, id: u8, channel: &Arc<Channel>) -> Arc<ChannelCounters> {
        self.late(ChannelCounters::new(format!("channel {id}")).with_bytes_of(channel))
    }

    fn late(&self, counters: ChannelCounters) -> Arc<ChannelCounters> {
        let counters = Arc::new(counters);
        lock(&self.later).push(Arc::clone(&counters));
        counters
    }

    fn parallel(&self, counters: ChannelCounters) -> Arc<ChannelCounters> {
        let counters = Arc::new(counters);
        lock(&self.parallel).push(Arc::clone(&counters));
        counters
    }

    /// Lets go of the connections that this end has closed; their bytes stay counted.
    pub(crate) fn retire_closed_channels(&self) {
        self.main.retire_closed();
        lock(&self.parallel).iter().chain(&*lock(&self.later)).for_each(|channel| channel.retire_closed());
    }

    /// Pages that have come or gone, in whatever form.
    pub(crate) fn pages(&self) -> u64 {
        let Progress { pages_normal, pages_zero, pages_xbzrle, .. } = self.read(0);
        pages_normal + pages_zero + pages_xbzrle
    }

    pub(crate) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}

impl ChannelCounters {
    fn new(name: String) -> Self {
        Self { name, bytes: Mutex::default(), counters: CachePadded::default() }
    }

    fn with_bytes_of(self, channel: &Arc<Channel>) -> Self {
        self.count_bytes_of(channel);
        self
    }

    /// From now on, what goes over `channel` counts here.
    pub(crate) fn count_bytes_of(&self, channel: &Arc<Channel>) {
        lock(&self.bytes).replace(Some(Arc::clone(channel)));
    }

    /// Lets go of the connection, if this end has closed it.
    fn retire_closed(&self) {
        let mut bytes = lock(&self.bytes);
        if bytes.channel.as_ref().is_some_and(|channel| channel.is_closed()) {
            bytes.replace(None);
        }
    }
}

impl Default for ChannelCounters {
    fn default() -> Self {
        Self::new("main".to_owned())
    }
}

impl Deref for ChannelCounters {
    type Target = PerChannel;

    fn deref(&self) -> &PerChannel {
        &self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_has_counted_what_its_channels_have() {
        let counters = Counters::default();
        let (main, [sender, _receiver]) =
            (Channel::pair().unwrap().0, <[_; 2]>::from(Channel::pair().unwrap()));
        let sender = Arc::new(sender);
        counters.main.count_bytes_of(&Arc::new(main));
        let channel = counters.channel(3, &sender);
        let thread = counters.thread(0);
        sender.send_all(&[1; 100]).unwrap();
        Counters::add(&counters.main.pages_zero, 5);
        Counters::add(&channel.pages_zero, 7);
        Counters::add(&channel.packets, 1);
        Counters::add(&thread.pages_normal, 11);
        Counters::add(&counters.rounds, 2);
        let progress = counters.read(100);
        assert_eq!((progress.pages_normal, progress.pages_zero, progress.packets), (11, 12, 1));
        assert_eq!((progress.rounds, progress.channels, progress.wire_bytes), (2, 2, 100));
        let shown: Vec<_> = progress
            .per_channel
            .iter()
            .map(|channel| (&channel.name[..], channel.bytes_sent, channel.pages_zero))
            .collect();
        assert_eq!(shown, [("main", 0, 5), ("channel 3", 100, 7), ("thread 0", 0, 0)]);
        assert_eq!(counters.pages(), 23);
    }

    #[test]
    fn bytes_of_a_connection_that_was_replaced_stay_counted_and_it_is_let_go_of() {
        let counters = Counters::default();
        for total in 1..=3 {
            let (ours, _theirs) = Channel::pair().unwrap();
            let ours = Arc::new(ours);
            counters.main.count_bytes_of(&ours);
            ours.send_all(&[1; 100]).unwrap();
            assert_eq!(counters.read(0).per_channel[0].bytes_sent, total * 100);
            counters.retire_closed_channels();
            assert_eq!(Arc::strong_count(&ours), 2, "it is open");
            ours.closer().close();
            counters.retire_closed_channels();
            assert_eq!(Arc::strong_count(&ours), 1);
            assert_eq!(counters.read(0).per_channel[0].bytes_sent, total * 100);
        }
    }

    #[test]
    fn channels_do_not_share_a_cache_line() {
        let counters = Counters::default();
        let at = |counters: &ChannelCounters| (&raw const **counters).addr();
        let (one, other) = (counters.thread(0), counters.thread(1));
        assert!(at(&one).abs_diff(at(&other)) >= align_of::<CachePadded<u8>>());
        assert!(size_of::<PerChannel>() <= align_of::<CachePadded<u8>>());
        assert_eq!(at(&one) % align_of::<CachePadded<u8>>(), 0);
    }
}
