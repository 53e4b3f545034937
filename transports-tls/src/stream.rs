//! An established connection, on a blocking socket.
//!
//! ```text
//!  sending thread                                receiving thread
//!   sending: Sealer ── records ──> socket ──> receiving: Opener
//!      | before each batch: looks                | a key update: next key, `answer_due`
//!      | what the peer has sent, without waiting | an alert, an end: `received_end` tells the sender
//!      +--------------- secrets: the next keys --+
//! ```
//!
//! The directions have nothing in common but the secrets that the next keys come from, so a thread
//! that is blocked in one never holds up the other. The receiver writes nothing: the answer to a
//! key update has to go before the next data, and not before (RFC 8446 §4.6.3), so the next sender
//! sends it.
//!
//! Lock order: never wait for `sending` while holding `receiving`, or the reverse. An alert is sent
//! at once if `sending` is free, else by the thread that holds it.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::net::Shutdown;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use rustls::pki_types::CertificateDer;
use socket2::Socket;

use super::handshake::Parts;
use super::opener::{Bad, Opened, Opener};
use super::provider::{TlsProvider, Unsound};
use super::record::content;
use super::sealer::{MAX_BATCH_TEXT, Sealer};
use super::secrets::{Direction, Secrets};
use super::socket::AsyncSocket;
use super::{alert, alert::Role};

mod reason;

/// An encrypted connection on a blocking socket. One thread may send while another receives.
pub struct TlsStream {
    socket: Socket,
    sending: Mutex<Sending>,
    receiving: Mutex<Receiving>,
    secrets: Mutex<Secrets>,
    /// The peer has asked for our next key.
    answer_due: AtomicBool,
    /// The fatal alert that the peer is to get; 0: none.
    alert_due: AtomicU8,
    /// New keys for sending so far.
    refreshed: AtomicU64,
    /// Why the peer sends no more, as soon as it is known.
    received_end: Mutex<Option<Ended>>,
    end_received: Condvar,
    settings: Settings,
    /// The client's, of a server that asks for one.
    client_certificate: Option<CertificateDer<'static>>,
}

/// What both ends of a connection know of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) role: Role,
    /// Whether this end has shown a certificate, or would have.
    pub(crate) certified: bool,
    pub(crate) provider: TlsProvider,
    pub(crate) refresh_after: Option<NonZeroU64>,
}

struct Sending {
    sealer: Sealer,
    /// Why sending has ended.
    ended: Option<Ended>,
}

struct Receiving {
    opener: Opener,
    /// How it has ended. `None`: it has not.
    ended: Option<Ended>,
}

/// How a direction ended; final.
#[derive(Clone, Debug)]
enum Ended {
    /// Orderly: `close_notify`, or the end of the connection between two records.
    Well,
    Badly(ErrorKind, String),
}

/// Whether to wait for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    No,
    Yes,
}

impl TlsStream {
    /// Takes what a handshake has made. The socket does not block yet.
    pub(crate) fn new(parts: Parts, settings: Settings) -> Self {
        let Parts { socket, sealer, opener, secrets } = parts;
        Self {
            socket,
            sending: Mutex::new(Sending { sealer, ended: None }),
            receiving: Mutex::new(Receiving { opener, ended: None }),
            secrets: Mutex::new(secrets),
            answer_due: AtomicBool::new(false),
            alert_due: AtomicU8::new(0),
            refreshed: AtomicU64::new(0),
            received_end: Mutex::default(),
            end_received: Condvar::new(),
            settings,
            client_certificate: None,
        }
    }

    /// Notes whose certificate the handshake has verified.
    pub(crate) fn with_client_certificate(self, certificate: Option<CertificateDer<'static>>) -> Self {
        Self { client_certificate: certificate, ..self }
    }

    /// The client's certificate, in DER, which was verified. `None` at a client's end, and of a
    /// client without one.
    pub fn client_certificate(&self) -> Option<&[u8]> {
        self.client_certificate.as_deref()
    }

    /// The socket below, whose options may be looked at.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Where to wait for the socket, until it is to block.
    pub(crate) fn waiting<S: AsyncSocket>(&self) -> io::Result<S> {
        S::new(self.socket.try_clone()?)
    }

    /// The end of the asynchronous part.
    pub(crate) fn into_blocking(self) -> io::Result<Self> {
        self.socket.set_nonblocking(false)?;
        Ok(self)
    }

    /// Sends up to `len` bytes, which `fill` writes in pieces, in order. Gives how many went;
    /// `fill` may have been asked for more than that, if the connection broke.
    ///
    /// # Errors
    /// The socket's own, or what the peer's alert says.
    pub fn send_filled(&self, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> io::Result<usize> {
        self.while_sending(|sending| {
            check(sending.ended.as_ref())?;
            self.listen()?;
            let encrypted = self.seal(sending, len, fill);
            self.write(sending, encrypted)
        })
    }

    /// The same of slices.
    ///
    /// # Errors
    /// As [`send_filled`](Self::send_filled).
    pub fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let len = bufs.iter().map(|buf| buf.len()).sum::<usize>().min(MAX_BATCH_TEXT);
        let mut bytes = bufs.iter().flat_map(|buf| (!buf.is_empty()).then_some(&buf[..]));
        let mut piece: &[u8] = &[];
        self.send_filled(len, &mut |mut into| {
            while !into.is_empty() {
                if piece.is_empty() {
                    piece = bytes.next().unwrap_or_default();
                }
                let (head, tail) = piece.split_at(piece.len().min(into.len()));
                let (now, later) = into.split_at_mut(head.len());
                now.copy_from_slice(head);
                (into, piece) = (later, tail);
                if head.is_empty() {
                    return;
                }
            }
        })
    }

    /// Receives at least a byte; 0 is the peer's end.
    ///
    /// # Errors
    /// The socket's own, a record that does not decrypt, or the peer's alert.
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv_with(buf.len(), &mut |data| {
            buf.split_at_mut(data.len()).0.copy_from_slice(data);
            data.len()
        })
    }

    /// Shows `take` what is there, at least a byte and at most `most`, and forgets as much as it
    /// has taken. 0 is the peer's end.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn recv_with(&self, most: usize, take: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<usize> {
        self.receive(most, Wait::Yes, take)
    }

    /// As [`recv`](Self::recv), but does not wait: `WouldBlock`.
    pub(crate) fn recv_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf.len(), Wait::No, &mut |data| {
            buf.split_at_mut(data.len()).0.copy_from_slice(data);
            data.len()
        })
    }

    /// Ends what is sent, with a `close_notify`.
    ///
    /// # Errors
    /// That of the first fault, if sending has ended badly before.
    pub fn finish_sending(&self) -> io::Result<()> {
        self.while_sending(|sending| self.send_close_notify(sending))
    }

    fn send_close_notify(&self, sending: &mut Sending) -> io::Result<()> {
        match &sending.ended {
            Some(Ended::Well) => return Ok(()),
            ended => check(ended.as_ref())?,
        }
        sending.sealer.clear();
        let encrypted = sending.sealer.control(content::ALERT, &alert::CLOSE_NOTIFY);
        // A peer that has all it wants may be gone already. Bytes left unread when the socket is
        // closed would reset the connection, and the close_notify might not arrive.
        if let Err(error) = self.write(sending, encrypted).and_then(|_| self.listen()) {
            tracing::debug!(%error, "close_notify of a TLS connection");
        }
        sending.ended = Some(Ended::Well);
        self.socket.shutdown(Shutdown::Write)
    }

    /// Ends both directions; blocked calls of other threads return.
    pub fn close(&self) {
        // Fails only if the connection is gone already, which is what is wanted.
        drop(self.socket.shutdown(Shutdown::Both));
    }

    /// The timeout of one call in which no byte moves.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(limit)?;
        self.socket.set_write_timeout(limit)
    }

    /// The timeout in force.
    ///
    /// # Errors
    /// The system's error.
    pub fn timeout(&self) -> io::Result<Option<Duration>> {
        self.socket.read_timeout()
    }

    fn receive(&self, most: usize, wait: Wait, take: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<usize> {
        let mut receiving = lock(&self.receiving);
        if !self.advance(&mut receiving, wait)? {
            return Ok(0);
        }
        let data = receiving.opener.data();
        let taken = take(data.get(..most).unwrap_or(data));
        receiving.opener.take(taken);
        Ok(taken)
    }

    /// New keys for sending so far.
    pub fn keys_refreshed(&self) -> u64 {
        self.refreshed.load(Ordering::Relaxed)
    }

    fn seal(
        &self,
        sending: &mut Sending,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), Unsound> {
        let sealer = &mut sending.sealer;
        sealer.clear();
        let asked = self.answer_due.swap(false, Ordering::Relaxed);
        let wished =
            self.settings.refresh_after.is_some_and(|bytes| sealer.text_since_refresh() >= bytes.get());
        if asked || wished || sealer.is_worn() {
            let mut secrets = lock(&self.secrets);
            if secrets.can_refresh() {
                sealer.control(content::HANDSHAKE, &KEY_UPDATE)?;
                sealer.rekey(secrets.next(Direction::Send, self.settings.provider)?);
                self.refreshed.fetch_add(1, Ordering::Relaxed);
            } else if sealer.is_worn() {
                return Err(Unsound);
            }
        }
        sealer.data(len, fill).map(drop)
    }

    /// Writes the batch. Gives how much data has gone with it.
    fn write(&self, sending: &mut Sending, encrypted: Result<(), Unsound>) -> io::Result<usize> {
        if let Err(Unsound) = encrypted {
            let text =
                "the key has protected as many records as it may, and TLS 1.2 has no other: use TLS 1.3";
            return end(&mut sending.ended, Ended::Badly(ErrorKind::Other, text.to_owned()));
        }
        let Sending { sealer, ended } = sending;
        let mut left = sealer.encrypted();
        let whole = left.len();
        while !left.is_empty() {
            match self.socket.send_with_flags(left, libc::MSG_NOSIGNAL) {
                Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // Half a record is of no use to the peer, and nothing can follow it.
                    let gone = sealer.text_in(whole - left.len());
                    let error = self.explain_broken(error);
                    *ended = Some(Ended::Badly(error.kind(), error.to_string()));
                    return if gone > 0 { Ok(gone) } else { Err(error) };
                }
            }
        }
        Ok(sealer.text_in(whole))
    }

    /// Takes note of what the peer has sent, without waiting: its alert, its key, a ticket. Stops
    /// at data, which is for a receiver.
    fn listen(&self) -> io::Result<()> {
        let mut receiving = match self.receiving.try_lock() {
            Ok(receiving) => receiving,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A thread receives, and sees it.
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        match self.advance(&mut receiving, Wait::No) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gets data into the opener; false at the peer's end.
    fn advance(&self, receiving: &mut Receiving, wait: Wait) -> io::Result<bool> {
        loop {
            if !receiving.opener.data().is_empty() {
                return Ok(true);
            }
            match &receiving.ended {
                Some(Ended::Well) => return Ok(false),
                ended => check(ended.as_ref())?,
            }
            match receiving.opener.open() {
                Ok(Opened::Data) => return Ok(true),
                Ok(Opened::Nothing) => self.read(receiving, wait)?,
                Ok(Opened::Other) => {}
                Ok(Opened::Alert(_, alert::CLOSE)) => self.note_end(receiving, Ended::Well),
                Ok(Opened::Alert(_, description)) => {
                    let text = alert::received(description, self.settings.role);
                    self.note_end(receiving, Ended::Badly(ErrorKind::ConnectionAborted, text));
                }
                Ok(Opened::KeyUpdate(answer)) => self.follow_key(receiving, answer),
                Err(bad) => self.refuse(receiving, &bad),
            }
        }
    }

    fn read(&self, receiving: &mut Receiving, wait: Wait) -> io::Result<()> {
        let flags = if wait == Wait::Yes { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let received = recv(&self.socket, receiving.opener.room(), flags);
        match received.map(|(_, received)| received).map_err(io::Error::from) {
            Ok(0) => {
                let ended = self.end_of_connection(&receiving.opener);
                self.note_end(receiving, ended);
                Ok(())
            }
            Ok(received) => {
                receiving.opener.fill(received);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            // Nothing for now, or for as long as the timeout: more may come.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error),
            Err(error) => {
                let text = self.with_hint(&receiving.opener, &error.to_string());
                self.note_end(receiving, Ended::Badly(error.kind(), text));
                Ok(())
            }
        }
    }

    fn follow_key(&self, receiving: &mut Receiving, answer: bool) {
        match lock(&self.secrets).next(Direction::Receive, self.settings.provider) {
            Ok(protection) => receiving.opener.rekey(protection),
            Err(Unsound) => return self.refuse(receiving, &Bad::Message(24)),
        }
        if answer {
            self.answer_due.store(true, Ordering::Relaxed);
        }
    }

    /// Ends receiving for a protocol violation, and sends the alert if that does not block.
    fn refuse(&self, receiving: &mut Receiving, bad: &Bad) {
        let (description, text) = alert::for_bad(bad);
        self.note_end(receiving, Ended::Badly(ErrorKind::InvalidData, text));
        self.alert_due.store(description, Ordering::SeqCst);
        self.send_alert();
    }

    /// Does what a sender does, and then sends the alert that has come due meanwhile: the thread
    /// that found the fault could not.
    fn while_sending<T>(&self, act: impl FnOnce(&mut Sending) -> T) -> T {
        let outcome = act(&mut lock(&self.sending));
        self.send_alert();
        outcome
    }

    /// Sends the alert that is due, if there is one, and ends sending.
    fn send_alert(&self) {
        if self.alert_due.load(Ordering::SeqCst) == 0 {
            return;
        }
        // The thread that holds it comes here when it is done.
        let Ok(mut sending) = self.sending.try_lock() else { return };
        let description = self.alert_due.swap(0, Ordering::SeqCst);
        if description == 0 || sending.ended.is_some() {
            return;
        }
        sending.sealer.clear();
        if sending.sealer.control(content::ALERT, &[alert::FATAL, description]).is_ok() {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // A failure has no one left to be reported to.
            let _ = self.socket.send_with_flags(sending.sealer.encrypted(), flags);
        }
        sending.ended.clone_from(&lock(&self.received_end));
    }

    fn note_end(&self, receiving: &mut Receiving, ended: Ended) {
        *lock(&self.received_end) = Some(ended.clone());
        self.end_received.notify_all();
        receiving.ended = Some(ended);
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("socket", &self.socket).field("settings", &self.settings).finish()
    }
}

/// A `key_update` that asks for no answer. RFC 8446 §4.6.3.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

fn check(ended: Option<&Ended>) -> io::Result<()> {
    match ended {
        None => Ok(()),
        Some(Ended::Badly(kind, text)) => Err(io::Error::new(*kind, text.clone())),
        Some(Ended::Well) => Err(io::Error::new(ErrorKind::BrokenPipe, "sending was ended on this side")),
    }
}

fn end<T>(place: &mut Option<Ended>, ended: Ended) -> io::Result<T> {
    let outcome = check(Some(&ended));
    *place = Some(ended);
    outcome.and(Err(ErrorKind::Other.into()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
