//! What runs a migration, and what ends it.

pub(crate) mod budget;
pub(crate) mod counters;
pub(crate) mod fault_figures;
pub(crate) mod open_set;
pub(crate) mod secret;
pub(crate) mod session;
pub(crate) mod state;
pub(crate) mod stop;
pub(crate) mod workers;
