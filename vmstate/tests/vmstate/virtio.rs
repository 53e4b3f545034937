//! virtio devices against each other's rules and guest RAM.
