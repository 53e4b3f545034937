//! Descriptors that commands which are started inherit.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

use multifd_transports::Endpoint;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::Outcome;

/// A descriptor that every process inherits which is started while this lives: drop it when the
/// right one is.
#[derive(Debug)]
pub struct Inherited(OwnedFd);

impl Inherited {
    /// Lets it be inherited.
    ///
    /// # Errors
    /// When the system says no.
    pub fn new(descriptor: impl Into<OwnedFd>) -> Outcome<Self> {
        let descriptor = descriptor.into();
        fcntl_setfd(&descriptor, FdFlags::empty())?;
        Ok(Self(descriptor))
    }

    /// `fd:7`, which the other process knows it by.
    pub fn uri(&self) -> String {
        format!("fd:{}", self.0.as_raw_fd())
    }

    /// Leaves it to the code of this process that takes it, by its number.
    pub fn give_away(self) -> Endpoint {
        Endpoint::Fd(self.0.into_raw_fd())
    }
}

impl AsFd for Inherited {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
