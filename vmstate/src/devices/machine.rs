//! The machine as a whole.

use crate::{Buffer, layout};

layout! {
    /// The run state of the VM when it was saved.
    pub struct GlobalState = "globalstate", version 1 {
        size: u32;
        runstate: Buffer<32>;
        has_vm_was_suspended: u8;
        vm_was_suspended: u8;
        unused: Buffer<66>;
    }
}
