//! Keyboard, mouse, and the ports beside them.

use crate::{Buffer, Same, Table, layout};

layout! {
    /// What keyboard and mouse share: a queue of bytes to the guest.
    pub struct Ps2 = "PS2 Common State", version 3, minimum 2 {
        write_cmd: i32;
        queue_rptr as "queue.rptr": i32;
        queue_wptr as "queue.wptr": i32;
        queue_count as "queue.count": i32;
        queue_data as "queue.data": Buffer<256>;
    }
}

layout! {
    /// A PS/2 keyboard.
    pub struct Ps2Keyboard = "ps2kbd", version 3, minimum 2 {
        ps2 as "parent_obj": Ps2;
        scan_enabled: i32;
        translate: i32;
        scancode_set: i32 => since 3;
    }
    subsections {
        ledstate: Ps2Leds;
        need_high_bit: Ps2HighBit;
        command_reply_queue: Ps2KeyboardReplies;
    }
}

layout! {
    /// A PS/2 mouse.
    pub struct Ps2Mouse = "ps2mouse", version 2 {
        ps2 as "parent_obj": Ps2;
        mouse_status: u8;
        mouse_resolution: u8;
        mouse_sample_rate: u8;
        mouse_wrap: u8;
        mouse_type: u8;
        mouse_detect_state: u8;
        mouse_dx: i32;
        mouse_dy: i32;
        mouse_dz: i32;
        mouse_buttons: u8;
    }
    subsections {
        command_reply_queue: Ps2MouseReplies;
    }
}

layout! {
    /// An absolute mouse of the VMware backdoor.
    pub struct VmMouse = "vmmouse", version 0 {
        queue_size: Same<i32>;
        queue: Table<u32, 1024>;
        nb_queue: u16;
        status: u16;
        absolute: u8;
    }
}

layout! {
    /// System control port A: A20 and a fast reset.
    pub struct Port92 = "port92", version 1 {
        outport: u8;
    }
}

layout! {
    /// The keyboard controller.
    pub struct KeyboardController = "pckbd", version 3 {
        state as "kbd": KeyboardState;
    }
}

layout! {
    /// What the controller of either kind has.
    pub struct KeyboardState = "pckbd", version 3 {
        write_cmd: u8;
        status: u8;
        mode: u8;
        pending as "pending_tmp": u8;
    }
    subsections {
        outport: KeyboardOutport;
        extended: KeyboardExtended;
    }
}

layout! {
    /// The output port, where it is not as after a reset.
    pub struct KeyboardOutport = "pckbd_outport", version 1 {
        outport: u8;
    }
}

layout! {
    /// Bytes on their way to the guest.
    pub struct KeyboardExtended = "pckbd/extended_state", version 0 {
        migration_flags: u32;
        obsrc: u32;
        obdata: u8;
        cbdata: u8;
    }
}

layout! {
    /// Lamps of the keyboard.
    pub struct Ps2Leds = "ps2kbd/ledstate", version 3, minimum 2 {
        ledstate: i32;
    }
}

layout! {
    /// The rest of a translated scan code is to come.
    pub struct Ps2HighBit = "ps2kbd/need_high_bit", version 1 {
        need_high_bit: bool;
    }
}

layout! {
    /// Answers to commands, which go before keys.
    pub struct Ps2KeyboardReplies = "ps2kbd/command_reply_queue", version 0 {
        cwptr as "parent_obj.queue.cwptr": i32;
    }
}

layout! {
    /// Answers to commands, which go before movements.
    pub struct Ps2MouseReplies = "ps2mouse/command_reply_queue", version 0 {
        cwptr as "parent_obj.queue.cwptr": i32;
    }
}
