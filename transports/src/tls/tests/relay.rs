//! Stands between two ends and does to their bytes what networks do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::Endpoint;
use crate::testing::spawn;

/// What happens after so many bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// One bit of this byte is turned, all others pass.
    Change(usize),
    /// Both ends see the end of the connection.
    Cut(usize),
    /// Nothing passes any more.
    Stall(usize),
}

/// Passes one connection on. The faults are on the way to the server, and on the way back.
pub(super) struct Relay {
    pub(super) endpoint: Endpoint,
    /// All bytes that passed, in both directions.
    seen: Arc<Mutex<(Vec<u8>, Vec<u8>)>>,
}

impl Relay {
    pub(super) fn to(endpoint: &Endpoint, there: Option<Fault>, back: Option<Fault>) -> Self {
        let Endpoint::Tcp { host, port } = endpoint.clone() else { panic!("a tcp endpoint") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint =
            Endpoint::Tcp { host: "localhost".to_owned(), port: listener.local_addr().unwrap().port() };
        let seen = Arc::new(Mutex::new((Vec::new(), Vec::new())));
        let both = Arc::clone(&seen);
        spawn("tls-relay", move || {
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect((host.as_str(), port)).unwrap();
            let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let one = Arc::clone(&both);
            spawn("tls-relay-there", move || {
                pass(from, to, there, &|bytes| one.lock().unwrap().0.extend(bytes))
            });
            spawn("tls-relay-back", move || {
                pass(server, client, back, &|bytes| both.lock().unwrap().1.extend(bytes));
            });
        });
        Self { endpoint, seen }
    }

    /// Bytes that have passed to the server, and back.
    pub(super) fn seen(&self) -> (Vec<u8>, Vec<u8>) {
        self.seen.lock().unwrap().clone()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, fault: Option<Fault>, see: &dyn Fn(&[u8])) {
    let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
    loop {
        let most = match fault {
            Some(Fault::Cut(after) | Fault::Stall(after)) => (after - passed).min(buffer.len()),
            _ => buffer.len(),
        };
        if most == 0 {
            break;
        }
        let Ok(count @ 1..) = from.read(&mut buffer[..most]) else {
            // An end passes on, one direction at a time.
            let _ = to.shutdown(Shutdown::Write);
            return;
        };
        if let Some(Fault::Change(at)) = fault
            && (passed..passed + count).contains(&at)
        {
            buffer[at - passed] ^= 1;
        }
        passed += count;
        see(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    if let Some(Fault::Cut(_)) = fault {
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    } else {
        // Takes what comes, so that only the receiver notices.
        while matches!(from.read(&mut buffer), Ok(1..)) {}
    }
}
