//! Adds, changes and removes the keys of a volume of either format.
//!
//! The caller must have exclusive use of the header's disk. Two updates at the same time would undo each other.

use zeroize::Zeroizing;

use super::kdf::KdfOptions;
use super::keyslot::{self, SALT_LEN};
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

impl NewKey<'_> {
    /// Returns a new salt, and the key material: `key` encrypted with the passphrase and the salt.
    pub(super) fn seal(
        &self,
        key: &VolumeKey,
        random: Random<'_>,
    ) -> Result<([u8; SALT_LEN], Zeroizing<Vec<u8>>), LuksError> {
        let mut salt = [0; SALT_LEN];
        random(&mut salt).map_err(LuksError::Random)?;
        let mut slot_key = self.kdf.derive(0, self.passphrase, &salt, key.expose().len())?;
        let slot_key = VolumeKey::new(std::mem::take(&mut *slot_key))?;
        let material = keyslot::seal(self.hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;
        Ok((salt, material))
    }
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
    /// [`LuksError::NoSuchKeyslot`], [`LuksError::WrongPassphraseFor`], [`LuksError::Keyslot`], and the errors of
    /// [`LockedVolume::unlock`].
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: Option<usize>,
        passphrase: &Passphrase,
    ) -> Result<UnlockedVolume, LuksError> {
        let Some(keyslot) = keyslot else { return self.unlock(store, passphrase) };
        self.format().try_keyslot(keyslot, store, passphrase).map_err(|error| error.of_named_keyslot(keyslot))
    }

    /// Returns the number of the keyslot that [`LockedVolume::add_key`] would write to.
    ///
    /// # Errors
    /// [`LuksError::KeyslotInUse`], [`LuksError::NoRoomForKey`] or [`LuksError::Impossible`] if there is none, and
    /// [`LuksError::UndecidedKeyslot`] if a LUKS1 keyslot is named whose state is damaged.
    pub fn free_keyslot(&self, wanted: Option<usize>) -> Result<usize, LuksError> {
        match self {
            Self::Luks1(volume) => volume.header().free_keyslot(wanted),
            Self::Luks2(volume) => volume.header().metadata.free_keyslot(wanted),
        }
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
        match self {
            Self::Luks1(_) => luks1::add_key(store, limits, key, new, keyslot, random),
            Self::Luks2(_) => luks2::add_key(store, limits, key, new, keyslot, random),
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
        match self {
            Self::Luks1(_) => match luks1::add_key(store, limits, key, new, None, random) {
                Ok(added) => luks1::remove_key(store, old, false, random).map(|()| added),
                Err(LuksError::NoRoomForKey) if in_place => {
                    luks1::replace_key(store, limits, key, new, old, random).map(|()| old)
                }
                Err(LuksError::NoRoomForKey) => Err(LuksError::NoRoomToChange(old)),
                Err(error) => Err(error),
            },
            Self::Luks2(_) => luks2::change_key(store, limits, key, new, old, in_place, random).map(|()| old),
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
