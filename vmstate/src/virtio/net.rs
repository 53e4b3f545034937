//! Network devices.

use super::{Core, DeviceId, Kind};
use crate::{Buffer, Description, Device, Error, Fields, Hook, Subsections};

/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS.
const CTRL_GUEST_OFFLOADS: u32 = 2;
/// VIRTIO_NET_F_MQ.
const MQ: u32 = 22;
/// Most MAC addresses of the filter.
const MAX_MACS: u32 = 64;
/// Bytes of configuration space up to and with the number of queue pairs.
const CONFIG_WITH_PAIRS: usize = 10;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    /// Its MAC address.
    pub mac: Buffer<6>,
    /// A packet of the guest waits to be sent on the first queue.
    pub tx_waiting: u32,
    /// Received packets may be spread over several buffers.
    pub mergeable_rx_bufs: u32,
    /// Bit 0: the link is up. Bit 1: peers are to be told of the MAC address.
    pub status: u16,
    /// All packets are received.
    pub promisc: bool,
    /// All multicast packets are received.
    pub allmulti: bool,
    /// The MAC addresses of the filter.
    pub filter: Vec<Buffer<6>>,
    /// VLANs of the filter, a bit each.
    pub vlans: Buffer<512>,
    /// Packets have a virtio header on the host's side.
    pub has_vnet_hdr: u32,
    /// More multicast addresses than the filter has.
    pub multi_overflow: bool,
    /// More unicast addresses than the filter has.
    pub uni_overflow: bool,
    /// All unicast packets are received.
    pub alluni: bool,
    /// No multicast packets are received.
    pub nomulti: bool,
    /// No unicast packets are received.
    pub nouni: bool,
    /// No broadcast packets are received.
    pub nobcast: bool,
    /// The host can split UDP.
    pub has_ufo: bool,
    /// Of a device with more pairs of queues than one.
    pub multiqueue: Option<NetMultiqueue>,
    /// Offloads that the driver has chosen, if it may: with VIRTIO_NET_F_CTRL_GUEST_OFFLOADS.
    pub guest_offloads: Option<u64>,
    /// Receive side scaling.
    pub rss: Option<NetRss>,
}

/// Several pairs of queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetMultiqueue {
    /// Pairs that the device has.
    pub max_queue_pairs: u16,
    /// Pairs that the driver uses.
    pub current_queue_pairs: u16,
    /// A packet waits to be sent, on each queue but the first.
    pub tx_waiting: Vec<u32>,
}

/// Receive side scaling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetRss {
    /// It is on.
    pub enabled: bool,
    /// Packets are spread.
    pub redirect: bool,
    /// The hash is told.
    pub populate_hash: bool,
    /// What is hashed, a bit each.
    pub hash_types: u32,
    /// Queue of packets without a hash.
    pub default_queue: u16,
    /// The key.
    pub key: Buffer<40>,
    /// A queue for each value of the hash.
    pub indirections: Vec<u16>,
}

impl Net {
    /// A device that has so many pairs of queues.
    pub fn with_pairs(pairs: u16) -> Self {
        let several =
            NetMultiqueue { max_queue_pairs: pairs, current_queue_pairs: 1, tx_waiting: Vec::new() };
        Self { multiqueue: (pairs > 1).then_some(several), ..Self::default() }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self {
            mac: Buffer([0; 6]),
            tx_waiting: 0,
            mergeable_rx_bufs: 0,
            status: 1,
            promisc: true,
            allmulti: false,
            filter: Vec::new(),
            vlans: Buffer([0; 512]),
            has_vnet_hdr: 0,
            multi_overflow: false,
            uni_overflow: false,
            alluni: false,
            nomulti: false,
            nouni: false,
            nobcast: false,
            has_ufo: false,
            multiqueue: None,
            guest_offloads: None,
            rss: None,
        }
    }
}

impl Kind for Net {
    const DESCRIPTION: Description = Description::new("virtio-net", 11);
    const ID: DeviceId = DeviceId::NET;

    fn device(&mut self, core: &Core, fields: &mut Fields<'_>) -> Result<(), Error> {
        if fields.is_load() {
            let has_offloads = core.features_low & (1 << CTRL_GUEST_OFFLOADS) != 0;
            self.guest_offloads = has_offloads.then_some(0);
            if let Some([.., low, high]) = core.config.first_chunk::<CONFIG_WITH_PAIRS>()
                && u16::from_le_bytes([*low, *high]) > 1
            {
                self.multiqueue.get_or_insert_default();
            }
        }
        fields.field("net", self)
    }

    fn loaded(&mut self, core: &Core) -> Hook {
        match &self.multiqueue {
            Some(several) if several.current_queue_pairs > 1 && !core.has_feature(MQ) => Err(format!(
                "{} pairs of queues in use, without the feature VIRTIO_NET_F_MQ",
                several.current_queue_pairs
            )),
            _ => Ok(()),
        }
    }
}

impl Device for Net {
    const DESCRIPTION: Description = Description::new("virtio-net-device", 11);

    fn pre_load(&mut self) -> Hook {
        self.rss = None;
        Ok(())
    }

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("mac", &mut self.mac)?;
        fields.field("tx_waiting", &mut self.tx_waiting)?;
        fields.field("mergeable_rx_bufs", &mut self.mergeable_rx_bufs)?;
        fields.field("status", &mut self.status)?;
        fields.field("promisc", &mut self.promisc)?;
        fields.field("allmulti", &mut self.allmulti)?;
        self.filter(fields)?;
        fields.field("vlans", &mut self.vlans)?;
        fields.field("has_vnet_hdr", &mut self.has_vnet_hdr)?;
        fields.field("mac_table.multi_overflow", &mut self.multi_overflow)?;
        fields.field("mac_table.uni_overflow", &mut self.uni_overflow)?;
        fields.field("alluni", &mut self.alluni)?;
        fields.field("nomulti", &mut self.nomulti)?;
        fields.field("nouni", &mut self.nouni)?;
        fields.field("nobcast", &mut self.nobcast)?;
        fields.field("has_ufo", &mut self.has_ufo)?;
        if let Some(several) = &mut self.multiqueue {
            several.fields(fields)?;
        }
        match &mut self.guest_offloads {
            Some(offloads) => fields.field("curr_guest_offloads", offloads),
            None => Ok(()),
        }
    }

    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        subsections.optional(&mut self.rss)
    }
}

impl Net {
    fn filter(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut in_use = u32::try_from(self.filter.len()).unwrap_or(u32::MAX);
        fields.field("mac_table.in_use", &mut in_use)?;
        fields.validate("mac_table.in_use up to 64", in_use, in_use <= MAX_MACS)?;
        fields.counted("mac_table.macs", &mut self.filter, in_use)
    }
}

impl NetMultiqueue {
    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("max_queue_pairs", &mut self.max_queue_pairs)?;
        fields.field("curr_queue_pairs", &mut self.current_queue_pairs)?;
        let pairs = self.current_queue_pairs;
        let in_range = (1..=self.max_queue_pairs).contains(&pairs);
        fields.validate("curr_queue_pairs from 1 to max_queue_pairs", pairs, in_range)?;
        fields.counted("tx_waiting of further queues", &mut self.tx_waiting, pairs - 1)
    }
}

impl Default for NetRss {
    fn default() -> Self {
        Self {
            enabled: false,
            redirect: false,
            populate_hash: false,
            hash_types: 0,
            default_queue: 0,
            key: Buffer([0; 40]),
            indirections: Vec::new(),
        }
    }
}

impl Device for NetRss {
    const DESCRIPTION: Description = Description::new("virtio-net-device/rss", 1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("rss_data.enabled", &mut self.enabled)?;
        fields.field("rss_data.redirect", &mut self.redirect)?;
        fields.field("rss_data.populate_hash", &mut self.populate_hash)?;
        fields.field("rss_data.hash_types", &mut self.hash_types)?;
        let mut len = u16::try_from(self.indirections.len()).unwrap_or(u16::MAX);
        fields.field("rss_data.indirections_len", &mut len)?;
        fields.field("rss_data.default_queue", &mut self.default_queue)?;
        fields.field("rss_data.key", &mut self.key)?;
        fields.counted("rss_data.indirections_table", &mut self.indirections, len)
    }
}
