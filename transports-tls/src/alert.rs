//! Messages for alerts. RFC 8446 §6.

use super::opener::Bad;
use super::record::MAX_TEXT;

/// Which end of a connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Description of `close_notify`.
pub(crate) const CLOSE: u8 = 0;
/// The alert `close_notify`, with its level.
pub(crate) const CLOSE_NOTIFY: [u8; 2] = [1, CLOSE];
/// Level of an alert that ends the connection.
pub(crate) const FATAL: u8 = 2;

/// What the alert of a peer means. `role` is ours.
pub(crate) fn received(description: u8, role: Role) -> String {
    let refused = |why: &str| format!("the peer refused our certificate: {why}");
    match description {
        40 => {
            "the peer refused the TLS handshake: no common version, cipher or certificate (handshake failure)"
                .into()
        }
        42 if role == Role::Server => refused("bad certificate, which a wrong host name is to a client"),
        42 => refused("bad certificate"),
        43 => refused("it is not for this purpose (unsupported certificate)"),
        44 => refused("it was revoked"),
        45 => refused("it has expired or is not valid yet"),
        46 => refused("unknown reason (certificate unknown)"),
        48 => refused("unknown CA, the peer trusts another one than the one that signed it"),
        49 => refused("its name is not in the peer's authorisation list (access denied)"),
        51 => refused(
            "its signature does not verify, another CA of the same name may have signed it (decrypt error)",
        ),
        70 => "the peer has no TLS version in common with us, 1.2 or 1.3 is needed".into(),
        116 => "the peer demands a client certificate and we have none (certificate required)".into(),
        other => format!("the peer ended the TLS connection with alert {other} ({})", name(other)),
    }
}

/// The alert for what no sound peer sends, and the text of our own error.
pub(super) fn for_bad(bad: &Bad) -> (u8, String) {
    match bad {
        Bad::Header(header) => (10, format!("{header:02x?} is no header of a TLS record that may come now")),
        Bad::Fragment => {
            (10, "a fragment of a TLS handshake message is empty, or another record interrupts it".to_owned())
        }
        Bad::Overflow(len) => (
            22,
            format!(
                "a TLS record of {len} bytes is too long, expected at most {MAX_TEXT} and what encryption adds"
            ),
        ),
        Bad::Idle => (10, "too many TLS records in a row without data".to_owned()),
        Bad::Message(kind) => (10, format!("handshake message {kind} after the TLS handshake")),
        Bad::Undecryptable => {
            (20, "a TLS record does not decrypt: it was changed on the way, or is not the peer's".to_owned())
        }
    }
}

fn name(description: u8) -> &'static str {
    match description {
        10 => "unexpected message",
        20 => "bad record MAC",
        22 => "record overflow",
        47 => "illegal parameter",
        50 => "decode error",
        71 => "insufficient security",
        80 => "internal error",
        90 => "user cancelled",
        100 => "no renegotiation",
        109 => "missing extension",
        112 => "unrecognised name",
        115 => "unknown PSK identity",
        120 => "no application protocol",
        _ => "unknown",
    }
}
