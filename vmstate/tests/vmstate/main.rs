//! Descriptions from outside of the crate: sections of real guests, releases of a device, and
//! arbitrary bytes.

#[cfg(test)]
mod corpus;
#[cfg(test)]
mod matrix;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod real;
#[cfg(test)]
mod virtio;
