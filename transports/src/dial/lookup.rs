//! Looking up a host's name.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use rustix::event::PollFlags;

use crate::ThreadHook;
use crate::os::event_loop::ready;
use crate::os::wake::Wake;

/// The addresses of a host. The system's resolver cannot be interrupted, so a name is looked up on
/// a thread of its own: when the wait for it has ended, the thread ends when the resolver lets
/// go of it.
pub(crate) async fn lookup(host: &str, port: u16, hook: &ThreadHook) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (found, done) = (Arc::new(Mutex::new(None)), Arc::new(Wake::new()?));
    let (answer, ending) = (Arc::clone(&found), Ending(Arc::clone(&done)));
    let (asked, hook) = (host.to_owned(), hook.clone());
    Builder::new().name(NAME.to_owned()).spawn(move || {
        let _ending = ending;
        hook.call(NAME);
        let addresses = (asked.as_str(), port).to_socket_addrs().map(Iterator::collect);
        *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(addresses);
    })?;
    ready(&done, PollFlags::IN).await?;
    let found = found.lock().unwrap_or_else(PoisonError::into_inner).take();
    found.unwrap_or_else(|| Err(io::Error::other("the name look-up has ended without an answer")))
}

const NAME: &str = "mig-lookup";

/// Wakes the waiter when the thread ends, also if the hook panics.
struct Ending(Arc<Wake>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.fire();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::event_loop::block_on;

    fn looked_up(hook: &ThreadHook) -> io::Result<Vec<SocketAddr>> {
        block_on(lookup("localhost", 7, hook)).flatten()
    }

    #[test]
    fn the_thread_of_a_look_up_calls_the_hook_with_its_name() {
        let names = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&names);
        let hook = ThreadHook::new(move |name| {
            assert_eq!(std::thread::current().name(), Some(name));
            noted.lock().unwrap().push(name.to_owned());
        });
        assert!(!looked_up(&hook).unwrap().is_empty());
        assert_eq!(*names.lock().unwrap(), [NAME]);
    }

    #[test]
    fn a_hook_that_panics_ends_the_look_up_and_hangs_nothing() {
        let error = looked_up(&ThreadHook::new(|_| panic!("on purpose"))).unwrap_err();
        assert!(error.to_string().contains("ended without an answer"), "{error}");
    }
}
