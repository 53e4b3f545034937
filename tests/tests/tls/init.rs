//! `multifd tls-init`: QEMU takes what it makes, as its own checks are concerned.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use multifd_tests::{Multifd, Outcome, Receive, Settings, Side, ram, skip_without_qemu};

use crate::fixture::{SOON, Vm, encrypted};

#[test]
fn qemu_takes_what_tls_init_makes() -> Outcome {
    skip_without_qemu!();
    let vm = Vm::new()?;
    let dir = vm.scratch.path("made");
    let text = dir.to_str().unwrap_or_default();
    let init = ["tls-init", text, "--host", "localhost", "127.0.0.1", "--days", "2"];
    Multifd::spawn("init", init)?.wait_success(SOON)?;
    for end in ["ca", "server", "client"] {
        let mode = fs::metadata(dir.join(format!("{end}-key.pem")))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{end}");
    }
    let mut again = Multifd::spawn("again", init)?;
    assert_eq!(again.wait(SOON)?.code(), Some(1));
    assert!(again.stderr().text().contains("ca-cert.pem is there already, and is not overwritten"));

    // With all of QEMU's own checks of them.
    let object = |end| format!("tls-creds-x509,id=tls0,dir={text},endpoint={end},verify-peer=on");
    let settings =
        encrypted(&Settings { channels: Some(2), return_path: true, ..Settings::default() }, false);
    let mut source = vm.source(Some(&object("client")))?;
    let out = vm.scratch.path("checkpoint");
    let flags = ["--tls-dir", text, "--tls-authz", "CN=client,O=multifd"];
    let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &out, &flags)?;
    source.set_up(&settings, Side::Source)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON)?;
    receive.wait_success(SOON)?;
    let mut destination = vm.destination(&[&object("server")])?;
    destination.set_up(&settings, Side::Destination)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    let mut send = Multifd::send_with(&out, &uri, &settings, &["--tls-dir", text])?;
    send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    ram::check_equal(source.ram(), destination.ram())
}

/// Both ends ours.
#[test]
fn a_checkpoint_goes_from_ours_to_ours() -> Outcome {
    skip_without_qemu!();
    let vm = Vm::new()?;
    let (first, second, dir) = (vm.scratch.path("first"), vm.scratch.path("second"), vm.scratch.path("made"));
    let text = dir.to_str().unwrap_or_default();
    Multifd::spawn("init", ["tls-init", text, "--host", "localhost"])?.wait_success(SOON)?;
    let mut source = vm.source(None)?;
    source.set_up(&Settings::default(), Side::Source)?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &first)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON)?;
    receive.wait_success(SOON)?;
    let settings = Settings { channels: Some(3), return_path: true, ..Settings::default() };
    let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &second, &["--tls-dir", text])?;
    let flags = ["--tls-dir", text, "--tls-hostname", "localhost"];
    let mut send = Multifd::send_with(&first, receive.uri(), &settings, &flags)?;
    send.wait_success(SOON)?;
    receive.wait_success(SOON)?;
    let open = multifd_tests::CheckpointFiles::open;
    open(&first)?.check_equal(&open(&second)?)
}
