//! Scripted ends of a migration: what QEMU never does, legal or not, against our own ends.
//!
//! ```text
//!   Memory ──> Recorder ──> Recording ──> Player ──sockets──> our destination (Trial, or the command)
//!   content    Style: the   writes in     connects, sends,
//!              legal ways   order, to     hangs up
//!                           be altered
//!
//!   our source (the engine, or the command) ──sockets──> Sink: reads, cuts, stalls, answers as it likes
//! ```
//!
//! The compressed payloads come from the libraries themselves and the deltas from plain loops, so
//! that no mistake of our codecs can hide behind its twin.

mod codec;
pub mod command;
pub mod devices;
mod lie;
mod memory;
mod messages;
mod packets;
mod player;
mod reading;
mod recorder;
mod recording;
mod sink;
mod socket;
mod style;
mod trial;

pub use codec::Codec;
pub use memory::{Memory, PAGE, PageAt};
pub use messages::Messages;
pub use packets::field;
pub use player::{Heard, Player};
pub use reading::Stage;
pub use recorder::Recorder;
pub use recording::{Ending, Lane, Recording, Step};
pub use sink::{Incoming, Sink};
pub use socket::Socket;
pub use style::{Style, SyncPackets, SyncPoints};
pub use trial::{Received, TIMEOUT, Trial, Verdict};
