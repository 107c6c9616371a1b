//! Finds the keyslots that hold the volume key. Tries a passphrase on all of them, or on all except one that is to be removed.

use super::{DataDisk, LockedVolume, LuksError, UnlockedVolume, luks1, luks2};
use crate::key::Passphrase;
use crate::store::BlockStore;

impl LockedVolume {
    /// Returns the numbers of the keyslots that hold the volume key, in ascending order. Unbound keyslots hold another key and
    /// are left out.
    pub fn keyslots(&self) -> Vec<usize> {
        match self {
            Self::Luks1(volume) => {
                let used = volume.header().keyslots.iter().enumerate().filter(|(_, slot)| slot.is_enabled());
                used.map(|(index, _)| index).collect()
            }
            Self::Luks2(volume) => {
                let digests = volume.header().metadata.digests.values().filter(|digest| !digest.segments.is_empty());
                let mut keyslots: Vec<usize> =
                    digests.flat_map(|digest| &digest.keyslots).map(|id| *id as usize).collect();
                keyslots.sort_unstable();
                keyslots.dedup();
                keyslots
            }
        }
    }

    /// Returns whether the keyslot has the priority "ignore": it is tried only if it is named.
    pub fn is_ignored(&self, keyslot: usize) -> bool {
        match self {
            Self::Luks1(_) => false,
            Self::Luks2(volume) => {
                let slots = &volume.header().metadata.keyslots;
                slots.iter().any(|(id, slot)| *id as usize == keyslot && slot.priority.is_ignored())
            }
        }
    }

    /// Tries the passphrase on every keyslot that holds the volume key. Keyslots with the priority "ignore" are tried last.
    /// `store` is the disk that holds the header.
    ///
    /// # Errors
    /// See [`LockedVolume::unlock`].
    pub fn unlock_any(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        self.with_every_keyslot_but(None)?.unlock(store, passphrase)
    }

    /// Tries the passphrase as [`LockedVolume::unlock_any`] does, on every keyslot except `keyslot`. If it opens one of them,
    /// it still opens the volume after `keyslot` is removed.
    ///
    /// # Errors
    /// [`LuksError::LastKeyslot`] if there is no other keyslot, and the errors of [`LockedVolume::unlock`].
    pub fn unlock_other(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        passphrase: &Passphrase,
    ) -> Result<UnlockedVolume, LuksError> {
        if self.keyslots().iter().all(|id| *id == keyslot) {
            return Err(LuksError::LastKeyslot(keyslot));
        }
        self.with_every_keyslot_but(Some(keyslot))?.unlock(store, passphrase)
    }

    /// Returns the volume without the keyslot `but`. None of the other keyslots is ignored. Their total cost is bounded as for
    /// every volume.
    fn with_every_keyslot_but(&self, but: Option<usize>) -> Result<Self, LuksError> {
        let limits = &self.format().lock().limits;
        // Only keys are tried, so the place of the data does not matter.
        let anywhere = DataDisk { len: u64::MAX, is_detached: true };
        match self {
            Self::Luks1(volume) => {
                let mut header = volume.header().clone();
                if let Some(slot) = but.and_then(|but| header.keyslots.get_mut(but)) {
                    slot.state = luks1::KeyslotState::Disabled;
                }
                Ok(Self::Luks1(Box::new(luks1::Locked::new(header, anywhere, limits)?)))
            }
            Self::Luks2(volume) => {
                let mut header = volume.header().clone();
                let metadata = &mut header.metadata;
                let is_gone = |id: u32| Some(id as usize) == but;
                metadata.keyslots.retain(|id, _| !is_gone(*id));
                metadata.digests.values_mut().for_each(|digest| digest.keyslots.retain(|id| !is_gone(*id)));
                Ok(Self::Luks2(Box::new(luks2::Locked::trying_all(header, anywhere, limits)?)))
            }
        }
    }
}
