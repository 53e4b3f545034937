use std::fmt::Display;

/// What a parser says of the front of a buffer.
///
/// `Ok(None)`: well-formed so far, more bytes are needed. `Ok(Some((value, used)))`: parsed from
/// the first `used` bytes. `Err`: no continuation of these bytes can be right.
pub type Parsed<T> = Result<Option<(T, usize)>, Invalid>;

/// Bytes that break the format: what was looked at, what was there, and what would have been right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {seen}, expected {expected}")]
#[non_exhaustive]
pub struct Invalid {
    /// The field, as in `stream version`.
    pub what: &'static str,
    /// The value that arrived.
    pub seen: String,
    /// The rule or limit it breaks.
    pub expected: String,
}

impl Invalid {
    /// States that `what` was `seen` where the format wants `expected`.
    #[cold]
    pub fn new(what: &'static str, seen: impl Display, expected: impl Display) -> Self {
        Self { what, seen: seen.to_string(), expected: expected.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_the_value_and_the_limit() {
        assert_eq!(Invalid::new("stream version", 2, 3).to_string(), "stream version: 2, expected 3");
    }
}
