//! How sockets are tuned.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

/// Settings of the sockets of a migration; those of TCP do nothing on other kinds. More fields will
/// come: write `..SocketOptions::default()`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SocketOptions {
    /// TCP_NODELAY: what was sent leaves at once. Default: true.
    pub no_delay: bool,
    /// Asks a silent peer for a sign of life. Default: after 30 s, every 10 s, 3 times: a peer that
    /// has vanished is noticed after 60 s. `None`: never.
    pub keepalive: Option<Keepalive>,
    /// TCP_USER_TIMEOUT: how long what was sent may stay unacknowledged, or the peer without room
    /// for more, until it is taken for vanished. Default: `None`, the system's own, which is about
    /// 15 minutes; the engine sets its timeout. When it is longer than `keepalive` takes it holds
    /// for a silent peer, too.
    pub user_timeout: Option<Duration>,
    /// SO_SNDBUF in bytes. Default: `None`, the kernel's own tuning, which is hard to beat. The
    /// kernel gives no more than `net.core.wmem_max`.
    pub send_buffer: Option<usize>,
    /// SO_RCVBUF in bytes. Default: `None`, the kernel's own tuning. No more than
    /// `net.core.rmem_max`.
    pub receive_buffer: Option<usize>,
    /// Multipath TCP: one connection over several networks, where both ends can; plain TCP with
    /// those that cannot, and on a kernel without it. Default: false.
    pub mptcp: bool,
    /// The address of this machine from which a source dials, which chooses the network. Default:
    /// the system chooses.
    pub bind: Option<IpAddr>,
}

/// TCP keepalive: when an idle connection is probed, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Keepalive {
    /// Idle time until the first probe; whole seconds, 1 s ..= 9 h.
    pub time: Duration,
    /// Time between two probes; whole seconds, 1 s ..= 9 h.
    pub interval: Duration,
    /// Probes without an answer after which the peer is gone: 1..=127.
    pub retries: u32,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            no_delay: true,
            keepalive: Some(Keepalive::default()),
            user_timeout: None,
            send_buffer: None,
            receive_buffer: None,
            mptcp: false,
            bind: None,
        }
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { time: Duration::from_secs(30), interval: Duration::from_secs(10), retries: 3 }
    }
}

impl Keepalive {
    /// Time until a dead peer is detected on an idle connection.
    pub fn timeout(&self) -> Duration {
        self.time + self.interval * self.retries
    }
}

impl SocketOptions {
    /// A socket of the family of `address`, with what must be set before it connects or listens.
    pub(crate) fn tcp_socket(&self, address: SocketAddr) -> io::Result<Socket> {
        let domain = Domain::for_address(address);
        let socket = match self.mptcp.then(|| Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP))) {
            Some(Ok(socket)) => socket,
            Some(Err(error)) => {
                tracing::warn!(%error, "no multipath TCP on this machine, going on with TCP");
                Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?
            }
            None => Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?,
        };
        self.set_buffers(&socket)?;
        Ok(socket)
    }

    /// Binds a socket that will connect to `peer`.
    pub(crate) fn bind_source(&self, socket: &Socket, peer: SocketAddr) -> io::Result<()> {
        let Some(address) = self.bind else { return Ok(()) };
        if address.is_ipv4() != peer.is_ipv4() {
            let text = format!("{peer} cannot be reached from {address}, which is of the other family");
            return Err(io::Error::new(ErrorKind::AddrNotAvailable, text));
        }
        socket
            .bind(&SocketAddr::new(address, 0).into())
            .map_err(|error| io::Error::new(error.kind(), format!("cannot connect from {address}: {error}")))
    }

    /// Sets the buffers' sizes, which count from the first segment on.
    pub(crate) fn set_buffers(&self, socket: &Socket) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
            warn_if_less("send buffer", bytes, socket.send_buffer_size()?, "net.core.wmem_max");
        }
        if let Some(bytes) = self.receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
            warn_if_less("receive buffer", bytes, socket.recv_buffer_size()?, "net.core.rmem_max");
        }
        Ok(())
    }

    /// Sets the rest, on a connected TCP socket.
    pub(crate) fn tune_tcp(&self, socket: &Socket) -> io::Result<()> {
        socket.set_tcp_nodelay(self.no_delay)?;
        match self.keepalive {
            Some(Keepalive { time, interval, retries }) => {
                let keepalive =
                    TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
                socket.set_tcp_keepalive(&keepalive).map_err(|error| {
                    let text = format!("keepalive {time:?}, {interval:?}, {retries} times: {error}");
                    io::Error::new(error.kind(), text)
                })?;
            }
            None => socket.set_keepalive(false)?,
        }
        match (socket.set_tcp_user_timeout(self.user_timeout), self.mptcp) {
            // Not every kernel passes it on to the subflows.
            (Err(error), true) => tracing::warn!(%error, "no user timeout on multipath TCP"),
            (outcome, _) => outcome?,
        }
        Ok(())
    }
}

/// The kernel doubles the size asked for, and cuts it silently.
fn warn_if_less(what: &str, asked: usize, given: usize, limit: &str) {
    if given < asked {
        tracing::warn!("{what} of {asked} bytes asked for, {given} given: {limit} is the limit");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vanished_peer_is_noticed_after_a_minute_by_default() {
        assert_eq!(Keepalive::default().timeout(), Duration::from_secs(60));
    }

    #[test]
    fn every_option_reaches_the_socket() {
        let options = SocketOptions {
            no_delay: false,
            keepalive: Some(Keepalive {
                time: Duration::from_secs(7),
                interval: Duration::from_secs(2),
                retries: 4,
            }),
            user_timeout: Some(Duration::from_millis(1500)),
            send_buffer: Some(64 << 10),
            receive_buffer: Some(32 << 10),
            ..SocketOptions::default()
        };
        let socket = options.tcp_socket(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        options.tune_tcp(&socket).unwrap();
        assert!(!socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(7));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(2));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_millis(1500)));
        assert_eq!(socket.send_buffer_size().unwrap(), 128 << 10);
        assert_eq!(socket.recv_buffer_size().unwrap(), 64 << 10);

        let none = SocketOptions { keepalive: None, ..options };
        none.tune_tcp(&socket).unwrap();
        assert!(!socket.keepalive().unwrap());
    }

    #[test]
    fn an_address_of_the_other_family_is_refused_with_both() {
        let options = SocketOptions { bind: Some([127, 0, 0, 1].into()), ..SocketOptions::default() };
        let peer: SocketAddr = "[::1]:5".parse().unwrap();
        let error = options.bind_source(&options.tcp_socket(peer).unwrap(), peer).unwrap_err().to_string();
        assert!(error.contains("[::1]:5") && error.contains("127.0.0.1"), "{error}");
    }

    #[test]
    fn multipath_tcp_falls_back_where_there_is_none() {
        let options = SocketOptions { mptcp: true, ..SocketOptions::default() };
        let socket = options.tcp_socket(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        assert!(matches!(socket.protocol().unwrap(), Some(Protocol::MPTCP | Protocol::TCP)));
    }
}
