//! A relay between source and destination that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use multifd_transports::Endpoint;

/// Passes every connection on to the destination, until it is cut.
pub(crate) struct Relay {
    pub(crate) uri: Endpoint,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

/// Cuts connection number `connection`, counted from 0 (main), when so many bytes have gone to the
/// destination.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) connection: usize,
    pub(crate) after: usize,
}

/// Changes the lowest bit of this byte on its way to the destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flip {
    pub(crate) connection: usize,
    pub(crate) byte: usize,
}

impl Relay {
    pub(crate) fn to(destination: &Endpoint, cut: Option<Cut>) -> Self {
        Self::between(destination, cut, None)
    }

    pub(crate) fn flipping(destination: &Endpoint, flip: Flip) -> Self {
        Self::between(destination, None, Some(flip))
    }

    fn between(destination: &Endpoint, cut: Option<Cut>, flip: Option<Flip>) -> Self {
        let Endpoint::Tcp { host, port } = destination.clone() else { panic!("a tcp destination") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let open = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&open);
        // Ends with the process: a test that is over has no more connections to pass on.
        thread::Builder::new()
            .spawn(move || {
                // A destination accepts no channel behind the first sync point on main: main is
                // held back until it has the channel on which a bit flips.
                let (last_held, mut held) = (flip.map_or(0, |flip| flip.connection), Vec::new());
                for (number, source) in listener.incoming().enumerate() {
                    let source = source.unwrap();
                    let Ok(there) = TcpStream::connect((host.as_str(), port)) else { return };
                    all.lock().unwrap().extend([source.try_clone().unwrap(), there.try_clone().unwrap()]);
                    held.push((number, source, there));
                    if number < last_held {
                        continue;
                    }
                    for (number, source, there) in held.drain(..) {
                        let left = cut.filter(|cut| cut.connection == number).map(|cut| cut.after);
                        let flip = flip.filter(|flip| flip.connection == number).map(|flip| flip.byte);
                        pass(source.try_clone().unwrap(), there.try_clone().unwrap(), left, flip);
                        pass(there, source, None, None);
                    }
                }
            })
            .unwrap();
        Self { uri, open }
    }

    /// Cuts everything that is open.
    pub(crate) fn cut(&self) {
        self.open.lock().unwrap().drain(..).for_each(|stream| _ = stream.shutdown(Shutdown::Both));
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut left: Option<usize>, flip: Option<usize>) {
    let copy = move || {
        let mut buffer = vec![0; 16 << 10];
        let mut passed = 0;
        loop {
            let most = left.map_or(buffer.len(), |left| left.min(buffer.len()));
            match from.read(&mut buffer[..most]) {
                Ok(count) if count > 0 => {
                    left = left.map(|left| left - count);
                    if let Some(at) = flip.and_then(|byte| byte.checked_sub(passed)).filter(|at| *at < count)
                    {
                        buffer[at] ^= 1;
                    }
                    passed += count;
                    if to.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
                _ => break,
            }
            if left == Some(0) {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    };
    thread::Builder::new().spawn(copy).unwrap();
}
