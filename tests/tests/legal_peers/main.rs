//! Every source that docs/wire.md calls legal is served, and the RAM that arrives is the RAM that
//! was sent, byte for byte.

#[cfg(test)]
mod channels;
#[cfg(test)]
mod endings;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod order;
#[cfg(test)]
mod single;
#[cfg(test)]
mod zero_pages;
