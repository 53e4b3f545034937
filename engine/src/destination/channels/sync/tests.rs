use multifd_transports::Channel;

use super::*;
use crate::run::workers::Crew;

const SOON: Duration = Duration::from_millis(5);

fn join(sync: &ChannelSync, id: u8) {
    sync.join(id, Channel::pair().unwrap().0.closer()).unwrap();
}

fn refusal(sync: &ChannelSync) -> String {
    sync.flush(SOON).unwrap_err().to_string()
}

#[test]
fn without_channels_nothing_is_waited_for() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    assert!(sync.flush(SOON).is_ok() && sync.flush(SOON).is_ok());
}

#[test]
fn an_expected_channel_that_never_came_is_named() {
    let sync = ChannelSync::new(&StopSwitch::default(), Some(2));
    join(&sync, 0);
    assert!(refusal(&sync).ends_with("from channel 0, channel 1 (never came)"), "{}", refusal(&sync));
}

#[test]
fn a_gap_in_the_numbers_is_waited_for() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    join(&sync, 1);
    assert!(refusal(&sync).contains("channel 0 (never came)"));
}

#[test]
fn a_connection_that_has_not_spoken_is_heard_out_and_no_longer() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    sync.opened();
    let begun = Instant::now();
    assert!(sync.flush(SOON).is_ok());
    assert!(begun.elapsed() >= SOON);
}

#[test]
fn a_connection_that_turns_out_to_be_a_channel_is_waited_for() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    sync.opened();
    let heard = sync.clone();
    let (one, _other) = Channel::pair().unwrap();
    let closer = one.closer();
    let crew = Crew::new(StopSwitch::default());
    crew.spawn("mig-test", Phase::Active, move || {
        heard.join(0, closer).unwrap();
        heard.identified();
        heard.arrive(0)
    })
    .unwrap();
    sync.flush(Duration::from_secs(60)).unwrap();
    crew.join();
    assert!(sync.has_channels());
}

#[test]
fn a_channel_that_does_not_fit_is_an_error_until_the_first_sync_point() {
    let sync = ChannelSync::new(&StopSwitch::default(), Some(1));
    let (one, _other) = Channel::pair().unwrap();
    join(&sync, 0);
    assert!(sync.is_full());
    for id in [0, 1] {
        assert!(matches!(sync.join(id, one.closer()), Err(JoinError::Early(_))));
    }
    sync.finish();
    assert!(matches!(sync.storing(0).map(drop), Err(error) if error.to_string().contains("after the end")));
}

#[test]
fn the_end_of_the_main_stream_waits_for_pages_on_their_way_and_closes_their_channel() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    let (one, other) = Channel::pair().unwrap();
    sync.join(0, one.closer()).unwrap();
    let crew = Crew::new(StopSwitch::default());
    let (worker, (begun, waiting)) = (sync.clone(), std::sync::mpsc::channel());
    crew.spawn("mig-test", Phase::Active, move || {
        let storing = worker.storing(0)?;
        begun.send(()).unwrap();
        // Ends when the end of main closes the channel: the peer sends nothing.
        assert!(one.recv(&mut [0]).is_err());
        drop(storing);
        Ok(())
    })
    .unwrap();
    waiting.recv().unwrap();
    sync.finish();
    assert!(sync.state.read(|state| state.sync.storing().next().is_none()));
    crew.join();
    drop(other);
}

#[test]
fn a_channel_that_ended_too_early_is_an_error_at_once() {
    let sync = ChannelSync::new(&StopSwitch::default(), None);
    join(&sync, 0);
    sync.ended(0);
    let error = sync.flush(Duration::from_secs(60)).unwrap_err();
    assert_eq!(error.channel(), Some("channel 0"));
}

#[test]
fn a_channel_that_meets_main_at_the_switch_goes_on_when_it_is_let_go_and_none_joins_behind_it() {
    let stop = StopSwitch::default();
    let sync = ChannelSync::new(&stop, None);
    join(&sync, 0);
    let passed = Monitor::new(false, &stop);
    let (channel, seen) = (sync.clone(), passed.clone());
    let crew = Crew::new(stop.clone());
    crew.spawn("mig-test", Phase::Active, move || {
        channel.arrive(0)?;
        seen.modify_and_notify(|passed| *passed = true);
        Ok(())
    })
    .unwrap();
    assert!(!sync.has_switched());
    sync.hold(Duration::from_secs(60)).unwrap();
    assert!(sync.has_switched());
    let late = sync.join(1, Channel::pair().unwrap().0.closer()).unwrap_err();
    assert!(matches!(late, JoinError::Early(_) | JoinError::Late(_)));
    assert!(!passed.read(|passed| *passed), "it goes on before LISTEN");
    sync.let_go();
    passed.wait(&stop, Some(Duration::from_secs(60)), |passed| passed.then_some(())).unwrap();
    crew.join();
}
