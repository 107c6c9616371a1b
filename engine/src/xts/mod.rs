//! AES-XTS over runs of sectors, as IEEE 1619 and NIST SP 800-38E define it and dm-crypt's `xts-plain64` uses it.
//!
//! Each sector is one data unit. Its tweak is the sector's [`Lba512`] as a 16-byte little-endian number, encrypted with
//! the second key; block `j` of the sector is masked with `tweak · α^j` in GF(2¹²⁸) before and after AES with the first
//! key.

mod portable;

use crate::key::VolumeKey;
use crate::sector::{Lba512, SectorSize};

/// A volume key, expanded and ready: AES-256-XTS or AES-128-XTS by the key's length. Round keys are wiped on drop.
pub struct Xts(portable::Xts);

impl Xts {
    /// Expands the key.
    pub fn new(key: &VolumeKey) -> Self {
        Self(portable::Xts::new(key))
    }

    /// Encrypts `data`, a run of whole sectors, in place. Its first sector lies at `first`; the IV counts 512-byte units,
    /// and wraps at 2⁶⁴.
    ///
    /// # Panics
    /// When `data` is not a whole number of sectors.
    pub fn encrypt(&self, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(sector_size.bytes()), "a run of whole sectors");
        self.0.encrypt(sector_size, first, data);
    }

    /// Decrypts `data`; the inverse of [`Xts::encrypt`].
    ///
    /// # Panics
    /// When `data` is not a whole number of sectors.
    pub fn decrypt(&self, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(sector_size.bytes()), "a run of whole sectors");
        self.0.decrypt(sector_size, first, data);
    }
}
