//! A QEMU source that switches to post-copy into `multifd receive`: the checkpoint appears when the
//! last page is there.

mod fixture;

use fixture::{ALWAYS, SOON, When, guest, missing_kvm, moving, settings};
use multifd_tests::{Multifd, Outcome, Scratch, Settings, Side, skip, skip_without_qemu};

macro_rules! skip_without_kvm {
    () => {
        skip_without_qemu!();
        if let Some(why) = missing_kvm() {
            skip!("{why}");
        }
    };
}

#[test]
fn a_source_that_switches_in_any_round_arrives_whole() -> Outcome {
    skip_without_kvm!();
    for when in ALWAYS {
        for unix in [false, true] {
            let scratch = Scratch::new()?;
            let uri = if unix { scratch.unix_uri("receive") } else { "tcp:127.0.0.1:0".to_owned() };
            moving(&scratch, &guest(&scratch)?, &uri, &[], &settings(), when)?.check_arrived()?;
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_came_by_postcopy_is_sent_on_and_runs() -> Outcome {
    skip_without_kvm!();
    let scratch = Scratch::new()?;
    let machine = guest(&scratch)?;
    let moving = moving(&scratch, &machine, "tcp:127.0.0.1:0", &[], &settings(), When::InFirstRound)?;
    let (checkpoint, _source) = moving.check_arrived()?;
    let mut destination = machine.incoming("defer").spawn("destination")?;
    let plain = Settings { return_path: true, ..Settings::default() };
    destination.set_up(&plain, Side::Destination)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    let mut send = Multifd::send(checkpoint.directory(), &uri, &plain)?;
    send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    assert_eq!(destination.run_state()?, "running", "as it was at the source");
    destination.serial().wait_lines(3, 0, SOON)
}

#[test]
fn a_link_that_breaks_is_made_again_and_nothing_is_lost() -> Outcome {
    skip_without_kvm!();
    let scratch = Scratch::new()?;
    let machine = guest(&scratch)?;
    let slowly = [("max-postcopy-bandwidth".to_owned(), (4 << 20).into())];
    let settings = Settings { parameters: slowly.into_iter().collect(), ..settings() };
    let flags = ["--recover", "120s"];
    let mut moving = moving(&scratch, &machine, "tcp:127.0.0.1:0", &flags, &settings, When::InFirstRound)?;
    for round in 1..=3 {
        moving.source.wait_status("postcopy-active", SOON)?;
        moving.source.execute("migrate-pause", serde_json::json!({}))?;
        moving.source.wait_status("postcopy-paused", SOON)?;
        moving.receive.process().stderr().wait_until("its pause", SOON, |said| {
            (String::from_utf8_lossy(said).matches("listening again on").count() >= round).then_some(())
        })?;
        moving.source.resume_postcopy(moving.receive.uri())?;
    }
    moving.source.wait_status("postcopy-active", SOON)?;
    moving.source.set_parameter("max-postcopy-bandwidth", 0)?;
    moving.check_arrived().map(drop)
}
