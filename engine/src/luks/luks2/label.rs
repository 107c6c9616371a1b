//! Labels, as they stand in a header.

use std::fmt;

/// A label for people: at most 47 bytes. cryptsetup takes any but NUL, so that what is read need not be text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label(Vec<u8>);

impl Label {
    /// What stands in a field that NUL bytes fill up, at the least one.
    pub(super) fn from_field(field: &[u8]) -> Option<Self> {
        let label = field.split(|byte| *byte == 0).next().unwrap_or_default();
        (label.len() < field.len()).then(|| Self(label.to_vec()))
    }

    /// The bytes, without the NUL behind them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Label {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

/// What is no text, and what a terminal would obey, is shown by its number.
impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}{}", crate::luks::printable(chunk.valid()), chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}
