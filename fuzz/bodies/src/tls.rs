//! The record layer of TLS, without its handshake.

use multifd_transports_tls::TlsProvider;
use multifd_transports_tls::measure::{Open, Seal};

use crate::Input;

const APPLICATION_DATA: u8 = 23;
const HANDSHAKE: u8 = 22;
/// A key update, which wants one back or does not.
const KEY_UPDATES: [&[u8]; 2] = [&[24, 0, 0, 1, 0], &[24, 0, 0, 1, 1]];

/// Records that a peer with the right key has sealed, whatever is in them, and bytes between: no
/// data comes out but what was sealed as data, in order.
///
/// Input: how many bytes are received at a time, as a power of two modulo 16; then pieces of a byte
/// and counted bytes. The byte is a record's content; 0: the bytes are received as they are.
pub fn tls(input: &[u8]) {
    let mut input = Input(input);
    let at_a_time = 1_usize << (input.u8() % 16);
    let provider = TlsProvider::default();
    let (mut seal, mut open) = (Seal::new(provider), Open::new(provider));
    let (mut sent, mut opened) = (Vec::new(), Vec::new());
    while !input.is_empty() {
        let (content, text) = (input.u8(), input.counted());
        let received = match content {
            0 => text.to_vec(),
            content => match seal.record(content, text) {
                Some(record) => record.to_vec(),
                None => continue,
            },
        };
        match content {
            APPLICATION_DATA => sent.extend_from_slice(text),
            HANDSHAKE if KEY_UPDATES.contains(&text) => seal.rekey(provider),
            _ => {}
        }
        let fed = received.chunks(at_a_time).try_for_each(|piece| open.feed(provider, piece, &mut opened));
        assert!(sent.starts_with(&opened), "data that was not sent");
        if fed.is_err() {
            return;
        }
    }
}
