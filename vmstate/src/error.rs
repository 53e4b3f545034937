use std::fmt::{self, Display};

/// State that cannot be saved or loaded: the device, the field, what was there, and what would have
/// been right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct Error {
    /// Name of the device's description, such as `hpet`.
    pub device: String,
    /// The field with the structures around it, as in `timer[3].config`; or a subsection or a hook.
    /// Empty: all of the device.
    pub field: String,
    /// What was there.
    pub seen: String,
    /// The rule that it breaks, if that is not said by `seen`.
    pub expected: Option<String>,
}

impl Error {
    #[cold]
    pub(crate) fn new(device: &str, field: &str, seen: impl Display, expected: impl Display) -> Self {
        let expected = Some(expected.to_string());
        Self { device: device.to_owned(), field: field.to_owned(), seen: seen.to_string(), expected }
    }

    /// What a hook of the device says.
    #[cold]
    pub(crate) fn said(device: &str, hook: &str, text: String) -> Self {
        Self { device: device.to_owned(), field: hook.to_owned(), seen: text, expected: None }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.device)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.seen)?;
        match &self.expected {
            Some(expected) => write!(f, ", expected {expected}"),
            None => Ok(()),
        }
    }
}
