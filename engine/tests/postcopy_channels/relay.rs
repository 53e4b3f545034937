//! A relay between source and destination, of which any connection can be stopped for a while, or
//! cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use multifd_engine::transports::Endpoint;

/// Passes every connection on to the destination.
pub(crate) struct Relay {
    pub(crate) uri: Endpoint,
    connections: Arc<Connections>,
}

#[derive(Default)]
struct Connections {
    /// By their numbers: 0 is main, then the others in the order in which they were made.
    all: Mutex<Vec<Connection>>,
    changed: Condvar,
}

struct Connection {
    ends: [TcpStream; 2],
    /// What comes from the source stays here.
    held: bool,
}

/// Cuts a connection when so many bytes have gone to the destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) connection: usize,
    pub(crate) after: usize,
}

impl Relay {
    pub(crate) fn to(destination: &Endpoint, cut: Option<Cut>) -> Self {
        let Endpoint::Tcp { host, port } = destination.clone() else { panic!("a tcp destination") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let connections = Arc::<Connections>::default();
        let all = Arc::clone(&connections);
        // Ends with the process: a test that is over has no more connections to pass on.
        spawn(move || {
            for (number, source) in listener.incoming().enumerate() {
                let source = source.unwrap();
                let Ok(there) = TcpStream::connect((host.as_str(), port)) else { return };
                source.set_nodelay(true).unwrap();
                there.set_nodelay(true).unwrap();
                let ends = [source.try_clone().unwrap(), there.try_clone().unwrap()];
                all.all.lock().unwrap().push(Connection { ends, held: false });
                let left = cut.filter(|cut| cut.connection == number).map(|cut| cut.after);
                let (back, forth) = (there.try_clone().unwrap(), source.try_clone().unwrap());
                let gate = Arc::clone(&all);
                spawn(move || pass(forth, there, left, || gate.wait(number)));
                spawn(move || pass(back, source, None, || ()));
            }
        });
        Self { uri, connections }
    }

    /// Cuts a connection.
    pub(crate) fn cut(&self, number: usize) {
        let all = self.connections.all.lock().unwrap();
        all[number].ends.iter().for_each(|end| _ = end.shutdown(Shutdown::Both));
    }

    /// Keeps what the source sends on a connection from now on.
    pub(crate) fn hold(&self, number: usize) {
        self.connections.all.lock().unwrap()[number].held = true;
    }

    /// Lets go what was kept.
    pub(crate) fn release(&self, number: usize) {
        self.connections.all.lock().unwrap()[number].held = false;
        self.connections.changed.notify_all();
    }
}

fn spawn(body: impl FnOnce() + Send + 'static) {
    thread::Builder::new().spawn(body).unwrap();
}

impl Connections {
    fn wait(&self, number: usize) {
        let all = self.all.lock().unwrap();
        drop(self.changed.wait_while(all, |all| all[number].held).unwrap());
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut left: Option<usize>, gate: impl Fn()) {
    let mut buffer = vec![0; 16 << 10];
    while left != Some(0) {
        let most = left.map_or(buffer.len(), |left| left.min(buffer.len()));
        let Ok(count @ 1..) = from.read(&mut buffer[..most]) else { break };
        gate();
        left = left.map(|left| left - count);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
