//! Connections that the caller has made.

use multifd_transports::Channel;

/// What both ends say to TLS that is set up: the record layer belongs to connections that are dialled or accepted here.
pub(crate) const NO_TLS: &str = "TLS over connections of the caller's, which go as they are";

/// The number of parallel channels over the caller's connections; `configured` is what the settings say, if they do.
///
/// # Errors
/// Another number of connections, or one that cannot be a parallel channel.
pub(crate) fn count(
    configured: Option<usize>,
    main: &Channel,
    channels: &[Channel],
) -> Result<Option<usize>, String> {
    if main.file_handle().is_some() && channels.is_empty() {
        // To a file they are threads.
        return Ok(configured);
    }
    let mut all = std::iter::once(main).chain(channels);
    if let Some(other) = all.find(|channel| !channels.is_empty() && !channel.is_connection()) {
        return Err(format!("parallel channels, and one of the connections is {}, no socket", other.peer()));
    }
    match configured {
        Some(wanted) if wanted != channels.len() => {
            Err(format!("{wanted} parallel channels, but {} connections for them", channels.len()))
        }
        _ => Ok(Some(channels.len())),
    }
}
