//! A process of its own, for it uses up all its descriptors.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use multifd_transports::{Arrival, Endpoint, Listener};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_lack_of_descriptors_neither_ends_serving_nor_spins() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Endpoint::Tcp { port, .. } = listener.endpoint() else { panic!("{:?}", listener.endpoint()) };
    let stopper = listener.stopper();
    let cpu_time = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap();
    let (sender, arrivals) = mpsc::channel();
    thread::scope(|scope| {
        let serving =
            scope.spawn(|| listener.serve(4, LONG, &mut move |arrival| sender.send(arrival).unwrap()));
        // The first client shows that the server has all the descriptors that it needs for itself.
        let first = TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(matches!(arrivals.recv_timeout(LONG), Ok(Arrival::Opened { number: 1, .. })));

        setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).unwrap();
        let mut hoard: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        assert!(hoard.pop().is_some());
        let mut second = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let before = cpu_time();
        let waited = arrivals.recv_timeout(Duration::from_millis(500));
        assert!(waited.is_err(), "{waited:?}");
        assert!(cpu_time() - before < Duration::from_millis(250), "it spins");

        // Those inside are still heard.
        (&first).write_all(b"QEVM").unwrap();
        assert!(matches!(arrivals.recv_timeout(LONG), Ok(Arrival::Identified { number: 1, .. })));
        drop(hoard);
        assert!(matches!(arrivals.recv_timeout(LONG), Ok(Arrival::Opened { number: 2, .. })));
        second.write_all(b"QEVM").unwrap();
        assert!(matches!(arrivals.recv_timeout(LONG), Ok(Arrival::Identified { number: 2, .. })));
        stopper.stop();
        serving.join().unwrap().unwrap();
    });
}
