//! What a send worker does next: pages that are wanted now, then a batch from the round's cursor.
//!
//! ```text
//!  a request -> UrgentPages (bounded, a page once) --.
//!                                                    v
//!                                 worker <- Next::claim <- Round: the cursor over the dirty bits
//! ```
//!
//! The dirty bit decides who sends a page, whichever way a worker came upon it: the worker that
//! clears the bit. A request only changes the order, so that one that is lost costs time and no
//! page.

mod blocks;
mod host_pages;
mod next;
mod round;
mod urgent;

pub use blocks::{BlockIndex, PerBlock};
pub use next::{Next, Origin, Place};
pub use round::{Batch, Claim, Round};
pub use urgent::{Requested, UrgentPages, WantedPage};

pub(crate) use host_pages::{HostPages, ScanPlace};
