//! The codecs that a destination knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::{Codec, CodecId};
#[cfg(feature = "lz4")]
use crate::lz4::Lz4;
use crate::uncompressed::Uncompressed;
#[cfg(feature = "zlib")]
use crate::zlib::Zlib;
#[cfg(feature = "zstd")]
use crate::zstd::Zstd;

/// The set of codecs that a destination can decode, by the id that packets carry.
///
/// The default knows what every QEMU knows: none, zlib, zstd, and lz4 of other multifds, as far as
/// the crate was built with them. The levels of these do not matter to a destination.
#[derive(Clone, Debug)]
pub struct Codecs(BTreeMap<CodecId, Arc<dyn Codec>>);

impl Codecs {
    /// A set with nothing in it.
    pub const fn empty() -> Self {
        Self(BTreeMap::new())
    }

    /// Adds a codec, in the place of the one that had its id before.
    #[must_use]
    pub fn with(mut self, codec: Arc<dyn Codec>) -> Self {
        self.0.insert(codec.id(), codec);
        self
    }

    /// The codec that packets with this id are made by.
    pub fn get(&self, id: CodecId) -> Option<&Arc<dyn Codec>> {
        self.0.get(&id)
    }

    /// All codecs of the set, by rising id.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Codec>> {
        self.0.values()
    }
}

impl Default for Codecs {
    fn default() -> Self {
        let codecs = Self::empty().with(Arc::new(Uncompressed));
        #[cfg(feature = "zlib")]
        let codecs = codecs.with(Arc::new(Zlib::default()));
        #[cfg(feature = "zstd")]
        let codecs = codecs.with(Arc::new(Zstd::default()));
        #[cfg(feature = "lz4")]
        let codecs = codecs.with(Arc::new(Lz4));
        codecs
    }
}

#[cfg(test)]
#[cfg(all(feature = "lz4", feature = "zlib", feature = "zstd"))]
mod tests {
    use super::*;

    fn described(codecs: &Codecs) -> Vec<String> {
        codecs.iter().map(|codec| codec.describe()).collect()
    }

    #[test]
    fn default_knows_what_every_qemu_knows() {
        let codecs = Codecs::default();
        assert_eq!(described(&codecs), ["none", "zlib:1", "zstd:1", "lz4"]);
        assert_eq!(codecs.get(CodecId::ZLIB).unwrap().name(), "zlib");
        assert!(codecs.get(CodecId::QPL).is_none());
        assert!(Codecs::empty().get(CodecId::NONE).is_none());
    }

    #[test]
    fn with_replaces_by_id() {
        let codecs = Codecs::default().with(Arc::new(Zstd::level(7).unwrap()));
        assert_eq!(described(&codecs), ["none", "zlib:1", "zstd:7", "lz4"]);
    }
}
