//! A process of its own, for it gives up the runtime's protection from SIGPIPE.
#![expect(unsafe_code, reason = "there is no safe way to ask for the default action of a signal")]

use std::io::ErrorKind;

use multifd_transports::Channel;
use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::pipe::pipe;

#[test]
fn a_pipe_without_a_reader_is_an_error_and_no_signal() {
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.unwrap();
    for _ in 0..3 {
        let (reading, writing) = pipe().unwrap();
        let channel = Channel::try_from(writing).unwrap();
        drop(reading);
        assert_eq!(channel.send_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }
}
