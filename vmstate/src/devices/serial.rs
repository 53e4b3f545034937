//! 16550 serial ports.

use crate::{Buffer, Description, Device, Error, Fields, Timer, layout};

layout! {
    /// A serial port on ISA.
    pub struct Serial = "serial", version 3, minimum 2 {
        state: Uart;
    }
}

layout! {
    /// A 16550.
    pub struct Uart = "serial", version 3, minimum 2 {
        divider: u16 => since 2;
        rbr: u8;
        ier: u8;
        iir: u8;
        lcr: u8;
        mcr: u8;
        lsr: u8;
        msr: u8;
        /// The scratch register, which is the guest's own.
        scr: u8;
        fcr as "fcr_vmstate": u8 => since 3;
    }
    subsections {
        thr_ipending: UartTransmitPending;
        tsr: UartShift;
        recv_fifo: UartReceiveFifo;
        xmit_fifo: UartTransmitFifo;
        fifo_timeout_timer: UartTimeout;
        timeout_ipending: UartTimeoutPending;
        poll: UartPoll;
    }
}

layout! {
    /// The interrupt of an empty holding register waits.
    pub struct UartTransmitPending = "serial/thr_ipending", version 1 {
        thr_ipending: i32;
    }
}

layout! {
    /// A byte that is being sent.
    pub struct UartShift = "serial/tsr", version 1 {
        tsr_retry: u32;
        thr: u8;
        tsr: u8;
    }
}

layout! {
    /// Received bytes that the guest has not read.
    pub struct UartReceiveFifo = "serial/recv_fifo", version 1 {
        recv_fifo: Fifo;
    }
}

layout! {
    /// Bytes that the guest has written and that are not sent.
    pub struct UartTransmitFifo = "serial/xmit_fifo", version 1 {
        xmit_fifo: Fifo;
    }
}

layout! {
    /// When the guest is told of bytes that wait in the FIFO.
    pub struct UartTimeout = "serial/fifo_timeout_timer", version 1 {
        fifo_timeout_timer: Timer;
    }
}

layout! {
    /// The interrupt of that waits.
    pub struct UartTimeoutPending = "serial/timeout_ipending", version 1 {
        timeout_ipending: i32;
    }
}

layout! {
    /// Polling of the modem lines.
    pub struct UartPoll = "serial/poll", version 1 {
        poll_msl: i32;
        modem_status_poll: Timer;
    }
}

/// The FIFO of a 16550: a ring of 16 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fifo {
    /// All bytes of the ring.
    pub data: Buffer<16>,
    /// Where the oldest byte is.
    pub head: u32,
    /// How many bytes there are.
    pub num: u32,
}

impl Device for Fifo {
    const DESCRIPTION: Description = Description::new("Fifo8", 1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("data", &mut self.data)?;
        fields.field("head", &mut self.head)?;
        fields.validate("head within the FIFO", self.head, self.head < 16)?;
        fields.field("num", &mut self.num)?;
        fields.validate("num within the FIFO", self.num, self.num <= 16)
    }
}
