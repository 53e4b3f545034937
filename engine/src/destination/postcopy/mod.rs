//! The guest runs here, its RAM follows. Spec: docs/wire.md §15; for embedders: docs/postcopy.md.
//!
//! ```text
//!  driver ── LISTEN ─> listen: memory is armed ── RUN ─> serving ── END, EOF ─> all of RAM is here
//!                                                         ^   │ the link breaks
//!                                                recover ─┘   └─> paused: nothing is lost
//! ```

pub(super) mod at_rest;
mod faults;
mod link;
pub(super) mod listen;
pub(super) mod package;
pub(super) mod parallel;
pub(super) mod recover;
pub(super) mod running;
pub(super) mod serving;
mod shared_faults;
pub(super) mod urgent;

/// Where the guest of a post-copy is while its RAM follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// At the source: one that may switch is refused.
    NoPostcopy,
    /// Here: its threads wait for pages.
    Here,
    /// Nowhere: it is kept, and no page is waited for.
    AtRest,
}
