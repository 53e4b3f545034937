//! A source that would go on over another link when this one breaks.

use super::*;

/// What a destination says that waits for another link, or does not.
fn session(two_way: bool, waits: bool) -> Session {
    let features = dialect::FEATURES | if waits { FEATURE_RESUMPTION } else { 0 };
    let machine = Machine::new(two_way, SwitchoverAck::Auto, None).offering(features);
    Session { machine, ..Session::new(two_way) }
}

fn offer() -> Input {
    command(Command::Resumable([7; 32]))
}

fn ping(value: u32) -> Input {
    command(Command::Ping(value))
}

fn opening() -> Vec<Input> {
    vec![configuration("microvm"), command(Command::OpenReturnPath), ping(HELLO_PING)]
}

#[test]
fn what_came_up_to_a_round_is_settled_before_the_source_is_told() {
    let mut session = session(true, true);
    session.run([opening(), start(), vec![offer(), ping(ROUND_PING | 3)]].concat()).unwrap();
    let settled =
        [Effect::Settle(ROUND_PING | 3), Effect::Answer(Phase::Active, ReturnMessage::Pong(ROUND_PING | 3))];
    assert!(session.done.contains(&Effect::Resumable([7; 32])), "{:?}", session.done);
    assert!(session.done.ends_with(&settled), "{:?}", session.done);
}

#[test]
fn an_offer_where_no_link_is_waited_for_is_refused() {
    let refused = |mut session: Session, inputs: Vec<Input>| {
        let error = session.run([inputs, vec![offer()]].concat()).unwrap_err();
        assert!(error.to_string().contains("an offer to go on over another link"), "{error}");
    };
    refused(session(true, false), [opening(), start()].concat());
    refused(session(true, true), opening());
    let stranger = vec![configuration("microvm"), command(Command::OpenReturnPath)];
    refused(session(true, true), [stranger, start()].concat());
    // What was recorded has no other link, and asks for none.
    let mut recorded = session(false, true);
    recorded.run([opening(), start(), vec![offer(), ping(ROUND_PING | 3)]].concat()).unwrap();
    let of_links = |effect: &Effect| matches!(effect, Effect::Resumable(_) | Effect::Settle(_));
    assert!(!recorded.done.iter().any(of_links), "{:?}", recorded.done);
}
