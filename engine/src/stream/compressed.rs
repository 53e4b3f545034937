//! Pages that are each a zlib stream of their own: QEMU's capability `compress`, up to 9.0.

#[cfg(feature = "zlib")]
use crate::error::ErrorKind;
use crate::error::{Error, Phase, Result};

/// Inflates one of them. `page` is what errors call it.
#[cfg(feature = "zlib")]
pub(crate) fn inflate(stream: &[u8], content: &mut [u8], page: impl FnOnce() -> String) -> Result<()> {
    multifd_codecs::inflate_page(stream, content).map_err(|error| {
        Error::new(ErrorKind::Codec, Phase::Active, format!("compressed {}", page())).because(error)
    })
}

/// Says that this build inflates nothing.
#[cfg(not(feature = "zlib"))]
pub(crate) fn inflate(_: &[u8], _: &mut [u8], page: impl FnOnce() -> String) -> Result<()> {
    let detail = format!(
        "compressed {}: this build has no zlib, switch off capability compress at the source",
        page()
    );
    Err(Error::incompatible(Phase::Active, detail))
}
