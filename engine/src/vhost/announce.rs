//! Who tells the network that a guest's address is elsewhere now.

/// VIRTIO_NET_F_GUEST_ANNOUNCE: the guest's driver sends the packets when the device asks it to.
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;

/// Who announces a guest's network address after the move. From it, switches learn
/// where the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// By the back-end, with SEND_RARP: nothing is left to do.
    ByBackEnd,
    /// None but the embedder can: send a packet from the guest's address (RARP, as QEMU does) into
    /// its network.
    ByEmbedder,
    /// The guest has negotiated GUEST_ANNOUNCE: set VIRTIO_NET_S_ANNOUNCE in the device's status
    /// and interrupt it.
    ByGuest,
}
