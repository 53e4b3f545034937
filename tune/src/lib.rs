//! The cost of moving a guest, predicted from a sample of its memory, and the settings that suit
//! it.
//!
//! ```text
//!  checkpoint, stream, live process ─> Memory ─ a sample of its pages ─> measured: kinds, codecs ─┐
//!                                         └ pages written again ───────> dirty rate, xbzrle ──────┤
//!  this machine ─ sockets, memory ────────────────────────────────────> measured: Machine ────────┤
//!                                         Findings <─ advice <─ predictions <─ model of a move <──┘
//!                                            └─> text, JSON (serde), page with plots
//! ```
//!
//! [`find`] does all of it for a [`Config`]. docs/tuning.md has the method, the formulas and how
//! well they predict.

mod advice;
mod at_rest;
mod config;
mod curves;
mod error;
mod find;
mod findings;
mod kinds;
mod levels;
mod machine;
mod measure;
mod memory;
mod model;
mod page;
mod page_states;
mod predict;
mod rewrites;
mod sample;
mod table;
mod units;

pub use at_rest::AtRest;
pub use config::{Config, Link, Progress, Source};
pub use error::{Error, ProcessError, Result};
pub use find::find;
pub use findings::{
    Advice, Bottleneck, CodecFacts, Curve, Curves, DirtyFacts, DirtyOrigin, Findings, Machine, PageKinds,
    Prediction, QmpCommand, SampleFacts, XbzrleFacts,
};
pub use page::html;
pub use page_states::{Before, PageStates, TooManyPages};
pub use table::text;
pub use units::show_bytes;
