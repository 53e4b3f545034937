//! Where a migration goes to or comes from, as a URI.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::file_uri;

const GRAMMAR: &str = "tcp:HOST:PORT (a v6 address in [brackets]; no HOST: any address), unix:PATH or \
    file:PATH[,offset=N]";

/// The address of a listener, or a file, in QEMU's URI form. Spec: docs/wire.md §12.
///
/// `tcp:HOST:PORT`, `tcp:[V6]:PORT`, `tcp::PORT`, `unix:PATH`, `file:PATH[,offset=N]`. [`Display`](fmt::Display) gives the URI back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// A regular file: the stream is written to it or read from it.
    File {
        /// Where it is. With `,offset=` in it, it cannot be said as a URI.
        path: PathBuf,
        /// Where in the file the stream begins, in bytes.
        offset: u64,
    },
    /// A name or an address, and a port.
    Tcp {
        /// Name, v4 address, or v6 address without brackets. Empty: any address when listening, this machine
        /// when dialling.
        host: String,
        /// Port; 0 is for listening only, and asks for any free one.
        port: u16,
    },
    /// The path of a unix stream socket.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(given: &str) -> Result<Self, InvalidEndpoint> {
        let invalid = |reason| InvalidEndpoint { given: given.to_owned(), reason };
        match given.split_once(':') {
            Some(("file", rest)) => file_uri::parse(rest).map_err(invalid),
            Some(("tcp", rest)) => parse_tcp(rest).map_err(invalid),
            Some(("unix", "")) => Err(invalid("the path is missing")),
            Some(("unix", path)) => Ok(Self::Unix(PathBuf::from(path))),
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
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
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
    // `u16::from_str` takes a plus sign, which is in no URI.
    if port.starts_with('+') {
        return Err("the port is not a number in 0..=65535");
    }
    let port = port.parse().map_err(|_| "the port is not a number in 0..=65535")?;
    Ok(Endpoint::Tcp { host: host.to_owned(), port })
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

    proptest! {
        #[test]
        fn any_text_parses_to_what_prints_it_back_or_is_refused(rest in ".{0,24}", scheme in "(tcp|unix|file|):?") {
            let uri = scheme + &rest;
            if let Ok(endpoint) = uri.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
            }
        }
    }
}
