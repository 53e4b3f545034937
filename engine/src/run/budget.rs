//! The memory that a peer can make this end use, guest RAM apart: one limit for all of it together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Phase, Result};

/// Limit on the sum of what [`Share`]s hold.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Account>);

#[derive(Debug)]
struct Account {
    limit: u64,
    used: AtomicU64,
}

/// What one buffer, window or tail holds of it; given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    account: Arc<Account>,
    held: u64,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Self(Arc::new(Account { limit, used: AtomicU64::new(0) }))
    }

    /// A share that holds nothing yet.
    pub(crate) fn share(&self) -> Share {
        Share { account: Arc::clone(&self.0), held: 0 }
    }
}

impl Share {
    /// Holds `bytes` from now on; less than before is nothing new. `what` needs them.
    ///
    /// # Errors
    /// All shares together would hold more than the limit.
    pub(crate) fn grow_to(&mut self, bytes: usize, phase: Phase, what: &str) -> Result<()> {
        let Some(more) = (bytes as u64).checked_sub(self.held).filter(|more| *more > 0) else {
            return Ok(());
        };
        let Account { limit, used } = &*self.account;
        // One place decides, so nothing else is ordered by it.
        let taken = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(more).filter(|sum| sum <= limit)
        });
        match taken {
            Ok(_) => {
                self.held += more;
                Ok(())
            }
            Err(used) => {
                let detail = format!(
                    "{what} would take {bytes} bytes of memory; with the {used} that are in use already, limit is {limit}"
                );
                Err(Error::new(ErrorKind::PeerMisbehaved, phase, detail))
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_together_hold_no_more_than_the_limit_and_give_back() {
        let budget = Budget::new(100);
        let (mut one, mut other) = (budget.share(), budget.share());
        one.grow_to(60, Phase::Active, "a window").unwrap();
        one.grow_to(50, Phase::Active, "a window").unwrap();
        other.grow_to(40, Phase::Active, "a buffer").unwrap();
        let error = other.grow_to(41, Phase::Device, "a buffer").unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::PeerMisbehaved, Phase::Device));
        let words =
            "a buffer would take 41 bytes of memory; with the 100 that are in use already, limit is 100";
        assert!(error.to_string().contains(words), "{error}");
        drop(one);
        other.grow_to(100, Phase::Active, "a buffer").unwrap();
        drop(other);
        budget.share().grow_to(100, Phase::Active, "a window").unwrap();
    }
}
