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
        self.pem_until(list, OffsetDateTime::now_utc() + Duration::days(list.next))
    }

    /// With another time of its next update.
    fn pem_until(&self, list: &List, next_update: OffsetDateTime) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now + Duration::days(list.made),
            next_update,
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
fn an_expired_ca_is_refused_at_both_ends() {
    assert_eq!(Revoking::new().warnings(), "");
    let path = Revoking::until(-1).credentials;
    let client = TlsClient::from_directory(path.path()).unwrap_err().to_string();
    let server = TlsServer::from_directory(path.path()).unwrap_err().to_string();
    assert_eq!(client, server);
    says(
        &client,
        &["ca-cert.pem: the CA certificate \"CN=test CA\" expired at", "expected one that is valid"],
    );
}

/// A file in which the next CA follows the last.
#[test]
fn an_expired_ca_beside_a_valid_one_is_warned_of_and_not_trusted() {
    let (valid, expired) = (Revoking::new(), Revoking::until(-1));
    let both = expired.issuer.pem() + &valid.issuer.pem();
    fs::write(valid.credentials.path().join("ca-cert.pem"), &both).unwrap();
    let warnings = valid.warnings();
    assert_eq!(warnings.matches("WARN").count(), 2, "{warnings}");
    says(&warnings, &["the CA certificate \"CN=test CA\" expired at", "it is not trusted"]);
    pair(valid.credentials.client(), valid.credentials.server());
    fs::write(expired.credentials.path().join("ca-cert.pem"), &both).unwrap();
    let (here, _) = refused_client(expired.credentials.client(), valid.credentials.server());
    says(&here, &["unknown CA"]);
}

/// As after a CA was set up anew under the old name, and both are trusted for a while.
#[test]
fn of_two_cas_of_one_name_each_is_asked_by_its_own_list() {
    let [one, other] = [Revoking::new(), Revoking::new()];
    let trust_both = |lists: &[(&Revoking, &List)]| {
        let lists: String = lists.iter().map(|(authority, list)| authority.pem(list)).collect();
        for authority in [&one, &other] {
            let dir = authority.credentials.path();
            fs::write(dir.join("ca-cert.pem"), one.issuer.pem() + &other.issuer.pem()).unwrap();
            fs::write(dir.join("ca-crl.pem"), &lists).unwrap();
        }
    };
    let none = List { made: -1, next: 9, number: 1, revoked: &[] };
    let newer = List { made: 0, next: 9, number: 2, revoked: &[7] };
    let client_revoked = List { made: -2, next: 9, number: 1, revoked: &[CLIENT] };
    let pairs = || [(&one, &other), (&other, &one), (&one, &one), (&other, &other)];
    for lists in [[(&one, &none), (&other, &newer)], [(&other, &none), (&one, &newer)]] {
        trust_both(&lists);
        for (client, server) in pairs() {
            pair(client.credentials.client(), server.credentials.server());
        }
    }
    // The older list of one CA revokes: its clients are refused and no others, also where another
    // list of it would not revoke, but is still older.
    let oldest = List { made: -5, next: 9, number: 0, revoked: &[] };
    trust_both(&[(&other, &newer), (&one, &oldest), (&one, &client_revoked)]);
    for (client, server) in pairs() {
        if std::ptr::eq(client, &one) {
            let (here, _) = refused_client(client.credentials.client(), server.credentials.server());
            says(&here, &["it was revoked"]);
        } else {
            pair(client.credentials.client(), server.credentials.server());
        }
    }
}

#[test]
fn a_list_of_another_ca_of_the_same_name_is_named() {
    let [one, other] = [Revoking::new(), Revoking::new()];
    let dir = one.credentials.path();
    fs::write(dir.join("ca-crl.pem"), other.pem(&List { made: -1, next: 9, number: 1, revoked: &[] }))
        .unwrap();
    let (_, there) = refused_server(one.credentials.client(), one.credentials.server());
    says(&there, &["the revocation list of \"CN=test CA\" was not signed by the CA that signed it"]);
}

#[test]
fn an_outdated_list_is_an_error_where_lists_must_be_current() {
    let rules = TlsRules { current_lists: true, ..TlsRules::default() };
    let authority = Revoking::new();
    let dir = authority.credentials.path();
    authority.write(&[&List { made: -9, next: -5, number: 1, revoked: &[] }]);
    let client = TlsClient::with_rules(dir, rules).unwrap_err().to_string();
    assert_eq!(client, TlsServer::with_rules(dir, rules).unwrap_err().to_string());
    says(
        &client,
        &["ca-crl.pem: the revocation list of \"CN=test CA\" is out of date", "expected a current one"],
    );
    authority.write(&[&List { made: -1, next: 9, number: 2, revoked: &[] }]);
    pair(TlsClient::with_rules(dir, rules).unwrap(), TlsServer::with_rules(dir, rules).unwrap());
}

/// It was current when the end read its files.
#[test]
fn a_list_that_expires_meanwhile_is_an_error_where_lists_must_be_current() {
    let rules = TlsRules { current_lists: true, ..TlsRules::default() };
    let authority = Revoking::new();
    let dir = authority.credentials.path();
    let next = OffsetDateTime::now_utc() + Duration::seconds(2);
    let list = authority.pem_until(&List { made: -1, next: 0, number: 1, revoked: &[] }, next);
    fs::write(dir.join("ca-crl.pem"), list).unwrap();
    // On a machine that is so slow, it has expired by now.
    let Ok(server) = TlsServer::with_rules(dir, rules) else { return };
    let (_never, clock) = mpsc::channel::<()>();
    while OffsetDateTime::now_utc() <= next + Duration::seconds(1) {
        let _ = clock.recv_timeout(std::time::Duration::from_millis(100));
    }
    let client = TlsClient::from_directory(dir).unwrap();
    let (here, _) = refused_client(client, server);
    says(&here, &["the revocation list of \"CN=test CA\" is past its next update"]);
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
