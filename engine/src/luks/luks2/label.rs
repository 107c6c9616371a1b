//! The labels in a header.

use std::fmt;

/// A label for people, of at most 47 bytes. cryptsetup accepts all bytes but NUL, so a label need not be UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label(Vec<u8>);

impl Label {
    /// Reads the field as cryptsetup does: the bytes before the first NUL, and never the last byte of the field.
    pub(super) fn from_field(field: &[u8; 48]) -> Self {
        Self(field[..47].split(|byte| *byte == 0).next().unwrap_or_default().to_vec())
    }

    /// Returns the bytes, without the NUL at the end.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns whether there is no label.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Label {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

/// Escapes bytes that are not UTF-8 and characters that a terminal would interpret.
impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}{}", crate::luks::printable(chunk.valid()), chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}
