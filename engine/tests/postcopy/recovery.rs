//! A post-copy whose link is gone: what its states are, whose connections replace the link, and
//! which breaks are a link's.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::thread;

use multifd_engine::transports::{Channel, DialOptions, Endpoint, Listener, TlsClient, TlsServer, dial};
use multifd_engine::wire::{BlockRef, Configuration, PageSize, RamRecord};
use multifd_engine::{
    Destination, DeviceState, ErrorKind, Incoming, MigrationState, PAGE, Postcopy, PostcopyEnd,
    PostcopyGuest, RamBlock, Served, Source,
};

use crate::credentials::two_of;
use crate::relay::Relay;
use crate::{SOON, load, memory, missing, write};

/// Both ends of a post-copy that sends nothing but what is asked for.
struct Pair {
    postcopy: Postcopy,
    guest: PostcopyGuest,
    here: Vec<RamBlock>,
    there: Vec<RamBlock>,
    states: [Receiver<MigrationState>; 2],
    relay: Relay,
}

pub(crate) fn any() -> Endpoint {
    "tcp:127.0.0.1:0".parse().unwrap()
}

fn address(endpoint: &Endpoint) -> String {
    endpoint.to_string().strip_prefix("tcp:").unwrap().to_owned()
}

/// A guest whose pages hold `value` and their number, up to where it runs at its destination.
fn running(value: usize, preempt: bool) -> Pair {
    let pair = running_by(value, preempt, None);
    pair.relay.wait_loaded();
    pair
}

/// The same, encrypted if there are credentials.
fn running_by(value: usize, preempt: bool, credentials: Option<&Path>) -> Pair {
    let (here, there) = (memory(false), memory(false));
    for block in &here {
        (0..block.pages()).for_each(|page| write(block, page, value));
    }
    let mut destination = Destination::builder(there.clone()).postcopy(true).timeout(SOON);
    if let Some(dir) = credentials {
        destination = destination.tls(TlsServer::from_directory(dir).unwrap());
    }
    let destination = destination.listen(&any()).unwrap();
    let relay = Relay::to(address(&destination.endpoint()).parse().unwrap(), &[]);
    let changes = destination.state_changes();
    let mut source = Source::builder(here.clone(), Configuration::new("test-10.0"))
        .paused_guest()
        .postcopy(true)
        .postcopy_preempt(preempt)
        .max_postcopy_bandwidth(NonZeroU64::new(1))
        .timeout(SOON);
    if let Some(dir) = credentials {
        source = source.tls(TlsClient::from_directory(dir).unwrap());
    }
    let source = source.build().unwrap();
    let states = [source.control().state_changes(), changes];
    let (postcopy, guest) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let Incoming::Postcopy(guest) = destination.receive_live().unwrap() else { panic!("no switch") };
            guest.loaded().unwrap();
            guest
        });
        let precopy = source.connect(&relay.uri().parse().unwrap()).unwrap();
        let postcopy = precopy.switch_to_postcopy(&DeviceState::opaque("devices", 1, b"state")).unwrap();
        (postcopy, receiving.join().unwrap())
    });
    Pair { postcopy, guest, here, there, states, relay }
}

impl Pair {
    /// Both ends find that their link is gone, and nothing else.
    fn wait_paused(&mut self) {
        let Served::Paused(error) = self.postcopy.serve().unwrap() else { panic!("completed") };
        assert!(!error.source_may_resume(), "{error}");
        let PostcopyEnd::Paused(error) = self.guest.wait().unwrap() else { panic!("completed") };
        assert!(!error.source_may_resume(), "{error}");
    }

    fn pause(&mut self) {
        self.postcopy.control().pause_postcopy().unwrap();
        self.wait_paused();
    }

    /// Over another link, all goes, and is what the source has.
    fn recover_and_complete(&mut self) {
        let listener = Listener::bind(&any()).unwrap();
        let at = listener.endpoint();
        thread::scope(|scope| {
            let recovering = scope.spawn(|| self.guest.recover(listener, SOON).unwrap());
            self.postcopy.recover(&at, SOON).unwrap();
            recovering.join().unwrap();
        });
        self.complete();
    }

    fn complete(&mut self) {
        self.postcopy.control().set_max_postcopy_bandwidth(None);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| self.guest.wait().unwrap());
            let served = self.postcopy.serve().unwrap();
            assert!(matches!(served, Served::Completed(_)), "{served:?}");
            let ended = waiting.join().unwrap();
            assert!(matches!(ended, PostcopyEnd::Completed(_)), "{ended:?}");
        });
        for (there, here) in self.there.iter().zip(&self.here) {
            (0..here.pages()).for_each(|page| assert!(load(there, page) == load(here, page), "page {page}"));
        }
    }
}

#[test]
fn both_ends_enter_every_state_of_a_postcopy_in_its_order() {
    use MigrationState::{
        Active, Completed, Device, PostcopyActive, PostcopyDevice, PostcopyPaused, PostcopyRecover,
        PostcopyRecoverSetup, Setup,
    };
    if missing() {
        return;
    }
    let mut pair = running(1, false);
    let [source, destination] = &pair.states;
    // The source has heard that the devices are loaded when it says so itself.
    let mut seen: Vec<_> = source.iter().take_while(|state| *state != PostcopyActive).collect();
    assert_eq!(seen, [Setup, Active, Device, PostcopyDevice]);
    assert_eq!(destination.iter().take(3).collect::<Vec<_>>(), [Setup, Active, PostcopyActive]);
    pair.pause();
    pair.recover_and_complete();
    let again = [PostcopyPaused, PostcopyRecoverSetup, PostcopyRecover, PostcopyActive, Completed];
    for end in &pair.states {
        seen = end.try_iter().collect();
        assert_eq!(seen, again);
    }
}

#[test]
fn the_wrong_source_is_refused_and_the_right_one_still_comes() {
    if missing() {
        return;
    }
    let (mut one, mut other) = (running(1, false), running(2, false));
    one.pause();
    other.pause();
    let listener = Listener::bind(&any()).unwrap();
    let at = listener.endpoint();
    thread::scope(|scope| {
        let guest = &mut one.guest;
        let recovering = scope.spawn(move || guest.recover(listener, SOON).unwrap());
        // Its blocks have the same names and sizes.
        let error = other.postcopy.recover(&at, SOON).unwrap_err();
        assert!(error.kind() == ErrorKind::Transport && !error.source_may_resume(), "{}", error.chain());
        // A QEMU, which says nothing but the name of a block.
        let mut stranger = TcpStream::connect(address(&at)).unwrap();
        stranger.write_all(b"\x08\0\x0a\0\x07\x06pc.ram").unwrap();
        let ended = stranger.read(&mut [0; 16]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        one.postcopy.recover(&at, SOON).unwrap();
        recovering.join().unwrap();
    });
    one.complete();
    other.recover_and_complete();
}

#[test]
fn connections_of_the_callers_are_those_of_the_right_source_too() {
    if missing() {
        return;
    }
    let (mut one, mut other) = (running(1, false), running(2, false));
    one.pause();
    other.pause();
    let pair =
        || UnixStream::pair().map(|(ours, theirs)| (Channel::try_from(ours), Channel::try_from(theirs)));
    for right in [false, true] {
        let (ours, theirs) = pair().unwrap();
        let postcopy = if right { &mut one.postcopy } else { &mut other.postcopy };
        let guest = &mut one.guest;
        thread::scope(|scope| {
            let recovering = scope.spawn(|| postcopy.recover_over(ours.unwrap(), None));
            let recovered = guest.recover_over(theirs.unwrap(), None);
            if let Err(error) = &recovered {
                assert!(error.chain().contains("the source of another guest"), "{}", error.chain());
                assert_eq!(guest.state(), MigrationState::PostcopyPaused);
            }
            assert_eq!((recovered.is_ok(), recovering.join().unwrap().is_ok()), (right, right));
        });
    }
    one.complete();
    other.recover_and_complete();
}

/// Main is whole: pages may be lost that were asked for.
#[test]
fn a_connection_for_urgent_pages_that_is_cut_alone_pauses_both_ends_and_nothing_is_lost() {
    if missing() {
        return;
    }
    let mut pair = running(1, true);
    thread::scope(|scope| {
        let postcopy = &mut pair.postcopy;
        let serving = scope.spawn(|| postcopy.serve().unwrap());
        for page in [7, 1900, 300] {
            load(&pair.there[0], page);
        }
        // What was asked for has come over the second connection.
        pair.relay.wait_sent(1, 3 * PAGE as u64);
        pair.relay.cut(1);
        let Served::Paused(error) = serving.join().unwrap() else { panic!("completed") };
        assert!(!error.source_may_resume(), "{error}");
    });
    let ended = pair.guest.wait().unwrap();
    assert!(matches!(ended, PostcopyEnd::Paused(_)), "{ended:?}");
    pair.recover_and_complete();
}

/// Its certificate is by the right CA, and another's.
#[test]
fn pages_of_another_client_of_the_same_ca_are_not_taken() {
    if missing() {
        return;
    }
    let [ours, another] = two_of("CA");
    let mut pair = running_by(1, false, Some(ours.path()));
    let tls = Some(TlsClient::from_directory(another.path()).unwrap());
    let stranger = dial(&pair.relay.uri().parse().unwrap(), &DialOptions { tls, ..DialOptions::default() });
    let stranger = stranger.unwrap();
    let block = BlockRef::Named(pair.here[0].name().clone());
    let mut page = Vec::new();
    RamRecord::Zero { offset: 5 * PAGE as u64, block }.encode(PageSize::K4, &mut page);
    stranger.set_timeout(Some(SOON)).unwrap();
    stranger.send_all(&page).unwrap();
    let closed = stranger.recv(&mut [0]);
    assert!(!matches!(closed, Ok(1..)), "{closed:?}");
    pair.complete();
}
