//! How a header says that a keyslot's key is derived from a passphrase.

use super::fault::Faults;
use super::field::Field;
use crate::luks::LuksError;

/// How a keyslot's key is derived from a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2.
    Pbkdf2 {
        /// The hash.
        hash: String,
        /// The iterations.
        iterations: u32,
        /// The salt.
        salt: Vec<u8>,
    },
    /// Argon2i or Argon2id.
    Argon2 {
        /// Whether it is Argon2id.
        is_id: bool,
        /// The number of passes over the memory.
        time: u32,
        /// The memory in KiB.
        memory: u32,
        /// The number of lanes.
        cpus: u32,
        /// The salt.
        salt: Vec<u8>,
    },
    /// A method that nbdcrypt does not know, by its name.
    Other(String),
}

impl Kdf {
    pub(super) fn parse(field: &Field<'_>, faults: &mut Faults) -> Result<Self, LuksError> {
        let kind = field.get("type").name()?;
        Ok(match kind {
            "pbkdf2" => Self::Pbkdf2 {
                hash: field.get("hash").name()?.to_owned(),
                iterations: faults.at_least_one(&field.get("iterations"))?,
                salt: faults.salt(&field.get("salt"))?,
            },
            "argon2i" | "argon2id" => Self::Argon2 {
                is_id: kind == "argon2id",
                time: faults.at_least_one(&field.get("time"))?,
                memory: faults.at_least_one(&field.get("memory"))?,
                cpus: faults.at_least_one(&field.get("cpus"))?,
                salt: faults.salt(&field.get("salt"))?,
            },
            other => Self::Other(other.to_owned()),
        })
    }
}
