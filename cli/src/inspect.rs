//! `multifd inspect DIR|FILE`
use crate::flags::{Common, Inspect};
use crate::outcome::Outcome;
pub(crate) fn run(_: &Inspect, _: &Common) -> Outcome {
    Outcome::broken("under construction".into())
}
