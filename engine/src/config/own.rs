//! Connections that the caller has made.

use multifd_transports::Channel;

/// The number of parallel channels over the caller's connections; `configured` is what the settings
/// say, if they do.
///
/// # Errors
/// Another number of connections, or one that cannot be a parallel channel.
pub(crate) fn count(
    configured: Option<usize>,
    main: &Channel,
    channels: &[Channel],
    tls: bool,
) -> Result<Option<usize>, String> {
    if main.file_handle().is_some() && channels.is_empty() && !tls {
        // To a file they are threads.
        return Ok(configured);
    }
    let mut all = std::iter::once(main).chain(channels);
    let other = all.find(|channel| !channel.is_connection()).map(Channel::peer);
    match other {
        Some(other) if tls => return Err(format!("TLS, and one of the connections is {other}, no socket")),
        Some(other) if !channels.is_empty() => {
            return Err(format!("parallel channels, and one of the connections is {other}, no socket"));
        }
        _ => {}
    }
    match configured {
        Some(wanted) if wanted != channels.len() => {
            Err(format!("{wanted} parallel channels, but {} connections for them", channels.len()))
        }
        _ => Ok(Some(channels.len())),
    }
}
