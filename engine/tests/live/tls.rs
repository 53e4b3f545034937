//! The same, encrypted: with keys that change all the time, and with an end that is refused.

use std::fs;
use std::sync::Arc;

use multifd_codecs::{Codec, Uncompressed, Zstd};
use multifd_engine::{Arrived, ErrorKind};
use multifd_transports::{TlsClient, TlsServer};

use crate::credentials::credentials;
use crate::guest::Guest;
use crate::{LOAD, PAGES, There, assert_equal, move_over, source};

#[test]
fn a_guest_moves_encrypted_across_new_keys() {
    let dir = credentials("CA");
    let often = (1 << 20).try_into().unwrap();
    let codecs: [Arc<dyn Codec>; 2] = [Arc::new(Uncompressed), Arc::new(Zstd::level(1).unwrap())];
    for (channels, codec) in [(0, &codecs[0]), (1, &codecs[0]), (3, &codecs[0]), (3, &codecs[1])] {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let server = TlsServer::from_directory(dir.path()).unwrap().refresh_keys_after(often);
        let client = TlsClient::from_directory(dir.path()).unwrap().refresh_keys_after(often);
        let there = There::listen_as(Some(server), Arrived::accept);
        let source = source(&guest).channels(channels).codec(Arc::clone(codec)).tls(client).build().unwrap();
        let report = move_over(&guest, source.connect(&there.uri).unwrap(), 4).unwrap();
        assert!(report.confirmed);
        let (block, result) = there.end();
        result.unwrap();
        assert_equal(&guest.block, &block);
    }
}

#[test]
fn a_destination_that_refuses_the_source_is_heard_while_channels_are_dialled() {
    let (ours, theirs) = (credentials("our CA"), credentials("their CA"));
    // The source trusts the destination, but not the other way round.
    fs::copy(theirs.path().join("ca-cert.pem"), ours.path().join("ca-cert.pem")).unwrap();
    let there = There::listen_as(Some(TlsServer::from_directory(theirs.path()).unwrap()), Arrived::accept);
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let client = TlsClient::from_directory(ours.path()).unwrap();
    let source = source(&guest).channels(4).tls(client).build().unwrap();
    let error = source.connect(&there.uri).and_then(|precopy| move_over(&guest, precopy, 1)).unwrap_err();
    assert!(error.chain().contains("the peer refused our certificate: unknown CA"), "{}", error.chain());
    assert!(error.source_may_resume());
    // A source that has not proved itself does not end the wait for another.
    there.canceller.cancel();
    let (_, result) = there.end();
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
}
