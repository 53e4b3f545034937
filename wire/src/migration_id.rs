/// Which migration a connection is of: how a multifd destination knows the source of its paused
/// post-copy again. Spec: docs/wire.md §27.6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationId(pub [u8; MigrationId::LEN]);

/// An item of type command with a number that no QEMU has, and the length of its body.
const HEAD: [u8; 5] = [0x08, 0x4d, 0x50, 0x00, 0x10];

impl MigrationId {
    /// Bytes of an id.
    pub const LEN: usize = 16;

    /// Bytes of [`MigrationId::opening`].
    pub const OPENING_LEN: usize = HEAD.len() + Self::LEN;

    /// What a source begins a connection with that goes on with this migration.
    pub fn opening(self) -> [u8; Self::OPENING_LEN] {
        let mut opening = [0; Self::OPENING_LEN];
        let (head, id) = opening.split_at_mut(HEAD.len());
        head.copy_from_slice(&HEAD);
        id.copy_from_slice(&self.0);
        opening
    }

    /// Whether a connection that begins so begins with an id.
    pub fn is_begun_by(first: [u8; 4]) -> bool {
        HEAD.starts_with(&first)
    }

    /// The id that a connection begins with. `None`: it begins with something else.
    pub fn of_opening(opening: &[u8; Self::OPENING_LEN]) -> Option<Self> {
        opening.strip_prefix(&HEAD)?.try_into().ok().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_has_its_id_and_nothing_else_is_one() {
        let id = MigrationId(*b"0123456789abcdef");
        let opening = id.opening();
        assert_eq!(opening, *b"\x08\x4d\x50\0\x100123456789abcdef");
        assert_eq!(MigrationId::of_opening(&opening), Some(id));
        for index in 0..HEAD.len() {
            let mut other = opening;
            other[index] ^= 1;
            assert_eq!(MigrationId::of_opening(&other), None, "byte {index}");
            let first = [other[0], other[1], other[2], other[3]];
            assert_eq!(MigrationId::is_begun_by(first), index == 4, "byte {index}");
        }
    }
}
