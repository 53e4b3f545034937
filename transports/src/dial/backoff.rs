//! How long to wait before the next attempt.

use std::time::Duration;

/// Pauses that double from `first` to `most`, and start again after a success.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// The pause to make now.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.most);
        pause
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    /// Whether no pause has been made since the last success.
    pub(crate) fn is_fresh(&self) -> bool {
        self.next == self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(50));
        assert!(backoff.is_fresh());
        let pauses: Vec<_> = (0..5).map(|_| backoff.pause().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 50, 50]);
        assert!(!backoff.is_fresh());
        backoff.reset();
        assert_eq!(backoff.pause().as_millis(), 10);
    }
}
