//! How a header says that a keyslot's key is derived from a passphrase.

use std::fmt;

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};

use super::fault::Faults;
use super::field::Field;
use crate::luks::LuksError;
use crate::luks::kdf::KdfOptions;
use crate::text::human;

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
    /// Returns the key derivation of a new keyslot.
    pub(super) fn new(options: &KdfOptions, salt: &[u8]) -> Self {
        let salt = salt.to_vec();
        match *options {
            KdfOptions::Pbkdf2 { hash, iterations } => {
                Self::Pbkdf2 { hash: hash.name().to_owned(), iterations: iterations.get(), salt }
            }
            KdfOptions::Argon2id(cost) | KdfOptions::Argon2i(cost) => {
                let is_id = matches!(options, KdfOptions::Argon2id(_));
                Self::Argon2 { is_id, time: cost.time, memory: cost.memory, cpus: cost.lanes, salt }
            }
        }
    }

    /// Returns the name in the header.
    pub fn name(&self) -> &str {
        match self {
            Self::Pbkdf2 { .. } => "pbkdf2",
            Self::Argon2 { is_id: true, .. } => "argon2id",
            Self::Argon2 { is_id: false, .. } => "argon2i",
            Self::Other(name) => name,
        }
    }

    /// Returns the JSON that [`Kdf::parse`] reads.
    pub(super) fn to_json(&self) -> Value {
        let kind = self.name();
        match self {
            Self::Pbkdf2 { hash, iterations, salt } => {
                json!({ "type": kind, "hash": hash, "iterations": iterations, "salt": Base64::encode_string(salt) })
            }
            Self::Argon2 { time, memory, cpus, salt, .. } => {
                let salt = Base64::encode_string(salt);
                json!({ "type": kind, "time": time, "memory": memory, "cpus": cpus, "salt": salt })
            }
            Self::Other(_) => json!({ "type": kind }),
        }
    }

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

/// The name and the costs, for people.
impl fmt::Display for Kdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match self {
            Self::Pbkdf2 { hash, iterations, .. } => write!(f, "{name}-{hash}, {iterations} iterations"),
            Self::Argon2 { time, memory, cpus, .. } => {
                write!(f, "{name}, {time} passes, {}, {cpus} lanes", human(u64::from(*memory) << 10))
            }
            Self::Other(_) => f.write_str(name),
        }
    }
}
