//! Whose cryptography it is: one AEAD interface over the two libraries.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

#[cfg(not(any(feature = "aws-lc", feature = "ring")))]
compile_error!("TLS needs one of the features aws-lc and ring");

/// A library of cryptographic primitives. Which are there, the crate's features decide; docs/tls.md
/// compares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsProvider {
    /// aws-lc-rs.
    #[cfg(feature = "aws-lc")]
    AwsLc,
    /// ring.
    #[cfg(feature = "ring")]
    Ring,
}

impl TlsProvider {
    /// All that were compiled in, the default first.
    pub const ALL: &'static [Self] = &[
        #[cfg(feature = "aws-lc")]
        Self::AwsLc,
        #[cfg(feature = "ring")]
        Self::Ring,
    ];

    /// What rustls needs of it.
    pub(crate) fn for_rustls(self) -> Arc<CryptoProvider> {
        Arc::new(match self {
            #[cfg(feature = "aws-lc")]
            Self::AwsLc => rustls::crypto::aws_lc_rs::default_provider(),
            #[cfg(feature = "ring")]
            Self::Ring => rustls::crypto::ring::default_provider(),
        })
    }
}

impl Default for TlsProvider {
    /// aws-lc-rs if it is compiled in.
    fn default() -> Self {
        #[cfg(feature = "aws-lc")]
        return Self::AwsLc;
        #[cfg(not(feature = "aws-lc"))]
        return Self::Ring;
    }
}

/// Bytes of a nonce, of every AEAD of TLS.
pub(crate) const NONCE_LEN: usize = 12;
/// Bytes of a tag, of every AEAD of TLS.
pub(crate) const TAG_LEN: usize = 16;

/// The AEADs of the cipher suites that rustls has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

/// The library would not take a key, or the bytes are not what was encrypted. It does not say more,
/// on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unsound;

/// A key for one direction.
pub(crate) enum Key {
    #[cfg(feature = "aws-lc")]
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    #[cfg(feature = "ring")]
    Ring(Box<ring::aead::LessSafeKey>),
}

/// The body of [`Key::new`]: the libraries differ in their names only.
macro_rules! key {
    ($library:ident, $algorithm:expr, $bytes:expr) => {{
        use $library::aead::{AES_128_GCM, AES_256_GCM, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
        let algorithm = match $algorithm {
            Algorithm::Aes128Gcm => &AES_128_GCM,
            Algorithm::Aes256Gcm => &AES_256_GCM,
            Algorithm::Chacha20Poly1305 => &CHACHA20_POLY1305,
        };
        LessSafeKey::new(UnboundKey::new(algorithm, $bytes).map_err(|_| Unsound)?)
    }};
}

macro_rules! seal {
    ($library:ident, $key:expr, $nonce:expr, $header:expr, $text:expr, $tag:expr) => {{
        use $library::aead::{Aad, Nonce};
        let nonce = Nonce::assume_unique_for_key($nonce);
        let tag = $key.seal_in_place_separate_tag(nonce, Aad::from($header), $text).map_err(|_| Unsound)?;
        $tag.copy_from_slice(tag.as_ref());
        Ok(())
    }};
}

macro_rules! open {
    ($library:ident, $key:expr, $nonce:expr, $header:expr, $text:expr) => {{
        use $library::aead::{Aad, Nonce};
        let nonce = Nonce::assume_unique_for_key($nonce);
        $key.open_in_place(nonce, Aad::from($header), $text).map(|text| text.len()).map_err(|_| Unsound)
    }};
}

impl Key {
    pub(crate) fn new(provider: TlsProvider, algorithm: Algorithm, bytes: &[u8]) -> Result<Self, Unsound> {
        Ok(match provider {
            #[cfg(feature = "aws-lc")]
            TlsProvider::AwsLc => Self::AwsLc(key!(aws_lc_rs, algorithm, bytes)),
            #[cfg(feature = "ring")]
            TlsProvider::Ring => Self::Ring(Box::new(key!(ring, algorithm, bytes))),
        })
    }

    /// Encrypts `text` where it is. No nonce may come twice with a key. `tag` is of [`TAG_LEN`].
    pub(crate) fn seal(
        &self,
        nonce: [u8; NONCE_LEN],
        header: &[u8],
        text: &mut [u8],
        tag: &mut [u8],
    ) -> Result<(), Unsound> {
        match self {
            #[cfg(feature = "aws-lc")]
            Self::AwsLc(key) => seal!(aws_lc_rs, key, nonce, header, text, tag),
            #[cfg(feature = "ring")]
            Self::Ring(key) => seal!(ring, key, nonce, header, text, tag),
        }
    }

    /// Decrypts `text`, which the tag follows, where it is; gives the length without the tag.
    pub(crate) fn open(
        &self,
        nonce: [u8; NONCE_LEN],
        header: &[u8],
        text: &mut [u8],
    ) -> Result<usize, Unsound> {
        match self {
            #[cfg(feature = "aws-lc")]
            Self::AwsLc(key) => open!(aws_lc_rs, key, nonce, header, text),
            #[cfg(feature = "ring")]
            Self::Ring(key) => open!(ring, key, nonce, header, text),
        }
    }
}
