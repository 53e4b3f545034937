//! Passes connections on, and remembers every byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::Builder;

use multifd_tests::{Failure, Outcome};

pub(crate) struct Relay {
    uri: String,
    seen: Arc<Mutex<Vec<Record>>>,
}

/// What went in one direction of a connection.
type Record = Arc<Mutex<Vec<u8>>>;

impl Relay {
    pub(crate) fn to(uri: &str) -> Outcome<Self> {
        let there = uri.strip_prefix("tcp:").ok_or_else(|| Failure::new("a tcp URI"))?.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let uri = format!("tcp:{}", listener.local_addr()?);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        // Ends with the process: a test that is over has no more connections to pass on.
        Builder::new().spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(destination) = TcpStream::connect(&there) else { return };
                for (from, to) in [(&source, &destination), (&destination, &source)] {
                    let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
                    let record = Record::default();
                    all.lock().unwrap().push(Arc::clone(&record));
                    drop(Builder::new().spawn(move || pass(from, to, &record)));
                }
            }
        })?;
        Ok(Self { uri, seen })
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// What went, a list for each connection and direction.
    pub(crate) fn seen(&self) -> Vec<Vec<u8>> {
        self.seen.lock().unwrap().iter().map(|record| record.lock().unwrap().clone()).collect()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, record: &Mutex<Vec<u8>>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        record.lock().unwrap().extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
