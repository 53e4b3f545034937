//! The status of a migration, in QEMU's words, and the one table of what may follow what.

use std::fmt;

use serde::Serialize;

/// What `query-migrate` calls `status`. QEMU has two more, `colo` and `wait-unplug`, for what this
/// engine does not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MigrationState {
    /// RAM moves, the guest runs.
    Active,
    /// Cancelled; the guest is where it was.
    Cancelled,
    /// Cancelled by the caller, the threads are being ended.
    Cancelling,
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
    /// The devices load at the destination of a postcopy; its guest does not run yet.
    PostcopyDevice,
    /// The link broke during postcopy.
    PostcopyPaused,
    /// Postcopy goes on over a new link.
    PostcopyRecover,
    /// A new link for postcopy is being set up.
    PostcopyRecoverSetup,
    /// The guest is paused until [`Control::proceed`](crate::Control::proceed).
    PreSwitchover,
    /// Connections and headers.
    Setup,
}

use MigrationState as S;

/// Every state, in the order of the status enum's declaration.
const ALL: [S; 14] = [
    S::Active,
    S::Cancelled,
    S::Cancelling,
    S::Completed,
    S::Device,
    S::Failed,
    S::None,
    S::PostcopyActive,
    S::PostcopyDevice,
    S::PostcopyPaused,
    S::PostcopyRecover,
    S::PostcopyRecoverSetup,
    S::PreSwitchover,
    S::Setup,
];

/// From, to. Spec: docs/wire.md §21.
const TRANSITIONS: &[(S, &[S])] = &[
    (S::None, &[S::Setup]),
    (S::Completed, &[S::Setup]),
    (S::Failed, &[S::Setup]),
    (S::Cancelled, &[S::Setup]),
    (S::Setup, &[S::Active, S::Failed, S::Cancelling]),
    // A destination goes from active to completed at once, it has no guest to stop.
    (S::Active, &[S::PreSwitchover, S::Device, S::Completed, S::PostcopyActive, S::Failed, S::Cancelling]),
    (S::PreSwitchover, &[S::Device, S::Failed, S::Cancelling]),
    (S::Device, &[S::Completed, S::PostcopyActive, S::PostcopyDevice, S::Failed, S::Cancelling]),
    // Failed: the destination says so. The guest is at the source still, or lost: the error tells.
    (S::PostcopyActive, &[S::Completed, S::PostcopyPaused, S::Failed]),
    (S::PostcopyDevice, &[S::Completed, S::PostcopyActive, S::PostcopyPaused, S::Failed]),
    (S::PostcopyPaused, &[S::PostcopyRecoverSetup]),
    (S::PostcopyRecoverSetup, &[S::PostcopyRecover, S::PostcopyPaused]),
    (S::PostcopyRecover, &[S::PostcopyActive, S::PostcopyPaused]),
    (S::Cancelling, &[S::Cancelled]),
];

impl MigrationState {
    /// Whether `next` may follow at once.
    pub fn may_become(self, next: Self) -> bool {
        TRANSITIONS.iter().any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether the guest has been handed over to the destination of a postcopy, where its RAM
    /// follows.
    pub fn is_postcopy(self) -> bool {
        use S::{PostcopyActive, PostcopyDevice, PostcopyPaused, PostcopyRecover, PostcopyRecoverSetup};
        matches!(
            self,
            PostcopyActive | PostcopyDevice | PostcopyPaused | PostcopyRecover | PostcopyRecoverSetup
        )
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
            S::Completed => "completed",
            S::Device => "device",
            S::Failed => "failed",
            S::None => "none",
            S::PostcopyActive => "postcopy-active",
            S::PostcopyDevice => "postcopy-device",
            S::PostcopyPaused => "postcopy-paused",
            S::PostcopyRecover => "postcopy-recover",
            S::PostcopyRecoverSetup => "postcopy-recover-setup",
            S::PreSwitchover => "pre-switchover",
            S::Setup => "setup",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row a state, one column a state, in the order of `ALL`: x may follow.
    const TABLE: &str = "
active                  ..xxxx.x....x.
cancelled               .............x
cancelling              .x............
completed               .............x
device                  ..xx.x.xx.....
failed                  .............x
none                    .............x
postcopy-active         ...x.x...x....
postcopy-device         ...x.x.x.x....
postcopy-paused         ...........x..
postcopy-recover        .......x.x....
postcopy-recover-setup  .........xx...
pre-switchover          ..x.xx........
setup                   x.x..x........
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
