//! System calls: readiness by poll(2), sockets and their options, signals, descriptors by number.

pub(crate) mod broken_pipe;
pub(crate) mod event_loop;
pub(crate) mod socket;
pub(crate) mod socket_options;
pub(crate) mod sys;
pub(crate) mod wake;
