//! The UUID of a volume, as the header spells it.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use super::{LuksError, printable};

/// The length of the header's UUID field in bytes, including the final NUL.
pub(super) const FIELD_LEN: usize = 40;

/// The text in the UUID field of a header.
///
/// cryptsetup writes a UUID there but accepts any text. Opening a volume does not depend on it, so a header with a damaged
/// UUID is still valid. The bytes are kept unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderUuid(Vec<u8>);

impl HeaderUuid {
    /// Reads the field as cryptsetup does: the bytes before the first NUL, and never the last byte of the field.
    pub(super) fn from_field(field: &[u8; FIELD_LEN]) -> Self {
        let text = field[..FIELD_LEN - 1].split(|byte| *byte == 0).next().unwrap_or_default();
        Self(text.to_vec())
    }

    /// Returns the field: the text, padded with NULs.
    pub(super) fn to_field(&self) -> [u8; FIELD_LEN] {
        let mut field = [0; FIELD_LEN];
        field[..self.0.len()].copy_from_slice(&self.0);
        field
    }

    /// Returns the UUID.
    ///
    /// # Errors
    /// [`LuksError::DamagedUuid`] if the text is not a UUID.
    pub fn parsed(&self) -> Result<Uuid, LuksError> {
        let uuid = std::str::from_utf8(&self.0).ok().and_then(|text| Uuid::from_str(text).ok());
        uuid.ok_or_else(|| LuksError::DamagedUuid(self.to_string()))
    }
}

impl From<Uuid> for HeaderUuid {
    fn from(uuid: Uuid) -> Self {
        Self(uuid.hyphenated().to_string().into_bytes())
    }
}

/// Escapes bytes that are not UTF-8 and characters that a terminal would interpret.
impl fmt::Display for HeaderUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            write!(f, "{}{}", printable(chunk.valid()), chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}
