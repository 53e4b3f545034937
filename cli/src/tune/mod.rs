//! `multifd tune SOURCE`: what a move of this memory will cost over a link, and what to set.
//!
//! ```text
//!  checkpoint, stream, live process ─> Memory ─ a sample of its pages ─> measured: kinds, codecs ─┐
//!                                         └ what is written again ─────> dirty rate, xbzrle ──────┤
//!  this machine ─ sockets, memory ────────────────────────────────────> measured: Machine ────────┤
//!                                         Findings <─ advice <─ predictions <─ model of a move <──┘
//!                                            └─> table, JSON, page with plots
//! ```

mod findings;
mod memory;
// The command does not call it yet.
#[cfg_attr(not(test), expect(dead_code, reason = "pages are written by `run`, once there are findings"))]
mod page;

use crate::flags::{Common, Tune};
use crate::outcome::Outcome;

/// Whatever stops it, in one line.
type Result<T> = std::result::Result<T, String>;

pub(crate) fn run(_flags: &Tune, _common: &Common) -> Outcome {
    Outcome::broken("not yet".to_owned())
}
