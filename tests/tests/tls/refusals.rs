//! Both the end that is refused and the one that refuses report what and why; QEMU at one end and
//! we at the other.

use std::fs;

use multifd_tests::process::Signal;
use multifd_tests::{
    Authority, CommandReport, Failure, Member, Multifd, Outcome, Qemu, Receive, Scratch, Settings, Side,
    skip_without_qemu,
};

use crate::fixture::{Credentials, SOON, Vm, encrypted};

/// What GnuTLS says of an alert, whatever it was.
const ALERT: &str = "A TLS fatal alert has been received";

/// What both ends have said.
struct Said {
    ours: String,
    theirs: String,
}

impl Said {
    #[track_caller]
    fn check(&self, ours: &[&str], theirs: &[&str]) {
        for (said, expected) in [(&self.ours, ours), (&self.theirs, theirs)] {
            for part in expected {
                assert!(said.contains(part), "{said:?} lacks {part:?}");
            }
        }
    }
}

/// A QEMU with `their_object` moves to ours, with these flags. It is refused with a warning, and
/// ours goes on waiting for its source.
fn from_qemu(their_object: Option<&str>, flags: &[&str]) -> Outcome<Said> {
    let vm = Vm::new()?;
    let mut source = vm.source(their_object)?;
    let settings = Settings { return_path: true, ..Settings::default() };
    let settings = if their_object.is_some() { encrypted(&settings, false) } else { settings };
    let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &vm.scratch.path("out"), flags)?;
    source.set_up(&settings, Side::Source)?;
    source.migrate(receive.uri())?;
    let report = source.wait_end(SOON)?;
    assert_eq!(report.status, "failed");
    assert_eq!(source.run_state()?, "running");
    let refused = "connection refused, the migration goes on";
    receive.process().stderr().wait_for(refused, 0, SOON)?;
    receive.process().signal(Signal::INT)?;
    assert_eq!(receive.process().wait(SOON)?.code(), Some(130), "it waited until it was cancelled");
    assert!(!vm.scratch.path("out").exists(), "nothing is left of it");
    Ok(Said { ours: receive.process().stderr().text(), theirs: report.error.unwrap_or_default() })
}

/// A guest that is stored on disk, to be sent to QEMUs.
struct Stored {
    vm: Vm,
}

impl Stored {
    fn new() -> Outcome<Self> {
        let vm = Vm::new()?;
        let mut source = vm.source(None)?;
        source.set_up(&Settings::default(), Side::Source)?;
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &vm.scratch.path("stored"))?;
        source.migrate(receive.uri())?;
        source.wait_completed(SOON)?;
        receive.wait_success(SOON)?;
        Ok(Self { vm })
    }

    /// It moves to a QEMU with `their_objects`, which says `theirs` on its stderr.
    fn to_qemu(
        &self,
        their_objects: &[&str],
        authz: bool,
        flags: &[&str],
        theirs: &'static str,
    ) -> Outcome<Said> {
        let mut destination = self.vm.destination(their_objects)?;
        let settings = Settings { channels: Some(2), return_path: true, ..Settings::default() };
        let mut theirs_set =
            if their_objects.is_empty() { settings.clone() } else { encrypted(&settings, false) };
        if authz {
            theirs_set.parameters.insert("tls-authz".into(), "auth0".into());
        }
        destination.set_up(&theirs_set, Side::Destination)?;
        let uri = destination.listen("tcp:127.0.0.1:0")?;
        let mut send = Multifd::send_with(&self.vm.scratch.path("stored"), &uri, &settings, flags)?;
        assert_eq!(send.wait(SOON)?.code(), Some(1), "{}", send.explain("ended"));
        let ours = CommandReport::by(&send)?.text("error")?.to_owned();
        Ok(Said { ours, theirs: said(&mut destination, theirs)? })
    }
}

/// All that a QEMU has said on its stderr, as soon as `word` is in it.
fn said(qemu: &mut Qemu, word: &'static str) -> Outcome<String> {
    let find = |said: &[u8]| {
        let said = String::from_utf8_lossy(said);
        said.contains(word).then(|| said.into_owned())
    };
    qemu.process().stderr().wait_until(word, SOON, find)
}

/// Good credentials, and bad ones of several kinds that trust the good ones' CA.
struct All {
    scratch: Scratch,
    authority: Authority,
    good: Credentials,
}

impl All {
    fn new() -> Outcome<Self> {
        let (scratch, authority) = (Scratch::new()?, Authority::new("test CA")?);
        let good = Credentials::issued(
            &scratch,
            "good",
            &authority,
            Some(&Member::server()),
            Some(&Member::client()),
        )?;
        Ok(Self { scratch, authority, good })
    }

    fn of_another_ca(&self) -> Outcome<Credentials> {
        let other = Authority::new("other CA")?;
        let (server, client) = (Member::server(), Member::client());
        Credentials::issued(&self.scratch, "other", &other, Some(&server), Some(&client))?
            .trusting(&self.good)
    }

    fn issued(&self, server: &Member, client: Option<&Member>) -> Outcome<Credentials> {
        let name = format!("bad-{}-{}", server.days.0, client.is_some());
        Credentials::issued(&self.scratch, &name, &self.authority, Some(server), client)
    }
}

#[test]
fn another_ca() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let (good, other) = (&all.good, &all.of_another_ca()?);
    // The source's certificate.
    from_qemu(Some(&other.object("client", None)), &["--tls-dir", good.text()])?
        .check(&["refused the peer's certificate", "unknown CA, it was signed by \"CN=other CA\""], &[ALERT]);
    // The destination's.
    from_qemu(Some(&good.object("client", None)), &["--tls-dir", other.text()])?
        .check(&["the TLS handshake", "refused our certificate"], &["hasn't got a known issuer"]);
    let stored = Stored::new()?;
    stored
        .to_qemu(&[&good.object("server", None)], false, &["--tls-dir", other.text()], "ertificate")?
        .check(
            &["right after the TLS handshake: it may have refused our certificate"],
            &["hasn't got a known issuer"],
        );
    stored
        .to_qemu(&[&other.object("server", None)], false, &["--tls-dir", good.text()], "TLS")?
        .check(&["refused the peer's certificate", "unknown CA, it was signed by \"CN=other CA\""], &[ALERT]);
    Ok(())
}

#[test]
fn expired() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let (good, old) =
        (&all.good, &all.issued(&Member::server().expired(), Some(&Member::client().expired()))?);
    from_qemu(Some(&old.object("client", None)), &["--tls-dir", good.text()])?
        .check(&["refused the peer's certificate", "it expired at"], &[ALERT]);
    from_qemu(Some(&good.object("client", None)), &["--tls-dir", old.text()])?
        .check(&["the TLS handshake", "refused our certificate"], &["The certificate is not trusted"]);
    let stored = Stored::new()?;
    stored.to_qemu(&[&good.object("server", None)], false, &["--tls-dir", old.text()], "ertificate")?.check(
        &["right after the TLS handshake: it may have refused our certificate"],
        &["The certificate is not trusted"],
    );
    stored
        .to_qemu(&[&old.object("server", None)], false, &["--tls-dir", good.text()], "TLS")?
        .check(&["refused the peer's certificate", "it expired at"], &[ALERT]);
    Ok(())
}

#[test]
fn another_host_name() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let good = &all.good;
    let elsewhere =
        &all.issued(&Member::new("destination", &["elsewhere.example"]), Some(&Member::client()))?;
    from_qemu(Some(&good.object("client", None)), &["--tls-dir", elsewhere.text()])?.check(
        &["the TLS handshake", "refused our certificate"],
        &["Certificate does not match the hostname 127.0.0.1"],
    );
    let stored = Stored::new()?;
    stored
        .to_qemu(&[&elsewhere.object("server", None)], false, &["--tls-dir", good.text()], "TLS")?
        .check(&["it is for elsewhere.example, expected \"127.0.0.1\""], &[ALERT]);
    let flags = ["--tls-dir", good.text(), "--tls-hostname", "other.example"];
    stored
        .to_qemu(&[&good.object("server", None)], false, &flags, "TLS")?
        .check(&["it is for localhost, 127.0.0.1, expected \"other.example\""], &[ALERT]);
    Ok(())
}

#[test]
fn no_client_certificate() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let (good, without) = (&all.good, &all.issued(&Member::server(), None)?);
    from_qemu(Some(&without.object("client", None)), &["--tls-dir", good.text()])?
        .check(&["the peer has sent no certificate, expected one signed by a CA of"], &[ALERT]);
    Stored::new()?
        .to_qemu(&[&good.object("server", None)], false, &["--tls-dir", without.text()], "ertificate")?
        .check(&["it may demand a client certificate, and we have none"], &["No certificate was found"]);
    Ok(())
}

#[test]
fn a_name_outside_the_list() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let good = &all.good;
    let flags = ["--tls-dir", good.text(), "--tls-authz", "CN=other,*", "--tls-authz", "other.example"];
    from_qemu(Some(&good.object("client", None)), &flags)?.check(
        &["(source.example): its name is not authorised, expected CN=other,* or other.example"],
        &[ALERT],
    );
    let list = |name: &str| {
        format!(
            r#"{{"qom-type":"authz-list","id":"auth0","policy":"deny","rules":[{{"match":"{name}","policy":"allow","format":"glob"}}]}}"#
        )
    };
    let stored = Stored::new()?;
    stored
        .to_qemu(
            &[&list("CN=other,*"), &good.object("server", None)],
            true,
            &["--tls-dir", good.text()],
            "TLS",
        )?
        .check(
            &["right after the TLS handshake: it may have refused our certificate"],
            &["authz check for CN=source,O=Example is denied"],
        );
    Ok(())
}

#[test]
fn one_end_without_tls() -> Outcome {
    skip_without_qemu!();
    let all = All::new()?;
    let good = &all.good;
    from_qemu(None, &["--tls-dir", good.text()])?
        .check(&["the peer does not speak TLS: its first bytes are 51 45 56 4d"], &[]);
    from_qemu(Some(&good.object("client", None)), &[])?
        .check(&["the peer speaks TLS, and this side is not set up for it"], &["TLS handshake failed"]);
    let stored = Stored::new()?;
    stored
        .to_qemu(&[&good.object("server", None)], false, &[], "TLS")?
        .check(&[], &["An unexpected TLS packet was received"]);
    stored
        .to_qemu(&[], false, &["--tls-dir", good.text()], "")?
        .check(&["in the TLS handshake", "is it set up for TLS?"], &[]);
    Ok(())
}

#[test]
fn unusable_files_are_a_usage_error() -> Outcome {
    let scratch = Scratch::new()?;
    let good = Credentials::new(&scratch)?;
    fs::remove_file(good.dir().join("server-key.pem"))?;
    let out = scratch.path("out").display().to_string();
    let flags = ["receive", "tcp:127.0.0.1:0", "--out", &out, "--json", "--tls-dir", good.text()];
    let mut receive = Multifd::spawn("receive", flags)?;
    assert_eq!(receive.wait(SOON)?.code(), Some(2));
    let error = CommandReport::by(&receive)?.text("error")?.to_owned();
    if error.contains("server-key.pem: there is no such file") { Ok(()) } else { Err(Failure::new(error)) }
}
