//! Where writes to guest memory are noted while it moves.

mod log;

pub use log::{DirtyLog, DirtyLogError};
