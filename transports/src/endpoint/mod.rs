//! Where a migration goes to or comes from, as a URI.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

mod file_uri;

const GRAMMAR: &str = "tcp:HOST:PORT (a v6 address in [brackets]; no HOST: any address), unix:PATH, \
    file:PATH[,offset=N], fd:N (an inherited descriptor), fd:unix:PATH (one that is handed over there), exec:COMMAND, \
    or vsock:CID:PORT (CID a number, local, host or any)";

/// The address of a listener, or a file, in QEMU's URI form. Spec: docs/wire.md §12.
///
/// `tcp:HOST:PORT`, `tcp:[V6]:PORT`, `tcp::PORT`, `unix:PATH`, `file:PATH[,offset=N]`, `fd:N`,
/// `fd:unix:PATH`, `exec:COMMAND`, `vsock:CID:PORT`. [`Display`](fmt::Display) gives the URI back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// A command for `/bin/sh -c`: what is sent goes to its standard input, what it prints is
    /// received. It is killed when the channel is dropped:
    /// [`Channel::settle`](crate::Channel::settle) waits for its end.
    Exec(String),
    /// A descriptor that this process inherited: a stream socket, connected or listening, an end of
    /// a pipe, or a file.
    Fd(i32),
    /// The path of a unix socket on which another process hands over such a descriptor
    /// (`SCM_RIGHTS`).
    FdFrom(PathBuf),
    /// A regular file: the stream is written to it or read from it.
    File {
        /// Where it is. With `,offset=` in it, it cannot be written as a URI.
        path: PathBuf,
        /// Where in the file the stream begins, in bytes.
        offset: u64,
    },
    /// A name or an address, and a port.
    Tcp {
        /// Name, v4 address, or v6 address without brackets. Empty: any address when listening,
        /// this machine when dialling.
        host: String,
        /// Port; 0 is for listening only, and asks for any free one.
        port: u16,
    },
    /// The path of a unix stream socket.
    Unix(PathBuf),
    /// A stream socket between a virtual machine and its host.
    Vsock {
        /// Which machine: 1 is this one (local), 2 the host. [`VSOCK_ANY`]: any, for listening
        /// only.
        cid: u32,
        /// Port; not 2^32 - 1, which stands for any.
        port: u32,
    },
}

/// The context identifier that stands for any machine (`VMADDR_CID_ANY`).
pub const VSOCK_ANY: u32 = u32::MAX;

impl Endpoint {
    /// Whether several channels can be opened to it: a descriptor or a command is one channel.
    /// Spec: docs/wire.md §12.
    pub fn takes_several(&self) -> bool {
        matches!(self, Self::Tcp { .. } | Self::Unix(_) | Self::Vsock { .. })
    }
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(given: &str) -> Result<Self, InvalidEndpoint> {
        let invalid = |reason| InvalidEndpoint { given: given.to_owned(), reason };
        match given.split_once(':') {
            Some(("file", rest)) => file_uri::parse(rest).map_err(invalid),
            Some(("tcp", rest)) => parse_tcp(rest).map_err(invalid),
            Some(("exec", "")) => Err(invalid("the command is missing")),
            Some(("exec", command)) => Ok(Self::Exec(command.to_owned())),
            Some(("fd", rest)) => parse_fd(rest).map_err(invalid),
            Some(("unix", "")) => Err(invalid("the path is missing")),
            Some(("unix", path)) => Ok(Self::Unix(PathBuf::from(path))),
            Some(("vsock", rest)) => parse_vsock(rest).map_err(invalid),
            Some(_) => Err(invalid("unknown scheme")),
            None => Err(invalid("no scheme")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, offset } => f.write_str(&file_uri::print(path, *offset)),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Fd(number) => write!(f, "fd:{number}"),
            Self::FdFrom(path) => write!(f, "fd:unix:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid: VSOCK_ANY, port } => write!(f, "vsock:any:{port}"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// As its URI.
impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A text that is not the URI of an [`Endpoint`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{given:?} is not an endpoint: {reason}; expected {GRAMMAR}")]
pub struct InvalidEndpoint {
    given: String,
    reason: &'static str,
}

fn parse_tcp(rest: &str) -> Result<Endpoint, &'static str> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once("]:").ok_or("no port after the v6 address")?,
        None => rest.rsplit_once(':').ok_or("the port is missing")?,
    };
    if rest.starts_with('[') != host.contains(':') {
        return Err("a v6 address, and nothing else, stands in brackets");
    }
    if host.contains(|c: char| c.is_whitespace() || c.is_control() || "[]/,".contains(c)) {
        return Err("the host has a character that no host has");
    }
    let port = number(port).ok_or("the port is not a number in 0..=65535")?;
    Ok(Endpoint::Tcp { host: host.to_owned(), port })
}

fn parse_fd(rest: &str) -> Result<Endpoint, &'static str> {
    match rest.strip_prefix("unix:") {
        Some("") => Err("the path is missing"),
        Some(path) => Ok(Endpoint::FdFrom(PathBuf::from(path))),
        None => match number(rest) {
            Some(number) if number >= 0 => Ok(Endpoint::Fd(number)),
            _ => Err("the descriptor is not a number in 0..=2147483647"),
        },
    }
}

fn parse_vsock(rest: &str) -> Result<Endpoint, &'static str> {
    let (cid, port) = rest.split_once(':').ok_or("the port is missing")?;
    let cid = match cid {
        "any" | "-1" => VSOCK_ANY,
        "host" => 2,
        "local" => 1,
        cid => number(cid).ok_or("the CID is not a number, local, host or any")?,
    };
    let port =
        number(port).filter(|port| *port != u32::MAX).ok_or("the port is not a number below 2^32 - 1")?;
    Ok(Endpoint::Vsock { cid, port })
}

/// A number as it stands in a URI: `from_str` takes a plus sign, too.
fn number<T: FromStr>(text: &str) -> Option<T> {
    if text.starts_with('+') { None } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16) -> Endpoint {
        Endpoint::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn every_form_is_parsed_and_printed_back() {
        for (uri, endpoint) in [
            ("tcp:10.0.0.7:4444", tcp("10.0.0.7", 4444)),
            ("tcp:host.example:0", tcp("host.example", 0)),
            ("tcp::65535", tcp("", 65535)),
            ("tcp:0:1", tcp("0", 1)),
            ("tcp:[::]:4444", tcp("::", 4444)),
            ("tcp:[fe80::1%eth0]:4444", tcp("fe80::1%eth0", 4444)),
            ("unix:/run/x.sock", Endpoint::Unix("/run/x.sock".into())),
            ("unix:a:b c", Endpoint::Unix("a:b c".into())),
            ("fd:0", Endpoint::Fd(0)),
            ("fd:31", Endpoint::Fd(31)),
            ("fd:unix:/run/x.sock", Endpoint::FdFrom("/run/x.sock".into())),
            ("exec:gzip -c > 'a:b'", Endpoint::Exec("gzip -c > 'a:b'".to_owned())),
            ("vsock:3:4444", Endpoint::Vsock { cid: 3, port: 4444 }),
            ("vsock:any:0", Endpoint::Vsock { cid: VSOCK_ANY, port: 0 }),
            ("file:/vm,1", Endpoint::File { path: "/vm,1".into(), offset: 0 }),
            ("file:vm,offset=1024", Endpoint::File { path: "vm".into(), offset: 1024 }),
        ] {
            assert_eq!(uri.parse(), Ok(endpoint.clone()), "{uri}");
            assert_eq!(endpoint.to_string(), uri);
        }
    }

    #[test]
    fn a_wrong_value_is_repeated_with_the_grammar() {
        for uri in [
            "",
            "tcp",
            "tcp:",
            "tcp:host",
            "tcp:host:",
            "tcp:host:65536",
            "tcp:host:-1",
            "tcp:host:+1",
            "tcp:::1:4444",
            "tcp:[::1]",
            "tcp:[::1]4444",
            "tcp:[]:4444",
            "tcp:[host]:4444",
            "tcp:a b:1",
            "tcp:h:4444,ipv4=on",
            "unix:",
            "fd:",
            "fd:-1",
            "fd:+3",
            "fd:2147483648",
            "fd:x",
            "fd:unix:",
            "exec:",
            "vsock:",
            "vsock:3",
            "vsock:+3:4",
            "vsock:guest:4",
            "vsock:3:4294967295",
            "file:",
            "file:vm,offset=",
            "10.0.0.7:4444",
            "/run/x.sock",
            "TCP:h:1",
        ] {
            let error = uri.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(&format!("{uri:?}")) && error.contains("tcp:HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn well_known_machines_have_names() {
        for (uri, cid) in [("vsock:local:7", 1), ("vsock:host:7", 2), ("vsock:-1:7", VSOCK_ANY)] {
            assert_eq!(uri.parse(), Ok(Endpoint::Vsock { cid, port: 7 }), "{uri}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_to_what_prints_it_back_or_is_refused(rest in ".{0,24}", scheme in "(tcp|unix|file|fd|fd:unix|exec|vsock|):?") {
            let uri = scheme + &rest;
            if let Ok(endpoint) = uri.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
            }
        }
    }
}
