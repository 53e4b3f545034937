//! Every kind of channel: the real QEMU at the other end, and peers that break off, stall or never
//! begin.

mod broken_destinations;
mod broken_sources;
mod commands;
mod journey;
mod network;
mod signals;
mod verdicts;
mod wire;

use std::time::Duration;

use multifd_tests::{Outcome, Settings, skip_without_qemu};

use journey::{Journey, Link};

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// In and out over a link, while the guest writes.
fn there_and_back(link: Link, settings: &[Settings]) -> Outcome {
    skip_without_qemu!();
    for settings in settings {
        let settings = Settings { min_rounds: 2, ..settings.clone() };
        let way = format!("{link:?} {settings:?}");
        Journey::new(settings, link)?.run().unwrap_or_else(|failure| panic!("{way}: {failure}"));
    }
    Ok(())
}

fn plain() -> Settings {
    Settings::default()
}

fn answered() -> Settings {
    Settings { return_path: true, ..Settings::default() }
}

#[test]
fn a_socket_pair_leads_both_ways() -> Outcome {
    there_and_back(Link::SocketPair, &[plain(), answered()])
}

#[test]
fn a_pipe_leads_one_way() -> Outcome {
    there_and_back(Link::Pipe, &[plain()])
}

#[test]
fn a_command_stands_at_either_end() -> Outcome {
    there_and_back(Link::Exec, &[plain()])
}

#[test]
fn a_command_passes_answers_on() -> Outcome {
    there_and_back(Link::Relay, &[answered()])
}

#[test]
fn a_descriptor_is_handed_over_on_a_socket() -> Outcome {
    there_and_back(Link::HandedOver, &[answered()])
}

#[test]
fn an_inherited_socket_is_listened_on() -> Outcome {
    let channels = |channels| Settings { channels, ..answered() };
    there_and_back(Link::InheritedDoor, &[channels(None), channels(Some(2))])
}
