use std::fmt;

/// What the harness and the tests return.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Why a test cannot go on, as the text that a person reads in the test's output.
pub struct Failure(String);

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The test runner prints a returned error with `{:?}`: the plain text is more use there than a
/// quoted one.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Says what was being done when something failed.
pub trait During<T> {
    /// Puts `what` and a colon before the error's text.
    ///
    /// # Errors
    /// The same failure, with more text.
    fn during(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: Into<Failure>> During<T> for Result<T, E> {
    fn during(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{what}: {}", error.into())))
    }
}
