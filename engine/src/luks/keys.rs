//! The keys of a volume of either format: added, changed, removed.
//!
//! Whoever calls has the header's disk for itself: two updates at once would undo each other.

use super::luks2::KdfOptions;
use super::{DataDisk, HashAlgorithm, Limits, LockedVolume, LuksError, Random, UnlockedVolume, luks1, luks2};
use crate::key::{Passphrase, VolumeKey};
use crate::store::BlockStore;

/// A passphrase for a new keyslot, and what a guess at it shall cost.
#[derive(Debug)]
pub struct NewKey<'a> {
    /// The passphrase.
    pub passphrase: &'a Passphrase,
    /// How it becomes the keyslot's key: on a LUKS1 volume PBKDF2, with the volume's own hash.
    pub kdf: KdfOptions,
    /// The hash of the anti-forensic splitter, on a LUKS2 volume.
    pub hash: HashAlgorithm,
}

/// Reads a header alone, whose data may be on another disk: enough for everything here.
///
/// # Errors
/// As [`super::read`] has them.
pub fn read_for_keys(store: &dyn BlockStore, limits: &Limits) -> Result<LockedVolume, LuksError> {
    let anywhere = DataDisk { len: u64::MAX, is_detached: true };
    match luks1::read_header(store) {
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            let volume = luks2::Locked::new(luks2::read_header(store)?, anywhere, limits)?;
            Ok(LockedVolume::Luks2(Box::new(volume)))
        }
        header => Ok(LockedVolume::Luks1(Box::new(luks1::Locked::new(header?, anywhere, limits)?))),
    }
}

impl LockedVolume {
    /// Tries the passphrase on one keyslot, or on all, in their order, where none is named.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], [`LuksError::WrongPassphraseFor`], [`LuksError::NamedKeyslot`], and as
    /// [`LockedVolume::unlock`] has them.
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: Option<usize>,
        passphrase: &Passphrase,
        limits: &Limits,
    ) -> Result<UnlockedVolume, LuksError> {
        let Some(keyslot) = keyslot else { return self.unlock(store, passphrase) };
        let unlocked = match self {
            Self::Luks1(volume) => volume.unlock_keyslot(store, keyslot, passphrase),
            Self::Luks2(volume) => volume.unlock_keyslot(store, keyslot, passphrase, limits),
        };
        unlocked.map_err(|error| error.of_named_keyslot(keyslot))
    }

    /// Puts `key` into a free keyslot, or the one that is named, under a new passphrase; returns its number.
    ///
    /// # Errors
    /// As [`luks1::add_key`] and [`luks2::add_key`] have them.
    pub fn add_key(
        &self,
        store: &dyn BlockStore,
        limits: &Limits,
        key: &VolumeKey,
        new: &NewKey<'_>,
        keyslot: Option<usize>,
        random: Random<'_>,
    ) -> Result<usize, LuksError> {
        let NewKey { passphrase, kdf, hash } = new;
        match self {
            Self::Luks1(_) => match kdf {
                KdfOptions::Pbkdf2 { iterations, .. } => {
                    luks1::add_key(store, limits, key, passphrase, *iterations, keyslot, random)
                }
                _ => Err(LuksError::Luks2Only("key derivation by Argon2")),
            },
            Self::Luks2(_) => luks2::add_key(store, limits, key, passphrase, kdf, *hash, keyslot, random),
        }
    }

    /// Replaces the passphrase of keyslot `old`, which holds `key`; returns the number of the new one. On a LUKS2 volume
    /// that is the same; LUKS1 has the new key in a free keyslot, as cryptsetup does.
    ///
    /// # Errors
    /// As [`LockedVolume::add_key`] has them.
    pub fn change_key(
        &self,
        store: &dyn BlockStore,
        limits: &Limits,
        key: &VolumeKey,
        old: usize,
        new: &NewKey<'_>,
        random: Random<'_>,
    ) -> Result<usize, LuksError> {
        match self {
            Self::Luks1(_) => {
                let added = self.add_key(store, limits, key, new, None, random)?;
                luks1::remove_key(store, old, false, random)?;
                Ok(added)
            }
            Self::Luks2(_) => {
                let NewKey { passphrase, kdf, hash } = new;
                luks2::change_key(store, limits, key, passphrase, kdf, *hash, old, random)?;
                Ok(old)
            }
        }
    }

    /// Removes a keyslot, the last one only with `force`.
    ///
    /// # Errors
    /// As [`luks1::remove_key`] and [`luks2::remove_key`] have them.
    pub fn remove_key(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        force: bool,
        random: Random<'_>,
    ) -> Result<(), LuksError> {
        match self {
            Self::Luks1(_) => luks1::remove_key(store, keyslot, force, random),
            Self::Luks2(_) => luks2::remove_key(store, keyslot, force, random),
        }
    }
}
