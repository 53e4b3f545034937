//! Descriptions from outside of the crate: sections of real guests, releases of a device, and
//! arbitrary bytes.

mod corpus;
mod matrix;
mod properties;
mod real;
mod virtio;
