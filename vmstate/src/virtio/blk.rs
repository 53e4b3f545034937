//! Disks.

use super::{Core, DeviceId, Kind};
use crate::{Description, Error, Fields, Value};

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blk {
    /// Requests that the device has taken and will begin again. There are none where the disk was
    /// let finish them before it was saved, as is usual.
    pub requests: Vec<BlkRequest>,
    /// The device offers packed rings, whose requests say how many descriptors they have.
    pub packed: bool,
}

/// A request in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkRequest {
    /// Its queue, of a disk with several.
    pub queue: u32,
    /// Descriptors, in a packed ring.
    pub descriptors: u32,
    /// Its addresses in guest memory, in the order of bytes and the layout of the host's processor.
    pub element: Box<[u8; BlkRequest::ELEMENT_LEN]>,
}

impl BlkRequest {
    /// Bytes of a request.
    pub const ELEMENT_LEN: usize = 49168;
}

impl Default for BlkRequest {
    fn default() -> Self {
        Self { queue: 0, descriptors: 0, element: Box::new([0; Self::ELEMENT_LEN]) }
    }
}

impl Kind for Blk {
    const DESCRIPTION: Description = Description::new("virtio-blk", 2);
    const ID: DeviceId = DeviceId::BLOCK;

    fn device(&mut self, core: &Core, fields: &mut Fields<'_>) -> Result<(), Error> {
        let (several, packed) = (core.queues.len() > 1, self.packed);
        let mut requests: Vec<_> =
            self.requests.drain(..).map(|request| InFlight { request, several, packed }).collect();
        let passed = fields.list_of("requests", &mut requests, || InFlight {
            request: BlkRequest::default(),
            several,
            packed,
        });
        self.requests = requests.into_iter().map(|in_flight| in_flight.request).collect();
        passed?;
        let queues = core.queues.len();
        let is_bad = |request: &&BlkRequest| request.queue as usize >= queues.max(1);
        match self.requests.iter().find(is_bad) {
            Some(bad) => Err(fields.wrong(
                format_args!("a request of queue {}", bad.queue),
                format_args!("one of {queues} queues"),
            )),
            None => Ok(()),
        }
    }
}

/// A request with what of the device its form depends on.
struct InFlight {
    request: BlkRequest,
    several: bool,
    packed: bool,
}

impl Value for InFlight {
    const KIND: &'static str = "request";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        if self.several {
            self.request.queue.pass(fields)?;
        }
        if self.packed {
            self.request.descriptors.pass(fields)?;
        }
        fields.bytes(self.request.element.as_mut_slice())
    }
}
