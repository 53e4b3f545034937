//! DMA controllers of the ISA bus.

use crate::layout;

layout! {
    /// One of the two 8237 DMA controllers.
    pub struct Dma = "dma", version 1 {
        command: u8;
        mask: u8;
        flip_flop: u8;
        dshift: i32;
        regs: [DmaChannel; 4];
    }
}

layout! {
    /// One channel.
    pub struct DmaChannel = "dma_regs", version 1 {
        now: [i32; 2];
        base: [u16; 2];
        mode: u8;
        page: u8;
        pageh: u8;
        dack: u8;
        eop: u8;
    }
}
