//! One TLS record, encrypted and decrypted in place. Spec: RFC 8446 §5.2 (TLS 1.3), RFC 5246
//! §6.2.3, RFC 5288 and RFC 7905 (TLS 1.2).
//!
//! ```text
//!  TLS 1.3           header(5) | text | inner type(1) | tag(16)      outer type: always application data
//!  TLS 1.2 GCM       header(5) | nonce(8) | text | tag(16)
//!  TLS 1.2 ChaCha    header(5) | text | tag(16)
//! ```

use std::ops::Range;

use rustls::{ConnectionTrafficSecrets, ProtocolVersion};

use super::provider::{Algorithm, Key, NONCE_LEN, TAG_LEN, TlsProvider, Unsound};

/// What a record carries.
pub(crate) mod content {
    pub(crate) const ALERT: u8 = 21;
    pub(crate) const HANDSHAKE: u8 = 22;
    pub(crate) const APPLICATION_DATA: u8 = 23;
}

/// Bytes before a record's payload: type, version, length.
pub(crate) const HEADER_LEN: usize = 5;
/// Most plaintext in a record: 2^14 bytes.
pub(crate) const MAX_TEXT: usize = 1 << 14;
/// Most bytes of a record that we write, header included.
pub(crate) const MAX_ENCRYPTED: usize = HEADER_LEN + EXPLICIT_NONCE_LEN + MAX_TEXT + 1 + TAG_LEN;
/// Most bytes after the header that any peer may send, in TLS 1.2: 2^14 and 2048.
pub(crate) const MAX_PAYLOAD: usize = MAX_TEXT + 2048;

/// The same in TLS 1.3: 2^14 and 256.
const MAX_PAYLOAD_13: usize = MAX_TEXT + 256;

const EXPLICIT_NONCE_LEN: usize = 8;
const VERSION: [u8; 2] = [3, 3];

/// Where the bytes of a record stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Tls12Chacha,
    Tls12Gcm,
    Tls13,
}

/// Why a record was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unopened {
    /// It was encrypted with more text than a record may have.
    Overflow,
    Unsound,
}

impl From<Unsound> for Unopened {
    fn from(Unsound: Unsound) -> Self {
        Self::Unsound
    }
}

/// The keys of one direction, and how many records they have protected.
pub(crate) struct Protection {
    key: Key,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    layout: Layout,
}

impl Protection {
    /// The keys as rustls gives them, and the number of the next record.
    pub(crate) fn new(
        provider: TlsProvider,
        version: ProtocolVersion,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, Unsound> {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (algorithm, key, iv) = match &secrets {
            Aes128Gcm { key, iv } => (Algorithm::Aes128Gcm, key, iv),
            Aes256Gcm { key, iv } => (Algorithm::Aes256Gcm, key, iv),
            Chacha20Poly1305 { key, iv } => (Algorithm::Chacha20Poly1305, key, iv),
            _ => return Err(Unsound),
        };
        let layout = match (version, algorithm) {
            (ProtocolVersion::TLSv1_3, _) => Layout::Tls13,
            (ProtocolVersion::TLSv1_2, Algorithm::Chacha20Poly1305) => Layout::Tls12Chacha,
            (ProtocolVersion::TLSv1_2, _) => Layout::Tls12Gcm,
            _ => return Err(Unsound),
        };
        let key = Key::new(provider, algorithm, key.as_ref())?;
        Ok(Self { key, iv: iv.as_ref().try_into().map_err(|_| Unsound)?, sequence, layout })
    }

    /// Keys for a bench.
    pub(crate) fn fixed(provider: TlsProvider) -> Result<Self, Unsound> {
        let key = Key::new(provider, Algorithm::Aes256Gcm, &[7; 32])?;
        Ok(Self { key, iv: [9; NONCE_LEN], sequence: 0, layout: Layout::Tls13 })
    }

    /// The number of the next record.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Where in a record the plaintext begins.
    pub(crate) fn text_at(&self) -> usize {
        match self.layout {
            Layout::Tls12Gcm => HEADER_LEN + EXPLICIT_NONCE_LEN,
            Layout::Tls12Chacha | Layout::Tls13 => HEADER_LEN,
        }
    }

    /// Length of a record, given the length of its plaintext.
    pub(crate) fn encrypted_len(&self, text_len: usize) -> usize {
        self.text_at() + text_len + usize::from(self.layout == Layout::Tls13) + TAG_LEN
    }

    /// Most bytes after the header of a record.
    pub(crate) fn max_payload(&self) -> usize {
        match self.layout {
            Layout::Tls12Gcm | Layout::Tls12Chacha => MAX_PAYLOAD,
            Layout::Tls13 => MAX_PAYLOAD_13,
        }
    }

    /// Encrypts a record of [`encrypted_len`](Self::encrypted_len), whose plaintext stands at
    /// [`text_at`](Self::text_at).
    pub(crate) fn seal(&mut self, content: u8, record: &mut [u8]) -> Result<(), Unsound> {
        let text_at = self.text_at();
        let payload_len = u16::try_from(record.len().saturating_sub(HEADER_LEN)).map_err(|_| Unsound)?;
        let nonce = self.nonce();
        let (front, body) = record.split_at_mut_checked(text_at).ok_or(Unsound)?;
        let tag_at = body.len().checked_sub(TAG_LEN).ok_or(Unsound)?;
        let (text, tag) = body.split_at_mut(tag_at);
        let (header, explicit) = front.split_at_mut(HEADER_LEN);
        let outer = if self.layout == Layout::Tls13 { content::APPLICATION_DATA } else { content };
        let [high, low] = payload_len.to_be_bytes();
        header.copy_from_slice(&[outer, VERSION[0], VERSION[1], high, low]);
        match self.layout {
            Layout::Tls13 => {
                *text.last_mut().ok_or(Unsound)? = content;
                self.key.seal(nonce, header, text, tag)?;
            }
            Layout::Tls12Gcm | Layout::Tls12Chacha => {
                explicit.copy_from_slice(nonce.get(NONCE_LEN - explicit.len()..).ok_or(Unsound)?);
                self.key.seal(nonce, &self.old_header(content, text.len()), text, tag)?;
            }
        }
        self.sequence += 1;
        Ok(())
    }

    /// Opens a record, header included: gives what it carries, and where in it.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Unopened> {
        let text_at = self.text_at();
        let nonce = self.nonce();
        let (front, body) = record.split_at_mut_checked(text_at).ok_or(Unsound)?;
        let (header, explicit) = front.split_at(HEADER_LEN);
        let outer = *header.first().ok_or(Unsound)?;
        let (content, len) = match self.layout {
            // Nothing else is protected, and nothing is unprotected after the handshake.
            Layout::Tls13 if outer != content::APPLICATION_DATA => return Err(Unsound.into()),
            Layout::Tls13 => {
                let len = self.key.open(nonce, header, body)?;
                // With the type and the padding.
                if len > MAX_TEXT + 1 {
                    return Err(Unopened::Overflow);
                }
                inner_content(body.get(..len).ok_or(Unsound)?)?
            }
            Layout::Tls12Gcm | Layout::Tls12Chacha => {
                let text_len = body.len().checked_sub(TAG_LEN).ok_or(Unsound)?;
                let nonce = self.nonce_with(nonce, explicit);
                (outer, self.key.open(nonce, &self.old_header(outer, text_len), body)?)
            }
        };
        if len > MAX_TEXT {
            return Err(Unopened::Overflow);
        }
        self.sequence += 1;
        Ok((content, text_at..text_at + len))
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        let sequence = self.sequence.to_be_bytes();
        let (_, tail) = nonce.split_at_mut(NONCE_LEN - sequence.len());
        tail.iter_mut().zip(sequence).for_each(|(byte, number)| *byte ^= number);
        nonce
    }

    /// In TLS 1.2 with GCM, the sender chooses the last part of the nonce and says it.
    fn nonce_with(&self, mut nonce: [u8; NONCE_LEN], explicit: &[u8]) -> [u8; NONCE_LEN] {
        if self.layout == Layout::Tls12Gcm {
            let (salt, said) = nonce.split_at_mut(NONCE_LEN - EXPLICIT_NONCE_LEN);
            salt.iter_mut().zip(self.iv).for_each(|(byte, own)| *byte = own);
            said.iter_mut().zip(explicit).for_each(|(byte, theirs)| *byte = *theirs);
        }
        nonce
    }

    /// What TLS 1.2 authenticates beside the text: number, type, version, length.
    fn old_header(&self, content: u8, text_len: usize) -> [u8; 13] {
        let mut header = [0; 13];
        let (number, rest) = header.split_at_mut(8);
        number.copy_from_slice(&self.sequence.to_be_bytes());
        let [high, low] = u16::try_from(text_len).unwrap_or(u16::MAX).to_be_bytes();
        rest.copy_from_slice(&[content, VERSION[0], VERSION[1], high, low]);
        header
    }
}

/// The last byte that is not zero is the type; zeros behind it are padding.
fn inner_content(text: &[u8]) -> Result<(u8, usize), Unsound> {
    let at = text.iter().rposition(|byte| *byte != 0).ok_or(Unsound)?;
    text.get(at).map(|content| (*content, at)).ok_or(Unsound)
}
