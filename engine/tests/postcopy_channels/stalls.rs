//! Channels that stand still.

use std::thread;

use multifd_engine::{PostcopyEnd, Served};

use super::guest::{self, Order};
use super::relay::Relay;
use super::{Ends, Move, arrived, missing, switch, until};

/// The background stream has claimed pages that do not come: the guest gets them all the same, as
/// soon as it asks.
#[test]
fn a_page_that_is_stuck_in_the_background_stream_comes_when_it_is_asked_for() {
    if missing() {
        return;
    }
    let how = Move { channels: 1, order: Order::Random, ..Move::default() };
    let Ends { here, there, source, marker, destination, control, sent, .. } = Ends::new(&how);
    let relay = Relay::to(&destination.endpoint(), None);
    let (report, end) = thread::scope(|scope| {
        let serving = scope.spawn(|| switch(source, &here, &marker, &relay.uri, 1).serve().unwrap());
        let mut guest = arrived(destination);
        // Connection 1 is the only parallel channel.
        relay.hold(1);
        let on_channel = |sent: &multifd_engine::Progress| sent.per_channel[1].bytes_sent;
        let before = on_channel(&sent.now());
        control.set_max_postcopy_bandwidth(None);
        until(&sent, "the background stream", |sent| on_channel(sent) > before + 64 * 1024);
        guest::run(&there, &here, how.order);
        assert!(sent.now().pages_repeated > 0, "{:?}", sent.now());
        relay.release(1);
        let end = guest.wait().unwrap();
        (serving.join().unwrap(), end)
    });
    guest::check(&there, &here);
    let (Served::Completed(report), PostcopyEnd::Completed(_)) = (report, end) else { panic!("paused") };
    let postcopy = report.postcopy.unwrap();
    assert!(postcopy.pages_repeated > 0 && postcopy.requests > 0, "{postcopy:?}");
}
