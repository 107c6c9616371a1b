//! Adds, changes and removes the keys of a volume of either format.
//!
//! The caller must have exclusive use of the header's disk. Two updates at the same time would undo each other.

use super::luks2::KdfOptions;
use super::{DataDisk, HashAlgorithm, Limits, LockedVolume, LuksError, Random, UnlockedVolume, luks1, luks2};
use crate::key::{Passphrase, VolumeKey};
use crate::store::BlockStore;

/// A passphrase for a new keyslot, and the cost of guessing it.
#[derive(Debug)]
pub struct NewKey<'a> {
    /// The passphrase.
    pub passphrase: &'a Passphrase,
    /// How the keyslot's key is derived. LUKS1 always uses PBKDF2 with the volume's own hash.
    pub kdf: KdfOptions,
    /// The hash of the anti-forensic splitter, for a LUKS2 volume.
    pub hash: HashAlgorithm,
}

/// Reads a header without its data, which may be on another disk. This is enough for every function in this file.
///
/// # Errors
/// See [`super::read`].
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
    /// Tries the passphrase on one keyslot, or on all keyslots in their order if `keyslot` is `None`.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], [`LuksError::WrongPassphraseFor`], [`LuksError::NamedKeyslot`], and the errors of
    /// [`LockedVolume::unlock`].
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

    /// Writes `key`, encrypted with a new passphrase, into the named keyslot, or into a free keyslot if none is named. Returns
    /// the keyslot's number.
    ///
    /// # Errors
    /// [`LuksError::Luks2Only`] if a LUKS1 volume should use Argon2, and the errors of [`luks1::add_key`] and
    /// [`luks2::add_key`].
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

    /// Replaces the passphrase of keyslot `old`, which holds `key`. Returns the number of the new keyslot. On a LUKS2 volume
    /// this is `old`. On a LUKS1 volume the new key goes into a free keyslot, as in cryptsetup.
    ///
    /// If there is no room for both keys, the new key is written over the old key, but only with `in_place`. If this write is
    /// interrupted, neither the old nor the new passphrase opens the keyslot.
    ///
    /// # Errors
    /// [`LuksError::NoRoomToChange`] if there is no room and `in_place` is false, and the errors of [`LockedVolume::add_key`].
    #[allow(clippy::too_many_arguments, reason = "the arguments are independent")]
    pub fn change_key(
        &self,
        store: &dyn BlockStore,
        limits: &Limits,
        key: &VolumeKey,
        old: usize,
        new: &NewKey<'_>,
        in_place: bool,
        random: Random<'_>,
    ) -> Result<usize, LuksError> {
        let NewKey { passphrase, kdf, hash } = new;
        match self {
            Self::Luks1(_) => match (self.add_key(store, limits, key, new, None, random), kdf) {
                (Ok(added), _) => {
                    luks1::remove_key(store, old, false, random)?;
                    Ok(added)
                }
                (Err(LuksError::NoRoomForKey), KdfOptions::Pbkdf2 { iterations, .. }) if in_place => {
                    luks1::replace_key(store, limits, key, passphrase, *iterations, old, random)?;
                    Ok(old)
                }
                (Err(LuksError::NoRoomForKey), _) => Err(LuksError::NoRoomToChange(old)),
                (Err(error), _) => Err(error),
            },
            Self::Luks2(_) => {
                luks2::change_key(store, limits, key, passphrase, kdf, *hash, old, in_place, random)?;
                Ok(old)
            }
        }
    }

    /// Removes a keyslot. The last keyslot is removed only with `force`.
    ///
    /// # Errors
    /// See [`luks1::remove_key`] and [`luks2::remove_key`].
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
