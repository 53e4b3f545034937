//! How the sockets of a migration are tuned, as typed.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use multifd_engine::ZeroCopySend;
use multifd_transports::{Endpoint, Keepalive, SocketOptions};

use crate::human;

/// Where the flags are in the help.
const HEADING: &str = "Sockets";

const KEEPALIVE_GRAMMAR: &str =
    "TIME[,INTERVAL[,RETRIES]] or off, with times of 1s to 9h in whole seconds and 1 to 127 retries";

/// Settings of TCP connections; unix sockets take the buffers only, others nothing.
#[derive(Clone, Debug, Args)]
pub(crate) struct Sockets {
    /// Ask a silent peer for a sign of life after TIME, then every INTERVAL, RETRIES times; off:
    /// never
    #[arg(long, help_heading = HEADING, value_name = "TIME[,INTERVAL[,RETRIES]]", default_value = "30s,10s,3",
        value_parser = keepalive)]
    keepalive: KeepaliveChoice,
    /// How long what was sent may stay unacknowledged until the peer has vanished. Default: 10s
    /// more than --timeout
    #[arg(long, help_heading = HEADING, value_name = "TIME", value_parser = human::duration)]
    user_timeout: Option<Duration>,
    /// Size of a socket's send buffer, at most net.core.wmem_max. Default: the kernel tunes it
    #[arg(long, help_heading = HEADING, value_name = "SIZE", value_parser = human::size)]
    send_buffer: Option<u64>,
    /// Size of a socket's receive buffer, at most net.core.rmem_max. Default: the kernel tunes it
    #[arg(long, help_heading = HEADING, value_name = "SIZE", value_parser = human::size)]
    receive_buffer: Option<u64>,
    /// Multipath TCP where both ends have it, TCP otherwise
    #[arg(long, help_heading = HEADING)]
    mptcp: bool,
}

/// What only a source chooses.
#[derive(Clone, Debug, Args)]
pub(crate) struct SourceSockets {
    #[command(flatten)]
    both: Sockets,
    /// The address of this machine to connect from, which chooses the network
    #[arg(long, help_heading = HEADING, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// Where parallel channels connect to: another address of the destination. Several are taken in
    /// turn. Default: URI
    #[arg(long, help_heading = HEADING, value_name = "URI")]
    pub(crate) channel_uri: Vec<Endpoint>,
    /// Have the kernel send pages straight from the guest's memory, for as long as that pays;
    /// always: even if not. For parallel channels over TCP, without a codec
    #[arg(long, help_heading = HEADING, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true,
        default_missing_value = "auto")]
    zero_copy_send: Option<When>,
}

/// `None` is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepaliveChoice(Option<Keepalive>);

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum When {
    Auto,
    Always,
}

impl Sockets {
    pub(crate) fn options(&self) -> SocketOptions {
        let size = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        SocketOptions {
            keepalive: self.keepalive.0,
            user_timeout: self.user_timeout,
            send_buffer: self.send_buffer.map(size),
            receive_buffer: self.receive_buffer.map(size),
            mptcp: self.mptcp,
            ..SocketOptions::default()
        }
    }
}

impl SourceSockets {
    pub(crate) fn options(&self) -> SocketOptions {
        SocketOptions { bind: self.bind, ..self.both.options() }
    }

    pub(crate) fn zero_copy_send(&self) -> ZeroCopySend {
        match self.zero_copy_send {
            None => ZeroCopySend::Off,
            Some(When::Auto) => ZeroCopySend::WhileItPays,
            Some(When::Always) => ZeroCopySend::Always,
        }
    }
}

fn keepalive(text: &str) -> Result<KeepaliveChoice, String> {
    if text == "off" {
        return Ok(KeepaliveChoice(None));
    }
    let wrong = || format!("{text:?}: {KEEPALIVE_GRAMMAR}");
    let seconds = |text: &str| {
        let time = human::duration(text).ok()?;
        let whole = time.subsec_nanos() == 0 && (1..=9 * 3600).contains(&time.as_secs());
        whole.then_some(time)
    };
    let mut parts = text.split(',');
    let time = parts.next().and_then(seconds).ok_or_else(wrong)?;
    let mut keepalive = Keepalive { time, ..Keepalive::default() };
    if let Some(interval) = parts.next() {
        keepalive.interval = seconds(interval).ok_or_else(wrong)?;
    }
    if let Some(retries) = parts.next() {
        keepalive.retries =
            retries.parse().ok().filter(|retries| (1..=127).contains(retries)).ok_or_else(wrong)?;
    }
    if parts.next().is_some() { Err(wrong()) } else { Ok(KeepaliveChoice(Some(keepalive))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalive_is_one_to_three_numbers_or_off() {
        let parsed = |text| keepalive(text).map(|KeepaliveChoice(choice)| choice);
        let of = |time, interval, retries| {
            let (time, interval) = (Duration::from_secs(time), Duration::from_secs(interval));
            Ok(Some(Keepalive { time, interval, retries }))
        };
        assert_eq!(parsed("off"), Ok(None));
        assert_eq!(parsed("5s"), of(5, 10, 3));
        assert_eq!(parsed("1m,2s"), of(60, 2, 3));
        assert_eq!(parsed("1s,1s,127"), of(1, 1, 127));
        for wrong in ["", "0s", "500ms", "10h", "5s,", "5s,1500ms", "5s,1s,0", "5s,1s,128", "5s,1s,3,4", "on"]
        {
            assert!(keepalive(wrong).unwrap_err().contains(&format!("{wrong:?}")));
        }
    }
}
