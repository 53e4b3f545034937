//! What no sound source sends: each ends with an error that names channel, field, value and limit,
//! in time, and nothing is left on disk that looks like a guest.

#[cfg(test)]
mod blocks;
#[cfg(test)]
mod command;
#[cfg(test)]
mod connections;
#[cfg(test)]
mod cuts;
#[cfg(test)]
mod dialect;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod last_moment;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod mutations;
#[cfg(test)]
mod packets;
#[cfg(test)]
mod payloads;
#[cfg(test)]
mod records;
#[cfg(test)]
mod sections;
#[cfg(test)]
mod strangers;
