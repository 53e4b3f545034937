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
