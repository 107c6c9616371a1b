//! The tokens, which help to open the volume.

use super::field::Field;
use crate::luks::LuksError;

/// A token, which helps to open the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The type.
    pub kind: String,
    /// The keyslots that it opens.
    pub keyslots: Vec<u32>,
}

impl Token {
    pub(super) fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        Ok(Self { kind: field.get("type").nonempty()?.to_owned(), keyslots: field.get("keyslots").references()? })
    }
}
