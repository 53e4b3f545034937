//! Where writes to guest memory are noted while it moves.

mod log;
mod set;

pub use log::{DirtyLog, DirtyLogError};

pub(crate) use set::LogSet;
