//! Snapshots: a guest goes to a file and comes back from one, as a plain stream and with
//! `mapped-ram`, with QEMU at the other end of the file and alone.

mod faults;
mod fixture;
mod journeys;
mod refusals;
