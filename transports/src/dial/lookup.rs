//! Looking up a host's name.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use rustix::event::PollFlags;

use crate::os::event_loop::ready;
use crate::os::wake::Wake;

/// The addresses of a host. The system's resolver cannot be interrupted, so a name is looked up on
/// a thread of its own: when the wait for it has ended, the thread ends when the resolver lets
/// go of it.
pub(crate) async fn lookup(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (answer, asked) =
        (Arc::new(Answer { found: Mutex::new(None), done: Arc::new(Wake::new()?) }), host.to_owned());
    let answering = Arc::clone(&answer);
    Builder::new().name("lookup".to_owned()).spawn(move || {
        let found = (asked.as_str(), port).to_socket_addrs().map(Iterator::collect);
        *answering.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        answering.done.fire();
    })?;
    ready(&answer.done, PollFlags::IN).await?;
    let found = answer.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    found.unwrap_or_else(|| Err(io::Error::other("the name look-up has ended without an answer")))
}

struct Answer {
    found: Mutex<Option<io::Result<Vec<SocketAddr>>>>,
    done: Arc<Wake>,
}
