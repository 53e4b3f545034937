//! How long threads have waited for pages, as both ends' makers count it: by powers of two.

use multifd_tests::{Failure, Outcome};
use serde_json::Value;

/// Entry n counts waits of 2^n to 2^(n+1) microseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latency(Vec<u64>);

impl Latency {
    /// From what query-migrate or a report says.
    pub(crate) fn of(histogram: Option<&Value>) -> Outcome<Self> {
        let counts = histogram.and_then(Value::as_array).ok_or_else(|| Failure::new("no latencies"))?;
        Ok(Self(counts.iter().filter_map(Value::as_u64).collect()))
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// In µs: this part of all waits was shorter. Within an entry waits count as spread evenly by
    /// their logarithm.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let wanted = self.count() as f64 * part;
        let mut below = 0.0;
        for (power, count) in (0..).zip(&self.0) {
            let count = *count as f64;
            if count > 0.0 && below + count >= wanted {
                return 2_f64.powf(f64::from(power) + (wanted - below) / count);
            }
            below += count;
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quantiles_are_within_the_entry_that_has_them() {
        let latency = Latency::of(Some(&json!([0, 0, 10, 80, 0, 10]))).unwrap();
        assert_eq!(latency.count(), 100);
        assert!((8.0..16.0).contains(&latency.quantile(0.5)), "{}", latency.quantile(0.5));
        assert!((32.0..64.0).contains(&latency.quantile(0.99)));
        assert!(Latency::of(None).is_err() && Latency::default().quantile(0.5) == 0.0);
    }
}
