//! The on-disk formats of volumes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The on-disk format of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeType {
    /// LUKS2: two headers, up to 32 keyslots and tokens; sectors of 512 to 4096 bytes.
    #[serde(rename = "LUKS2")]
    Luks2,
    /// LUKS1: a header with eight keyslots; sectors of 512 bytes.
    #[serde(rename = "LUKS1")]
    Luks1,
    /// Plain dm-crypt: no header; the key is derived only from the secret.
    #[serde(rename = "plain")]
    Plain,
}

impl fmt::Display for VolumeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Luks2 => "LUKS2",
            Self::Luks1 => "LUKS1",
            Self::Plain => "plain",
        })
    }
}

impl FromStr for VolumeType {
    type Err = String;

    /// Reads a name as it stands in the configuration and on the command line.
    fn from_str(name: &str) -> Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "luks2" => Ok(Self::Luks2),
            "luks1" => Ok(Self::Luks1),
            "plain" => Ok(Self::Plain),
            _ => Err(format!("`{name}` is not a volume type; the types are luks2, luks1, plain")),
        }
    }
}
