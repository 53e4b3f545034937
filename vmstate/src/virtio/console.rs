//! Consoles and other serial ports of virtio.

use super::{Core, DeviceId, Kind};
use crate::{Description, Device, Error, Fields, layout};

/// More ports than the device can have.
const MAX_PORTS: u32 = 4096;
/// Ports that a word of the map has.
const WORD: u32 = 32;

/// A device with serial ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Console {
    /// Its state.
    pub state: ConsoleState,
}

/// Ports of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleState {
    /// Columns of the terminal.
    pub columns: u16,
    /// Rows of the terminal.
    pub rows: u16,
    /// Most ports that the device can have.
    pub max_ports: u32,
    /// Ports that there are, a bit each.
    pub map: Vec<u32>,
    /// The ports.
    pub ports: Vec<ConsolePort>,
}

layout! {
    /// A port.
    pub struct ConsolePort = "virtio-console port", version 3 {
        id: u32;
        guest_connected: bool;
        host_connected: bool;
        /// A buffer of the guest that is half sent.
        elem_popped: u32;
    }
}

impl Default for ConsoleState {
    fn default() -> Self {
        Self { columns: 0, rows: 0, max_ports: WORD - 1, map: vec![0], ports: Vec::new() }
    }
}

impl Device for ConsoleState {
    const DESCRIPTION: Description = Description::new("virtio-console ports", 3);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("cols", &mut self.columns)?;
        fields.field("rows", &mut self.rows)?;
        fields.field("max_nr_ports", &mut self.max_ports)?;
        fields.validate("max_nr_ports up to 4096", self.max_ports, self.max_ports <= MAX_PORTS)?;
        fields.counted("ports_map", &mut self.map, self.max_ports.div_ceil(WORD))?;
        let mut count = u32::try_from(self.ports.len()).unwrap_or(u32::MAX);
        fields.field("nr_active_ports", &mut count)?;
        let named: u32 = self.map.iter().map(|word| word.count_ones()).sum();
        fields.validate("as many ports as the map has", count, count <= named)?;
        fields.counted("ports", &mut self.ports, count)?;
        match self.ports.iter().find(|port| port.elem_popped != 0) {
            Some(port) => Err(fields.wrong(
                format_args!("port {} with a buffer that is half sent", port.id),
                "one that is sent, others are not described",
            )),
            None => Ok(()),
        }
    }
}

impl Kind for Console {
    const DESCRIPTION: Description = Description::new("virtio-console", 3);
    const ID: DeviceId = DeviceId::CONSOLE;

    fn device(&mut self, _core: &Core, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("console", &mut self.state)
    }
}
