//! What the TLS flags ask for.

use multifd_transports::{InvalidCredentials, TlsClient, TlsServer};

use crate::flags::{Common, Receive};
use crate::outcome::Failure;

/// For the end that dials. `None` without `--tls-dir`.
pub(crate) fn client(common: &Common) -> Result<Option<TlsClient>, Failure> {
    let Some(directory) = &common.tls_dir else { return Ok(None) };
    let client = TlsClient::from_directory(directory).and_then(|client| match &common.tls_hostname {
        Some(name) => client.hostname(name),
        None => Ok(client),
    });
    client.map(Some).map_err(invalid)
}

/// For the end that listens. `None` without `--tls-dir`.
pub(crate) fn server(flags: &Receive, common: &Common) -> Result<Option<TlsServer>, Failure> {
    let Some(directory) = &common.tls_dir else { return Ok(None) };
    let server = TlsServer::from_directory(directory).map_err(invalid)?.authorise(flags.tls_authz.clone());
    Ok(Some(if flags.tls_no_client_auth { server.without_client_certificates() } else { server }))
}

fn invalid(error: InvalidCredentials) -> Failure {
    Failure::Usage(format!("unusable TLS credentials: {error}"))
}
