//! A volume without a header: what dm-crypt is told by `cryptsetup open --type plain`, here by options or by the
//! configuration. Nothing on the disk says it.

use anyhow::Result;
use engine::key::{Passphrase, VolumeKey, VolumeKeyError};
use engine::luks::plain::{self, PassphraseHash, Place};
use engine::luks::{LuksError, Segment};
use engine::xts::Xts;

use crate::cpu;

/// What the volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainVolume {
    /// Where the data lies, and its encryption unit.
    pub place: Place,
    /// The key's length in bytes, both halves counted: 64 or 32.
    pub key_len: usize,
    /// How a passphrase becomes the key; without one the secret is the key.
    pub hash: Option<PassphraseHash>,
    /// The IV counts encryption units, not 512 bytes.
    pub iv_large_sectors: bool,
}

/// As cryptsetup has it, but for the length of the key, which is that of AES-256.
impl Default for PlainVolume {
    fn default() -> Self {
        Self { place: Place::default(), key_len: VolumeKey::AES_256, hash: None, iv_large_sectors: false }
    }
}

impl PlainVolume {
    /// The key that the secret is or makes.
    ///
    /// # Errors
    /// That it is none.
    pub fn key(&self, secret: &Passphrase) -> Result<VolumeKey, VolumeKeyError> {
        match self.hash {
            None => plain::key_from_file(secret, self.key_len),
            Some(hash) => plain::key_from_passphrase(hash, secret, self.key_len),
        }
    }

    /// The cipher, with its IV.
    ///
    /// # Errors
    /// That the CPU does not have the path that the environment asks for.
    pub fn cipher(&self, key: &VolumeKey) -> Result<Xts> {
        let cipher = cpu::cipher(key)?;
        Ok(if self.iv_large_sectors { cipher.with_large_sectors() } else { cipher })
    }

    /// Where the data lies on a disk of so many bytes.
    ///
    /// # Errors
    /// That it does not.
    pub fn segment(&self, disk_len: u64) -> Result<Segment, LuksError> {
        plain::segment(&self.place, disk_len)
    }
}
