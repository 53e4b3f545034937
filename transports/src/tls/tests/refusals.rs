//! A refused peer hears why, and the refusing end says it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;

/// Both ends of a connection that a client's certificate must end: the client is through with its
/// own handshake by then.
pub(super) fn refused_client(client: TlsClient, server: TlsServer) -> (String, String) {
    let serving = Serving::tcp(server);
    let one = dial(&serving.endpoint(), client).unwrap();
    let here = serving.failed().to_string();
    // It finds out when it sends, whatever the system says first.
    let there = loop {
        if let Err(error) = one.send_all(&[0; 1000]) {
            break error.to_string();
        }
    };
    // And when it receives, if it does.
    assert_eq!(one.recv(&mut [0; 8]).unwrap_err().to_string(), there);
    serving.stop();
    (here, there)
}

/// Both ends of a connection that a server's certificate must end.
pub(super) fn refused_server(client: TlsClient, server: TlsServer) -> (String, String) {
    let serving = Serving::tcp(server);
    let there = reason(dial(&serving.endpoint(), client));
    let here = serving.failed().to_string();
    serving.stop();
    (here, there)
}

#[track_caller]
pub(super) fn says(text: &str, expected: &[&str]) {
    for part in expected {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn another_ca() {
    let (ours, theirs) = (
        Credentials::new(),
        Credentials::made(&Authority::new("other CA"), &Member::server(), Some(&Member::client())),
    );
    // A client of another CA that trusts ours.
    fs::copy(ours.path().join("ca-cert.pem"), theirs.path().join("ca-cert.pem")).unwrap();
    let (here, there) = refused_client(theirs.client(), ours.server());
    says(
        &here,
        &[
            "refused the peer's certificate \"CN=client,O=Example\\, Inc\"",
            "unknown CA",
            "CN=other CA",
            "ca-cert.pem",
        ],
    );
    says(&there, &["the peer refused our certificate: unknown CA"]);
    // And a server.
    let (here, there) = refused_server(ours.client(), theirs.server());
    says(&there, &["refused the peer's certificate", "unknown CA", "CN=other CA"]);
    says(&here, &["the peer refused our certificate: unknown CA"]);
}

#[test]
fn an_expired_certificate_between_the_ca_and_the_peer_is_the_one_that_is_named() {
    let authority = Authority::new("test CA");
    let good = Credentials::made(&authority, &Member::server(), Some(&Member::client()));
    let bad = Credentials::made(&authority, &Member::server(), Some(&Member::client()));
    for end in ["server", "client"] {
        authority.member_by_expired_intermediate(&Member::server()).write(bad.path(), end);
    }
    let says_so = |text: &str| {
        says(text, &["\"CN=between\", a CA certificate that came with it, expired at ", "+00:00"]);
    };
    says_so(&refused_client(bad.client(), good.server()).0);
    says_so(&refused_server(good.client(), bad.server()).1);
}

#[test]
fn expired_and_not_valid_yet() {
    let authority = Authority::new("test CA");
    let (old, new) =
        (Member { from: -9, to: -3, ..Member::client() }, Member { from: 3, to: 9, ..Member::client() });
    for (member, word) in [(old, "it expired at"), (new, "it is not valid before")] {
        let server = Member { name: "server", hosts: Member::server().hosts, ..member.clone() };
        let good = Credentials::made(&authority, &Member::server(), Some(&Member::client()));
        let bad = Credentials::made(&authority, &server, Some(&member));
        let (here, there) = refused_client(bad.client(), good.server());
        // With the date.
        says(&here, &[word, ":", "+00:00"]);
        says(&there, &["the peer refused our certificate: it has expired or is not valid yet"]);
        let (here, there) = refused_server(good.client(), bad.server());
        says(&there, &[word, "+00:00"]);
        says(&here, &["the peer refused our certificate: it has expired"]);
    }
}

#[test]
fn another_host_name() {
    let credentials = Credentials::new();
    let client = credentials.client().hostname("destination.example").unwrap();
    let (here, there) = refused_server(client, credentials.server());
    says(&there, &["it is for localhost, 127.0.0.1, expected \"destination.example\""]);
    says(
        &here,
        &["the peer refused our certificate: bad certificate, which a wrong host name is to a client"],
    );
    assert!(credentials.client().hostname("no host name").is_err());
}

#[test]
fn no_certificate() {
    let credentials = Credentials::made(&Authority::new("test CA"), &Member::server(), None);
    assert!(!credentials.client().has_certificate());
    let (here, there) = refused_client(credentials.client(), credentials.server());
    says(&here, &["the peer has sent no certificate", "ca-cert.pem"]);
    says(&there, &["the peer demands a client certificate and we have none"]);
    // Unless it does not ask.
    let (one, other) = pair(credentials.client(), credentials.server().without_client_certificates());
    one.send_all(b"in").unwrap();
    other.recv_exact(&mut [0; 2]).unwrap();
}

#[test]
fn a_name_that_is_not_in_the_list() {
    let credentials = Credentials::new();
    let server = |names: &[&str]| credentials.server().authorise(names.iter().copied());
    let (here, there) = refused_client(credentials.client(), server(&["CN=other,*", "other.example"]));
    says(
        &here,
        &[
            "\"CN=client,O=Example\\, Inc\" (source.example)",
            "not authorised, expected CN=other,* or other.example",
        ],
    );
    says(&there, &["the peer refused our certificate: its name is not in the peer's authorisation list"]);
    for name in [
        "CN=client,O=Example\\, Inc",
        "O=Example\\, Inc,CN=client",
        "CN=client,*",
        "source.example",
        "*.example",
    ] {
        pair(credentials.client(), server(&["CN=other", name]));
    }
}

#[test]
fn a_list_demands_a_certificate() {
    let credentials = Credentials::made(&Authority::new("test CA"), &Member::server(), None);
    let server = || credentials.server();
    for server in [
        server().authorise(["*"]).without_client_certificates(),
        server().without_client_certificates().authorise(["*"]),
    ] {
        let (here, _) = refused_client(credentials.client(), server);
        says(&here, &["the peer has sent no certificate"]);
    }
}

#[test]
fn without_a_host_in_the_endpoint_the_name_must_be_said() {
    let credentials = Credentials::new();
    let dir = TempDir::new().unwrap();
    let uri = format!("unix:{}", dir.path().join("x.sock").display());
    let serving = Serving::new(&uri, Some(credentials.server()), LONG);
    let error = reason(dial(&serving.endpoint(), credentials.client()));
    says(&error, &["TLS over unix:", "no host name to expect"]);
    let client = credentials.client().hostname("127.0.0.1").unwrap();
    say_hello(dial(&serving.endpoint(), client).unwrap(), &serving);
    serving.stop();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let other = Credentials::new();
    let problem = |change: &dyn Fn(&PathBuf)| {
        let credentials = Credentials::new();
        change(&credentials.path().to_owned());
        TlsServer::from_directory(credentials.path()).unwrap_err().to_string()
    };
    says(
        &problem(&|dir| fs::remove_file(dir.join("ca-cert.pem")).unwrap()),
        &["ca-cert.pem: there is no such file"],
    );
    says(
        &problem(&|dir| fs::write(dir.join("ca-cert.pem"), "text").unwrap()),
        &["ca-cert.pem: no certificate in PEM form"],
    );
    says(
        &problem(&|dir| fs::remove_file(dir.join("server-key.pem")).unwrap()),
        &["server-key.pem: there is no such file"],
    );
    says(
        &problem(&|dir| fs::write(dir.join("server-key.pem"), "").unwrap()),
        &["server-key.pem: no private key in PEM form"],
    );
    let mismatched = |dir: &PathBuf| {
        fs::copy(other.path().join("server-key.pem"), dir.join("server-key.pem")).unwrap();
    };
    says(&problem(&mismatched), &["server-key.pem: not the key of", "server-cert.pem"]);
    let no_server = |dir: &PathBuf| {
        ["cert", "key"].iter().for_each(|end| fs::remove_file(dir.join(format!("server-{end}.pem"))).unwrap())
    };
    says(&problem(&no_server), &["server-cert.pem: there is no such file"]);
    // A link that leads nowhere is not the absence of a list of the revoked, nor of a certificate.
    let lost = |dir: &PathBuf, name| std::os::unix::fs::symlink("nowhere", dir.join(name)).unwrap();
    says(&problem(&|dir| lost(dir, "ca-crl.pem")), &["ca-crl.pem: there is no such file"]);
    let ours = Credentials::made(&Authority::new("test CA"), &Member::server(), None);
    lost(&ours.path().to_owned(), "client-cert.pem");
    let error = TlsClient::from_directory(ours.path()).unwrap_err().to_string();
    says(&error, &["client-cert.pem: there is no such file"]);
    let garbage = |dir: &PathBuf| {
        let text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        fs::write(dir.join("server-cert.pem"), text).unwrap();
        fs::set_permissions(dir.join("server-cert.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    };
    says(&problem(&garbage), &["server-cert.pem: a certificate that cannot be read"]);
    for (label, begin) in [("ENCRYPTED PRIVATE KEY", ""), ("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\n\n")] {
        let encrypted = |dir: &PathBuf| {
            let text = format!("-----BEGIN {label}-----\n{begin}AAAA\n-----END {label}-----\n");
            fs::write(dir.join("server-key.pem"), text).unwrap();
        };
        says(&problem(&encrypted), &["server-key.pem: the private key is encrypted", "openssl pkey -in"]);
    }
    let ed448 = |dir: &PathBuf| {
        let text = "-----BEGIN PRIVATE KEY-----\nMEcCAQAwBQYDK2VxBDsEOXxsCP4XIgnEJ3UThvEqcLfenNAXv1maPDdlJl97gKyR\nXo1H+QEwhH4z5O4nh2QucI7VLxO0CSviGQ==\n-----END PRIVATE KEY-----\n";
        fs::write(dir.join("server-key.pem"), text).unwrap();
    };
    says(
        &problem(&ed448),
        &["server-key.pem: a private key of a kind or size that cannot be used, expected RSA"],
    );
}
