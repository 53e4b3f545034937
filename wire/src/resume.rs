use crate::MigrationId;

/// What a source begins a connection with that goes on with a broken pre-copy: which migration, and
/// a number that the destination has to answer for. Spec: docs/wire.md §27.11.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumeOpening {
    /// What the destination has said that it knows the migration by.
    pub id: MigrationId,
    /// Random, for this connection alone.
    pub nonce: [u8; ResumeOpening::NONCE_LEN],
}

/// An item of type command with a number that no QEMU has, and the length of its body.
const HEAD: [u8; 5] = [0x08, 0x4d, 0x53, 0x00, 0x30];

impl ResumeOpening {
    /// Bytes of a random number, of a public key, and of a proof.
    pub const NONCE_LEN: usize = 32;

    /// Bytes of all of it.
    pub const LEN: usize = HEAD.len() + MigrationId::LEN + Self::NONCE_LEN;

    /// The first bytes of the connection.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let (head, rest) = bytes.split_at_mut(HEAD.len());
        let (id, nonce) = rest.split_at_mut(MigrationId::LEN);
        head.copy_from_slice(&HEAD);
        id.copy_from_slice(&self.id.0);
        nonce.copy_from_slice(&self.nonce);
        bytes
    }

    /// Whether a connection that begins so begins with one.
    pub fn is_begun_by(first: [u8; 4]) -> bool {
        HEAD.starts_with(&first)
    }

    /// What a connection begins with. `None`: with something else.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (id, nonce) = bytes.strip_prefix(&HEAD)?.split_first_chunk()?;
        Some(Self { id: MigrationId(*id), nonce: nonce.try_into().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_has_its_parts_and_nothing_else_is_one() {
        let opening = ResumeOpening { id: MigrationId(*b"0123456789abcdef"), nonce: [0x7a; 32] };
        let bytes = opening.encode();
        assert_eq!(bytes[..21], *b"\x08\x4d\x53\0\x300123456789abcdef");
        assert_eq!(bytes[21..], [0x7a; 32]);
        assert_eq!(ResumeOpening::parse(&bytes), Some(opening));
        for index in 0..HEAD.len() {
            let mut other = bytes;
            other[index] ^= 1;
            assert_eq!(ResumeOpening::parse(&other), None, "byte {index}");
            let first = [other[0], other[1], other[2], other[3]];
            assert_eq!(ResumeOpening::is_begun_by(first), index == 4, "byte {index}");
        }
    }
}
