//! What records a peer may send, byte by byte.

use crate::TlsProvider;
use crate::opener::{Bad, Opened, Opener};
use crate::record::{MAX_TEXT, Protection, content};

/// Seals records one after the other, as the peer of a fresh opener.
struct Peer(Protection, Vec<u8>);

impl Peer {
    fn new() -> Self {
        Self(Protection::fixed(TlsProvider::default()).unwrap(), Vec::new())
    }

    fn sends(mut self, content: u8, text: &[u8]) -> Self {
        let mut record = vec![0; self.0.encrypted_len(text.len())];
        let at = self.0.text_at();
        record[at..at + text.len()].copy_from_slice(text);
        self.0.seal(content, &mut record).unwrap();
        self.1.extend(record);
        self
    }

    fn opener(self) -> Opener {
        Opener::new(Protection::fixed(TlsProvider::default()).unwrap(), &self.1)
    }
}

#[test]
fn nothing_comes_between_the_pieces_of_a_message() {
    let ticket = [4, 0, 0, 4, 1, 2, 3, 4];
    let (head, tail) = ticket.split_at(6);
    let begun = || Peer::new().sends(content::HANDSHAKE, head);
    let mut opener = begun().sends(content::HANDSHAKE, tail).sends(content::APPLICATION_DATA, b"x").opener();
    for expected in [Opened::Other, Opened::Other, Opened::Data] {
        assert_eq!(opener.open(), Ok(expected));
    }
    let between: [(u8, &[u8]); 4] = [
        (content::APPLICATION_DATA, b"x"),
        (content::APPLICATION_DATA, b""),
        (content::ALERT, &[1, 0]),
        (content::HANDSHAKE, b""),
    ];
    for (content, text) in between {
        let mut opener = begun().sends(content, text).sends(content::HANDSHAKE, tail).opener();
        assert_eq!(opener.open(), Ok(Opened::Other));
        assert_eq!(opener.open(), Err(Bad::Fragment), "{content} {text:?}");
    }
    assert_eq!(Peer::new().sends(content::HANDSHAKE, b"").opener().open(), Err(Bad::Fragment));
}

#[test]
fn a_record_is_no_longer_than_it_may_be() {
    // A byte of data and its type, and padding to so much: the type 0 is padding, too.
    let padded = |len: usize| {
        let mut text = vec![0; len - 1];
        text[..2].copy_from_slice(&[b'x', content::APPLICATION_DATA]);
        Peer::new().sends(0, &text).opener()
    };
    let mut opener = padded(MAX_TEXT + 1);
    assert_eq!(opener.open(), Ok(Opened::Data));
    assert_eq!(opener.data(), b"x");
    assert_eq!(padded(MAX_TEXT + 2).open(), Err(Bad::Overflow(MAX_TEXT + 2 + 16)));
    let header = |len: usize| {
        let [high, low] = u16::try_from(len).unwrap().to_be_bytes();
        let protection = Protection::fixed(TlsProvider::default()).unwrap();
        Opener::new(protection, &[23, 3, 3, high, low])
    };
    assert_eq!(header(MAX_TEXT + 256).open(), Ok(Opened::Nothing));
    assert_eq!(header(MAX_TEXT + 257).open(), Err(Bad::Overflow(MAX_TEXT + 257)));
    assert_eq!(crate::alert::for_bad(&Bad::Overflow(1)).0, 22);
}

/// What comes of the last of so many records; those before it are sound.
fn last(mut opener: Opener, records: usize) -> Result<Opened, Bad> {
    for before in 1..records {
        assert!(opener.open().is_ok(), "record {before} of {records}");
    }
    opener.open()
}

/// Two records, of which the bytes are changed on the way.
fn on_the_way(change: impl FnOnce(&mut Vec<u8>, usize)) -> Opener {
    let one = Peer::new().sends(content::APPLICATION_DATA, b"first");
    let len = one.1.len();
    let mut both = one.sends(content::APPLICATION_DATA, b"other");
    change(&mut both.1, len);
    both.opener()
}

/// The record layer's part of what tlsfuzzer tries.
#[test]
fn records_that_are_changed_on_the_way_are_not_opened() {
    let flips = (0..Peer::new().sends(content::APPLICATION_DATA, b"first").1.len()).map(|at| {
        // Of a header, too: it is authenticated.
        on_the_way(|bytes, _| bytes[at] ^= 1)
    });
    for (at, mut opener) in flips.enumerate() {
        // A length that became longer waits for more, and then fails with the next record in it.
        let opened = opener.open();
        assert!(matches!(opened, Err(_) | Ok(Opened::Nothing)), "byte {at}: {opened:?}");
    }
    let cases: [(&str, Opener, usize); 5] = [
        ("swapped", on_the_way(|bytes, len| bytes.rotate_left(len)), 1),
        ("lost", on_the_way(|bytes, len| drop(bytes.drain(..len))), 1),
        ("again", on_the_way(|bytes, len| bytes.copy_within(..len, len)), 2),
        (
            "a tag that is cut",
            on_the_way(|bytes, len| {
                bytes[4] -= 1;
                bytes.remove(len - 1);
            }),
            1,
        ),
        (
            "nothing but a header",
            on_the_way(|bytes, len| {
                bytes[3..5].fill(0);
                bytes.drain(5..len);
            }),
            1,
        ),
    ];
    for (what, mut opener, records) in cases {
        if records == 2 {
            assert_eq!(opener.open(), Ok(Opened::Data));
            opener.take(5);
        }
        assert_eq!(opener.open(), Err(Bad::Undecryptable), "{what}");
    }
}

#[test]
fn records_of_another_kind_or_version_and_in_the_clear_are_refused() {
    let clear = |bytes: &[u8]| Opener::new(Protection::fixed(TlsProvider::default()).unwrap(), bytes);
    for header in
        [[0, 3, 3, 0, 17], [19, 3, 3, 0, 17], [24, 3, 3, 0, 17], [255, 3, 3, 0, 17], [23, 2, 0, 0, 17]]
    {
        assert_eq!(clear(&header).open(), Err(Bad::Header(header)));
    }
    // SSL 2, HTTP, an alert, a change of cipher and data that is not encrypted.
    let cases: [&[u8]; 5] = [
        &[0x80, 0x2e, 1, 0, 2, 0],
        b"HTTP/1.1 400 Bad Request",
        &[21, 3, 3, 0, 2, 2, 40],
        &[20, 3, 3, 0, 1, 1],
        &[23, 3, 3, 0, 4, b'd', b'a', b't', b'a'],
    ];
    for bytes in cases {
        assert!(clear(bytes).open().is_err(), "{bytes:02x?}");
    }
}

#[test]
fn messages_that_may_not_come_after_the_handshake_are_refused() {
    // HelloRequest, ClientHello, ServerHello, EndOfEarlyData, EncryptedExtensions, Certificate,
    // CertificateRequest, CertificateVerify, Finished, an unknown type.
    for kind in [0, 1, 2, 5, 8, 11, 13, 15, 20, 99] {
        let refused = Peer::new().sends(content::HANDSHAKE, &[kind, 0, 0, 0]).opener().open();
        assert_eq!(refused, Err(Bad::Message(kind)));
    }
    let key_updates: [&[u8]; 5] = [
        &[24, 0, 0, 0],
        &[24, 0, 0, 1, 2],
        &[24, 0, 0, 1, 255],
        &[24, 0, 0, 2, 0, 0],
        // Something behind it, that would be under the old key.
        &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0],
    ];
    for message in key_updates {
        let refused = Peer::new().sends(content::HANDSHAKE, message).opener().open();
        assert_eq!(refused, Err(Bad::Message(24)), "{message:?}");
    }
    // A message that is announced longer than any may be.
    let refused = Peer::new().sends(content::HANDSHAKE, &[4, 0xff, 0xff, 0xff]).opener().open();
    assert_eq!(refused, Err(Bad::Message(4)));
}

#[test]
fn alerts_have_two_bytes_and_types_within_a_record_are_known() {
    let alerts: [&[u8]; 3] = [&[], &[2], &[2, 40, 0]];
    for alert in alerts {
        assert!(Peer::new().sends(content::ALERT, alert).opener().open().is_err(), "{alert:?}");
    }
    for inner in [20, 24, 25, 255] {
        assert!(Peer::new().sends(inner, &[1]).opener().open().is_err(), "{inner}");
    }
    // All padding: there is no type.
    assert!(Peer::new().sends(0, &[0; 40]).opener().open().is_err());
}

#[test]
fn records_that_carry_nothing_come_to_an_end() {
    let mut peer = Peer::new();
    for _ in 0..64 {
        peer = peer.sends(content::APPLICATION_DATA, b"");
    }
    assert_eq!(last(peer.sends(content::APPLICATION_DATA, b"").opener(), 65), Err(Bad::Idle));
    let mut peer = Peer::new();
    for _ in 0..64 {
        peer = peer.sends(content::HANDSHAKE, &[4, 0, 0, 0]);
    }
    assert_eq!(last(peer.sends(content::HANDSHAKE, &[4, 0, 0, 0]).opener(), 65), Err(Bad::Idle));
    for wish in [0, 1] {
        let mut peer = Peer::new();
        for _ in 0..65 {
            peer = peer.sends(content::HANDSHAKE, &[24, 0, 0, 1, wish]);
        }
        assert_eq!(last(peer.opener(), 65), Err(Bad::Idle), "key updates");
    }
}
