//! What stands for TLS in a build without it: types that have no values.

use std::io::{self, IoSlice};
use std::time::Duration;

use socket2::Socket;

use crate::Endpoint;
use crate::accept::client::Client;
use crate::accept::first_bytes::FirstBytes;

/// How to dial by TLS. This build has none, and no value of this type: see the features
/// `tls-aws-lc` and `tls-ring`.
#[derive(Clone, Debug)]
pub enum TlsClient {}

/// How to accept by TLS. This build has none, and no value of this type: see the features
/// `tls-aws-lc` and `tls-ring`.
#[derive(Clone, Debug)]
pub enum TlsServer {}

#[derive(Clone, Debug)]
pub(crate) enum TlsStream {}

/// A name that the certificate of a server must have.
#[derive(Clone, Debug)]
pub(crate) enum ExpectedName {}

/// How far a client has come.
#[derive(Clone, Debug)]
pub(crate) enum Stage {
    Handshake(usize),
}

pub(crate) fn expected_name(tls: &TlsClient, _: &Endpoint) -> io::Result<ExpectedName> {
    match *tls {}
}

pub(crate) async fn connect(tls: &TlsClient, _: Socket, _: ExpectedName) -> io::Result<TlsStream> {
    match *tls {}
}

impl TlsServer {
    pub(crate) async fn accept(
        &self,
        _: Client,
        _: &mut FirstBytes,
        _: &mut Stage,
    ) -> io::Result<Option<TlsStream>> {
        match *self {}
    }
}

impl TlsStream {
    pub(crate) fn socket(&self) -> &Socket {
        match *self {}
    }

    pub(crate) fn send_filled(&self, _: usize, _: &mut dyn FnMut(&mut [u8])) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn send_vectored(&self, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn recv(&self, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn recv_with(&self, _: usize, _: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn finish_sending(&self) -> io::Result<()> {
        match *self {}
    }

    pub(crate) fn close(&self) {
        match *self {}
    }

    pub(crate) fn set_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        match *self {}
    }

    pub(crate) fn timeout(&self) -> io::Result<Option<Duration>> {
        match *self {}
    }

    pub(crate) fn keys_refreshed(&self) -> u64 {
        match *self {}
    }

    pub(crate) fn client_certificate(&self) -> Option<&[u8]> {
        match *self {}
    }
}
