//! When to send SWITCHOVER_ACK. Spec: docs/wire.md §11.1.

use std::time::{Duration, Instant};

use multifd_wire::Configuration;
use serde::Serialize;

/// Whether a source's switch-over is acknowledged. A source with the capability switchover-ack
/// waits for that and does not say so on the wire; a source before QEMU 8.1 refuses the message,
/// and one from 11.1 on refuses it when it does not wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SwitchoverAck {
    /// Acknowledge at once to machine types 8.1 to 11.0, which take it whether they wait or not. To
    /// all others, once, when the source has nothing left to send and does not switch over for a
    /// second: then it can only be waiting for this.
    #[default]
    Auto,
    /// Acknowledge always, at once: a QEMU from 8.1 to 11.0 with switchover-ack on, whose machine
    /// type does not tell its version and whose guest never stops writing.
    Always,
    /// Never acknowledge.
    Never,
}

/// How long a source must have had nothing to send until it is taken to wait.
const IDLE: Duration = Duration::from_secs(1);

/// How many PARTs without a page it must have sent meanwhile. A source that is held back by a
/// bandwidth limit sends some, too, but not two in a row: in each 100 ms it may send at least one
/// page.
const IDLE_PARTS: u32 = 20;

/// The one acknowledgement of a migration.
#[derive(Debug)]
pub(super) struct Acknowledgement {
    rule: SwitchoverAck,
    sent: bool,
    idle: Option<Idle>,
}

/// A source that has sent no page for a while.
#[derive(Debug)]
struct Idle {
    since: Instant,
    parts: u32,
    /// Pages that had come until then.
    pages: u64,
}

impl Acknowledgement {
    pub(super) fn new(rule: SwitchoverAck) -> Self {
        Self { rule, sent: false, idle: None }
    }

    /// True if the opening of the return path is to be answered with the acknowledgement.
    pub(super) fn due_at_opening(&mut self, configuration: &Configuration) -> bool {
        let takes_it =
            || configuration.machine_version().is_some_and(|version| ((8, 1)..=(11, 0)).contains(&version));
        let due = match self.rule {
            SwitchoverAck::Auto => takes_it(),
            SwitchoverAck::Always => true,
            SwitchoverAck::Never => false,
        };
        let due = due && !self.sent;
        self.sent |= due;
        due
    }

    /// True if the source waits for the acknowledgement: to be asked after each PART behind which
    /// all pages sent before it are known to have come, with the number of pages that have.
    pub(super) fn due_after_part(&mut self, pages: u64, now: Instant) -> bool {
        if self.sent || self.rule != SwitchoverAck::Auto {
            return false;
        }
        match &mut self.idle {
            Some(idle) if idle.pages == pages => {
                idle.parts += 1;
                self.sent = idle.parts >= IDLE_PARTS && now.duration_since(idle.since) >= IDLE;
            }
            _ => self.idle = Some(Idle { since: now, parts: 0, pages }),
        }
        self.sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(machine: &str) -> Configuration {
        Configuration::new(machine)
    }

    /// Whether one of `count` empty PARTs over `time` is acknowledged, and how many are.
    fn acknowledged(ack: &mut Acknowledgement, count: u32, time: Duration) -> usize {
        let begun = Instant::now();
        (0..=count).filter(|part| ack.due_after_part(7, begun + time * *part / count)).count()
    }

    #[test]
    fn machine_types_from_8_1_to_11_0_are_acknowledged_at_once_and_no_others() {
        for (machine, at_once) in [
            ("pc-q35-7.2", false),
            ("pc-q35-8.0", false),
            ("pc-q35-8.1", true),
            ("pc-i440fx-10.2", true),
            ("pc-q35-11.0", true),
            ("pc-q35-11.1", false),
            ("pc-q35-12.0", false),
            ("pc-q35-noble", false),
            ("microvm", false),
            ("firecracker-9.1", false),
        ] {
            let mut ack = Acknowledgement::new(SwitchoverAck::Auto);
            assert_eq!(ack.due_at_opening(&of(machine)), at_once, "{machine}");
            assert!(!ack.due_at_opening(&of(machine)), "{machine}: it is opened again");
            let later = acknowledged(&mut ack, 1000, Duration::from_secs(100));
            assert_eq!(later, usize::from(!at_once), "{machine}: once in all");
        }
    }

    #[test]
    fn a_source_that_is_slow_or_quick_but_has_pages_is_not_taken_to_wait() {
        let mut ack = Acknowledgement::new(SwitchoverAck::Auto);
        assert_eq!(acknowledged(&mut ack, 10, Duration::from_secs(100)), 0, "few PARTs");
        let mut ack = Acknowledgement::new(SwitchoverAck::Auto);
        assert_eq!(acknowledged(&mut ack, 10_000, Duration::from_millis(900)), 0, "no second is over");
        let mut ack = Acknowledgement::new(SwitchoverAck::Auto);
        let begun = Instant::now();
        let limited = |part: u32| ack.due_after_part(u64::from(part / 10), begun + IDLE * part);
        assert_eq!((0..1000).map(limited).filter(|due| *due).count(), 0, "a page in every ten PARTs");
    }

    #[test]
    fn never_and_always_do_not_look_at_the_source() {
        let mut never = Acknowledgement::new(SwitchoverAck::Never);
        assert!(!never.due_at_opening(&of("pc-q35-10.0")));
        assert_eq!(acknowledged(&mut never, 1000, Duration::from_secs(100)), 0);
        let mut always = Acknowledgement::new(SwitchoverAck::Always);
        assert!(always.due_at_opening(&of("pc-q35-7.2")));
        assert_eq!(acknowledged(&mut always, 1000, Duration::from_secs(100)), 0);
    }
}
