//! The status of a migration, in QEMU's words, and the one table of what may follow what.

use std::fmt;

use serde::Serialize;

/// What `query-migrate` calls `status`. Postcopy, COLO and wait-unplug are in the table, but no migration of ours gets there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// RAM moves, the guest runs.
    Active,
    /// Cancelled; the guest is where it was.
    Cancelled,
    /// Somebody has cancelled, the threads are being ended.
    Cancelling,
    /// The guest is checkpointed continuously.
    Colo,
    /// Over; the guest has moved.
    Completed,
    /// The guest is stopped, the last RAM and the devices move.
    Device,
    /// Over; the guest is where it was, unless the error says otherwise.
    Failed,
    /// Nothing has begun.
    #[default]
    None,
    /// The guest runs at the destination, its RAM follows.
    PostcopyActive,
    /// The link broke during postcopy.
    PostcopyPaused,
    /// Postcopy goes on over a new link.
    PostcopyRecover,
    /// A new link for postcopy is being set up.
    PostcopyRecoverSetup,
    /// The guest is stopped and somebody outside has to let it go on.
    PreSwitchover,
    /// Connections and headers.
    Setup,
    /// A network card has to be unplugged first.
    WaitUnplug,
}

use MigrationState as S;

/// Every state, in the order of the status enum's declaration.
const ALL: [S; 15] = [
    S::Active,
    S::Cancelled,
    S::Cancelling,
    S::Colo,
    S::Completed,
    S::Device,
    S::Failed,
    S::None,
    S::PostcopyActive,
    S::PostcopyPaused,
    S::PostcopyRecover,
    S::PostcopyRecoverSetup,
    S::PreSwitchover,
    S::Setup,
    S::WaitUnplug,
];

/// From, to. Spec: docs/wire.md §21.
const TRANSITIONS: &[(S, &[S])] = &[
    (S::None, &[S::Setup]),
    (S::Completed, &[S::Setup]),
    (S::Failed, &[S::Setup]),
    (S::Cancelled, &[S::Setup]),
    (S::Setup, &[S::WaitUnplug, S::Active, S::Failed, S::Cancelling]),
    (S::WaitUnplug, &[S::Active, S::Failed, S::Cancelling]),
    // A destination goes from active to completed at once, it has no guest to stop.
    (
        S::Active,
        &[S::PreSwitchover, S::Device, S::Completed, S::PostcopyActive, S::Colo, S::Failed, S::Cancelling],
    ),
    (S::PreSwitchover, &[S::Device, S::Failed, S::Cancelling]),
    (S::Device, &[S::Completed, S::PostcopyActive, S::Colo, S::Failed, S::Cancelling]),
    (S::PostcopyActive, &[S::Completed, S::PostcopyPaused]),
    (S::PostcopyPaused, &[S::PostcopyRecoverSetup]),
    (S::PostcopyRecoverSetup, &[S::PostcopyRecover, S::PostcopyPaused]),
    (S::PostcopyRecover, &[S::PostcopyActive, S::PostcopyPaused]),
    (S::Colo, &[S::Completed, S::Failed]),
    (S::Cancelling, &[S::Cancelled]),
];

impl MigrationState {
    /// Whether `next` may follow at once.
    pub fn may_become(self, next: Self) -> bool {
        TRANSITIONS.iter().any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether the migration is over.
    pub fn is_final(self) -> bool {
        matches!(self, S::Cancelled | S::Completed | S::Failed)
    }

    /// Every state there is.
    pub fn all() -> impl Iterator<Item = Self> {
        ALL.into_iter()
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            S::Active => "active",
            S::Cancelled => "cancelled",
            S::Cancelling => "cancelling",
            S::Colo => "colo",
            S::Completed => "completed",
            S::Device => "device",
            S::Failed => "failed",
            S::None => "none",
            S::PostcopyActive => "postcopy-active",
            S::PostcopyPaused => "postcopy-paused",
            S::PostcopyRecover => "postcopy-recover",
            S::PostcopyRecoverSetup => "postcopy-recover-setup",
            S::PreSwitchover => "pre-switchover",
            S::Setup => "setup",
            S::WaitUnplug => "wait-unplug",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row a state, one column a state, in the order of `ALL`: x may follow.
    const TABLE: &str = "
active                  ..xxxxx.x...x..
cancelled               .............x.
cancelling              .x.............
colo                    ....x.x........
completed               .............x.
device                  ..xxx.x.x......
failed                  .............x.
none                    .............x.
postcopy-active         ....x....x.....
postcopy-paused         ...........x...
postcopy-recover        ........xx.....
postcopy-recover-setup  .........xx....
pre-switchover          ..x..xx........
setup                   x.x...x.......x
wait-unplug             x.x...x........
";

    #[test]
    fn every_pair_of_states() {
        let mut rows = String::from("\n");
        for from in MigrationState::all() {
            let row: String =
                MigrationState::all().map(|to| if from.may_become(to) { 'x' } else { '.' }).collect();
            rows.push_str(&format!("{:<24}{row}\n", from.to_string()));
        }
        assert_eq!(rows, TABLE);
    }

    #[test]
    fn a_final_state_only_starts_anew() {
        for state in MigrationState::all().filter(|state| state.is_final()) {
            assert!(MigrationState::all().filter(|next| state.may_become(*next)).eq([S::Setup]));
        }
    }

    #[test]
    fn names_are_those_of_serialisation() {
        for state in MigrationState::all() {
            assert_eq!(serde_json::to_value(state).unwrap(), state.to_string());
        }
    }
}
