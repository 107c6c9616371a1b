//! The configuration of a volume: sizes, flags and requirements.

use super::field::Field;
use crate::luks::LuksError;

/// Sizes, flags and requirements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The length of the JSON area in bytes.
    pub json_size: u64,
    /// The length of all key material in bytes.
    pub keyslots_size: u64,
    /// Options for activating the volume, such as `allow-discards`.
    pub flags: Vec<String>,
    /// Features that a program must support before it may touch the volume.
    pub requirements: Vec<String>,
}

impl Config {
    pub(super) fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        let requirements = match field.optional("requirements") {
            None => None,
            Some(requirements) => {
                requirements.object()?;
                requirements.optional("mandatory")
            }
        };
        Ok(Self {
            json_size: field.get("json_size").long()?,
            keyslots_size: field.get("keyslots_size").long()?,
            flags: field.optional("flags").map_or(Ok(Vec::new()), |field| field.texts())?,
            requirements: requirements.map_or(Ok(Vec::new()), |field| field.names())?,
        })
    }
}
