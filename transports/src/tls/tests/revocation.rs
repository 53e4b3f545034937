//! Whom `ca-crl.pem` revokes is refused, at both ends, whatever else is in the file.

use std::fs;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use time::{Duration, OffsetDateTime};

use super::refusals::{refused_client, refused_server, says};
use super::*;

const SERVER: u64 = 1;
const CLIENT: u64 = 2;

/// A CA with its revocation lists, and a directory with a server and a client of it.
struct Revoking {
    issuer: CertifiedIssuer<'static, KeyPair>,
    credentials: Credentials,
}

/// A revocation list. Times are in days from now.
struct List {
    made: i64,
    next: i64,
    number: u64,
    revoked: &'static [u64],
}

impl Revoking {
    fn new() -> Self {
        Self::until(30)
    }

    /// With a CA certificate that is valid for so many days from now.
    fn until(days: i64) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("ca-cert.pem"), issuer.pem()).unwrap();
        for (end, serial) in [("server", SERVER), ("client", CLIENT)] {
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.serial_number = Some(SerialNumber::from(serial));
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap().pem();
            authority::Identity { certificate, key: key.serialize_pem() }.write(dir.path(), end);
        }
        Self { issuer, credentials: Credentials { dir } }
    }

    /// Makes `ca-crl.pem` of `lists`, in this order.
    fn write(&self, lists: &[&List]) {
        let text: String = lists.iter().map(|list| self.pem(list)).collect();
        fs::write(self.credentials.path().join("ca-crl.pem"), text).unwrap();
    }

    fn pem(&self, list: &List) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now + Duration::days(list.made),
            next_update: now + Duration::days(list.next),
            crl_number: SerialNumber::from(list.number),
            issuing_distribution_point: None,
            revoked_certs: list.revoked.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// What is logged as both ends read their files.
    fn warnings(&self) -> String {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let _ends = (self.credentials.client(), self.credentials.server());
        });
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Every order of three lists.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

#[test]
fn a_revoked_client_is_refused_whatever_the_order_of_lists() {
    let authority = Revoking::new();
    let lists = [
        List { made: -9, next: -5, number: 1, revoked: &[] },
        List { made: -5, next: -1, number: 2, revoked: &[7] },
        List { made: -1, next: 9, number: 3, revoked: &[7, CLIENT] },
    ];
    for order in ORDERS {
        authority.write(&order.map(|index| &lists[index]));
        let (here, there) = refused_client(authority.credentials.client(), authority.credentials.server());
        says(&here, &["it was revoked"]);
        says(&there, &["the peer refused our certificate: it was revoked"]);
    }
}

#[test]
fn a_revoked_server_is_refused_whatever_the_order_of_lists() {
    let authority = Revoking::new();
    let lists = [
        List { made: -9, next: -5, number: 1, revoked: &[] },
        List { made: -5, next: -1, number: 2, revoked: &[7] },
        List { made: -1, next: 9, number: 3, revoked: &[7, SERVER] },
    ];
    for order in ORDERS {
        authority.write(&order.map(|index| &lists[index]));
        let (here, there) = refused_server(authority.credentials.client(), authority.credentials.server());
        says(&there, &["it was revoked"]);
        says(&here, &["the peer refused our certificate: it was revoked"]);
    }
}

/// A script that revokes two certificates in a row makes two lists within a second.
#[test]
fn of_two_lists_of_one_second_the_higher_number_decides() {
    let authority = Revoking::new();
    let lists = [
        List { made: -1, next: 9, number: 255, revoked: &[7] },
        List { made: -1, next: 9, number: 256, revoked: &[CLIENT] },
    ];
    for order in [[0, 1], [1, 0]] {
        authority.write(&order.map(|index| &lists[index]));
        let (here, _) = refused_client(authority.credentials.client(), authority.credentials.server());
        says(&here, &["it was revoked"]);
    }
}

/// A certificate that was on hold is on no newer list.
#[test]
fn a_certificate_that_only_an_older_list_revokes_is_let_in() {
    let authority = Revoking::new();
    let lists = [
        List { made: -5, next: 9, number: 1, revoked: &[SERVER, CLIENT] },
        List { made: -1, next: 9, number: 2, revoked: &[7] },
    ];
    for order in [[0, 1], [1, 0]] {
        authority.write(&order.map(|index| &lists[index]));
        pair(authority.credentials.client(), authority.credentials.server());
    }
}

#[test]
fn an_outdated_list_is_warned_of_at_both_ends_unless_a_newer_one_is_there() {
    let authority = Revoking::new();
    let outdated = List { made: -9, next: -5, number: 1, revoked: &[] };
    authority.write(&[&outdated]);
    let warnings = authority.warnings();
    assert_eq!(warnings.matches("WARN").count(), 2, "{warnings}");
    says(&warnings, &["ca-crl.pem", "the revocation list of \"CN=test CA\" is out of date", "+00:00"]);
    // It still counts.
    authority.write(&[&List { revoked: &[CLIENT], ..outdated }]);
    let (here, _) = refused_client(authority.credentials.client(), authority.credentials.server());
    says(&here, &["it was revoked"]);
    authority.write(&[&outdated, &List { made: -1, next: 9, number: 2, revoked: &[] }]);
    assert_eq!(authority.warnings(), "");
}

#[test]
fn a_list_of_a_day_to_come_is_warned_of_at_both_ends() {
    let authority = Revoking::new();
    authority.write(&[
        &List { made: -1, next: 9, number: 1, revoked: &[CLIENT] },
        &List { made: 3, next: 9, number: 2, revoked: &[] },
    ]);
    let warnings = authority.warnings();
    assert_eq!(warnings.matches("WARN").count(), 2, "{warnings}");
    says(&warnings, &["ca-crl.pem", "the revocation list of \"CN=test CA\" is of ", "which is to come"]);
}

#[test]
fn an_expired_ca_is_warned_of_at_both_ends() {
    assert_eq!(Revoking::new().warnings(), "");
    let warnings = Revoking::until(-1).warnings();
    assert_eq!(warnings.matches("WARN").count(), 2, "{warnings}");
    says(&warnings, &["ca-cert.pem", "the CA certificate \"CN=test CA\" expired at", "a QEMU refuses it"]);
}

#[test]
fn a_list_that_cannot_be_used_is_named() {
    let authority = Revoking::new();
    let path = authority.credentials.path().join("ca-crl.pem");
    let problem = || {
        let client = TlsClient::from_directory(authority.credentials.path()).unwrap_err().to_string();
        let server = TlsServer::from_directory(authority.credentials.path()).unwrap_err().to_string();
        assert_eq!(client, server);
        client
    };
    fs::write(&path, "").unwrap();
    says(&problem(), &["ca-crl.pem: no revocation list in PEM form in it"]);
    fs::write(&path, "-----BEGIN X509 CRL-----\nMAMCAQE=\n-----END X509 CRL-----\n").unwrap();
    says(&problem(), &["ca-crl.pem: it holds a revocation list that cannot be read"]);
}
