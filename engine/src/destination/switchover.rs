//! Whether to answer OPEN_RETURN_PATH with SWITCHOVER_ACK.

use multifd_wire::Configuration;
use serde::Serialize;

/// A source with the capability switchover-ack waits for an acknowledgement and does not say so on the wire; a source before
/// QEMU 8.1 refuses the message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchoverAck {
    /// Acknowledge to machine types of 8.1 and later, whose QEMU must be at least that.
    #[default]
    Auto,
    /// Acknowledge always: a QEMU from 8.1 on that runs an older machine type with switchover-ack on.
    Always,
    /// Never acknowledge.
    Never,
}

impl SwitchoverAck {
    pub(crate) fn wanted_for(self, configuration: &Configuration) -> bool {
        match self {
            Self::Auto => configuration.machine_version().is_some_and(|version| version >= (8, 1)),
            Self::Always => true,
            Self::Never => false,
        }
    }
}
