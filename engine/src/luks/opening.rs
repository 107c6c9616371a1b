//! Tries a passphrase on the keyslots of a volume of either format.
//!
//! ```text
//!   passphrase, salt ─► slot key ─► decrypted and merged key material: a candidate ─► digest ─► volume key
//! ```

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::hash::HashAlgorithm;
use super::kdf::{self, KdfOptions};
use super::limits::{Budget, Work};
use super::{KeyslotFault, Limits, LuksError, UnlockedVolume, keyslot};
use crate::key::{Passphrase, VolumeKey};
use crate::layout::Segment;
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned};

/// The parameters with which a passphrase opens a keyslot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) kdf: KdfOptions,
    pub(super) salt: Vec<u8>,
    /// The length in bytes of the key in the keyslot.
    pub(super) key_len: usize,
    /// The length in bytes of the key that encrypts the key material.
    pub(super) slot_key_len: usize,
    pub(super) af_hash: HashAlgorithm,
    /// The offset of the key material in bytes, a multiple of 512.
    pub(super) offset: u64,
}

impl Opening {
    pub(super) fn work(&self, limits: &Limits) -> Work {
        match self.kdf {
            KdfOptions::Pbkdf2 { hash, iterations } => Work::of_pbkdf2(limits, hash, iterations, self.slot_key_len),
            KdfOptions::Argon2id(cost) | KdfOptions::Argon2i(cost) => Work::of_argon2(limits, cost.time, cost.memory),
        }
    }

    /// Returns the key that results from decrypting the keyslot with the passphrase. With a wrong passphrase, this is
    /// noise. Also returns the first sector of the disk that does not look like key material.
    pub(super) fn candidate(
        &self,
        keyslot: usize,
        store: &dyn BlockStore,
        passphrase: &Passphrase,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<u64>), LuksError> {
        let mut material = Zeroizing::new(vec![0; keyslot::material_len(self.key_len)]);
        read_unaligned(store, &mut material, self.offset)
            .map_err(|error| KeyslotFault::Unreadable(error).of(keyslot))?;
        let damaged = keyslot::damaged_sector(&material).map(|sector| self.offset / LBA_UNIT + sector as u64);
        let slot_key =
            self.kdf.derive(keyslot, passphrase, &self.salt, self.slot_key_len).map_err(|error| match error {
                LuksError::Impossible { found, .. } => LuksError::corrupt(
                    format!("keyslots.{keyslot}.kdf"),
                    format!("{found}, which Argon2 does not allow"),
                ),
                other => other,
            })?;
        let key = keyslot::unseal(self.af_hash, slot_key, self.key_len, &mut material)?;
        Ok((key, damaged))
    }
}

/// A digest, which confirms that a key is correct. nbdcrypt supports its hash, and its iterations are within the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyDigest {
    pub(super) hash: HashAlgorithm,
    pub(super) iterations: NonZeroU32,
    pub(super) salt: Vec<u8>,
    pub(super) digest: Vec<u8>,
}

impl KeyDigest {
    /// Returns whether the digest is that of `key`. Compares in constant time.
    pub(super) fn is_of(&self, key: &[u8]) -> bool {
        let computed = kdf::pbkdf2(self.hash, key, &self.salt, self.iterations, self.digest.len());
        bool::from(computed.ct_eq(&self.digest))
    }

    pub(super) fn work(&self, limits: &Limits) -> Work {
        Work::of_pbkdf2(limits, self.hash, self.iterations, self.digest.len())
    }
}

/// The keyslots that are tried unless one is named, in the order in which they are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    keyslots: Vec<usize>,
    /// The first of these keyslots that is not tried, because the keyslots before it cost too much.
    beyond_budget: Option<usize>,
}

impl Order {
    /// Takes the work of each keyslot from the budget.
    pub(super) fn new(
        openings: impl IntoIterator<Item = (usize, Result<Opening, LuksError>)>,
        digest: &KeyDigest,
        limits: &Limits,
        budget: &mut Budget,
    ) -> Self {
        let mut order = Self { keyslots: Vec::new(), beyond_budget: None };
        for (keyslot, opening) in openings {
            order.keyslots.push(keyslot);
            if opening.is_ok_and(|opening| !budget.spend(opening.work(limits).and(digest.work(limits)))) {
                order.beyond_budget.get_or_insert(keyslot);
            }
        }
        order
    }
}

/// What volumes of both formats have: where the data lies, and what confirms the key that a passphrase finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lock {
    pub(super) segment: Segment,
    /// The length of the volume key in bytes.
    pub(super) key_len: usize,
    pub(super) digest: KeyDigest,
    pub(super) order: Order,
    pub(super) limits: Limits,
}

/// The keyslots of a volume. A format says how its keyslots open. They are tried in the same way.
pub(super) trait Keyslots {
    fn lock(&self) -> &Lock;

    /// Returns how a passphrase opens a keyslot.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`] or [`LuksError::UnboundKeyslot`], or why no passphrase can open this keyslot.
    fn opening(&self, keyslot: usize) -> Result<Opening, LuksError>;

    /// Tries the passphrase on one keyslot, even if it is otherwise ignored.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`], [`LuksError::Keyslot`], and the errors of [`Keyslots::opening`].
    fn try_keyslot(
        &self,
        keyslot: usize,
        store: &dyn BlockStore,
        passphrase: &Passphrase,
    ) -> Result<UnlockedVolume, LuksError> {
        let lock = self.lock();
        let (mut key, damaged) = self.opening(keyslot)?.candidate(keyslot, store, passphrase)?;
        if lock.digest.is_of(&key) {
            let key = VolumeKey::new(std::mem::take(&mut *key))?;
            return Ok(UnlockedVolume { key, segment: lock.segment, keyslot });
        }
        // This comes after the attempt, because key material that looks damaged may still be correct.
        Err(match damaged {
            Some(sector) => KeyslotFault::Overwritten { sector }.of(keyslot),
            None => LuksError::WrongPassphrase,
        })
    }

    /// Tries the passphrase on the keyslots, in their order.
    ///
    /// # Errors
    /// - `none` if there is no keyslot to try.
    /// - [`LuksError::WrongPassphrase`] if the passphrase opens no keyslot.
    /// - [`LuksError::TooMuchWork`], [`LuksError::Keyslot`] and others if it opens no keyslot and not all could be tried.
    fn try_in_order(
        &self,
        store: &dyn BlockStore,
        passphrase: &Passphrase,
        none: LuksError,
    ) -> Result<UnlockedVolume, LuksError> {
        let Order { keyslots, beyond_budget } = &self.lock().order;
        let mut refusal = None;
        for keyslot in keyslots.iter().copied() {
            if *beyond_budget == Some(keyslot) {
                return Err(LuksError::TooMuchWork { keyslot });
            }
            match self.try_keyslot(keyslot, store, passphrase) {
                unlocked @ (Ok(_) | Err(LuksError::Key(_))) => return unlocked,
                // If one keyslot could not be tried, that error is returned instead of `WrongPassphrase`.
                Err(error) if matches!(refusal, None | Some(LuksError::WrongPassphrase)) => refusal = Some(error),
                Err(_) => {}
            }
        }
        Err(refusal.unwrap_or(none))
    }
}
