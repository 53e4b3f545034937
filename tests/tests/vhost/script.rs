//! A back-end that answers by a script: what real ones do on a bad day.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use multifd_engine::vhost::vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use multifd_tests::virtio::VERSION_1;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::backend::LOG_ALL;

const REPLY: u32 = 5;
const NEED_REPLY: u32 = 8;

/// What to do with a request.
pub enum Answer {
    /// As a good back-end does.
    Usual,
    /// This body.
    Body(Vec<u8>),
    /// These bytes, whatever they are.
    Raw(Vec<u8>),
    /// No body, and a descriptor.
    Descriptor(OwnedFd),
    /// Nothing at all.
    Silence,
    HangUp,
}

/// The requests that came in, by number, with their bodies.
pub type Journal = Arc<Mutex<Vec<(u32, Vec<u8>)>>>;

/// Starts a back-end that asks `script` about every request.
pub fn start(mut script: impl FnMut(u32) -> Answer + Send + 'static) -> (UnixStream, Journal) {
    start_with_bodies(move |request, _| script(request))
}

/// The same, with the bodies of the requests.
pub fn start_with_bodies(
    mut script: impl FnMut(u32, &[u8]) -> Answer + Send + 'static,
) -> (UnixStream, Journal) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let journal = Journal::default();
    let seen = Arc::clone(&journal);
    // Ends with the connection.
    let serve = move || {
        let mut header = [0; 12];
        while ours.read_exact(&mut header).is_ok() {
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let (request, flags) = (word(0), word(4));
            let mut body = vec![0; word(8) as usize];
            ours.read_exact(&mut body).unwrap();
            seen.lock().unwrap().push((request, body.clone()));
            let reply = match script(request, &body) {
                Answer::Usual => usual(request, flags, body),
                Answer::Body(body) => Some(body),
                Answer::Raw(bytes) => {
                    ours.write_all(&bytes).unwrap();
                    None
                }
                Answer::Descriptor(descriptor) => {
                    let header = [request, REPLY, 0].map(u32::to_ne_bytes).concat();
                    ours.send_with_fd(&header[..], descriptor.as_raw_fd()).unwrap();
                    None
                }
                Answer::Silence => None,
                Answer::HangUp => return,
            };
            if let Some(body) = reply {
                let header = [request, REPLY, body.len() as u32].map(u32::to_ne_bytes).concat();
                ours.write_all(&[header, body].concat()).unwrap();
            }
        }
    };
    std::thread::Builder::new().spawn(serve).unwrap();
    (theirs, journal)
}

fn usual(request: u32, flags: u32, body: Vec<u8>) -> Option<Vec<u8>> {
    let protocol = VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::RARP
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::PAGEFAULT;
    let number = |number: u64| Some(number.to_ne_bytes().to_vec());
    let is = |other: FrontendReq| request == u32::from(other);
    if is(FrontendReq::GET_FEATURES) {
        return number(VERSION_1 | LOG_ALL | 1 << 30);
    }
    if is(FrontendReq::GET_PROTOCOL_FEATURES) {
        return number(protocol.bits());
    }
    if is(FrontendReq::GET_QUEUE_NUM) {
        return number(2);
    }
    if is(FrontendReq::SET_LOG_BASE) || is(FrontendReq::GET_VRING_BASE) {
        return Some(body);
    }
    if flags & NEED_REPLY != 0 { number(0) } else { None }
}
