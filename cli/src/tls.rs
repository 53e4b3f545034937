//! What the TLS flags ask for.

use multifd_transports::{InvalidCredentials, TlsClient, TlsRules, TlsServer};

use crate::flags::{Common, Receive};
use crate::outcome::Failure;

/// For the end that dials. `None` without `--tls-dir`.
pub(crate) fn client(common: &Common) -> Result<Option<TlsClient>, Failure> {
    let Some(directory) = &common.tls_dir else { return Ok(None) };
    let client =
        TlsClient::with_rules(directory, rules(common)).and_then(|client| match &common.tls_hostname {
            Some(name) => client.hostname(name),
            None => Ok(client),
        });
    client.map(Some).map_err(invalid)
}

/// For the end that listens. `None` without `--tls-dir`.
pub(crate) fn server(flags: &Receive, common: &Common) -> Result<Option<TlsServer>, Failure> {
    let Some(directory) = &common.tls_dir else { return Ok(None) };
    let server =
        TlsServer::with_rules(directory, rules(common)).map_err(invalid)?.authorise(flags.tls_authz.clone());
    Ok(Some(if flags.tls_no_client_auth { server.without_client_certificates() } else { server }))
}

fn rules(common: &Common) -> TlsRules {
    TlsRules { current_lists: common.tls_crl_strict, ..TlsRules::default() }
}

fn invalid(error: InvalidCredentials) -> Failure {
    Failure::Usage(format!("unusable TLS credentials: {error}"))
}
