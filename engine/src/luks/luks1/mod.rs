//! LUKS1, as its on-disk format specification 1.2.3 defines it.
//!
//! A volume begins with a header of 592 bytes. After it come eight keyslots, each with the split and encrypted key, and then
//! the data. The data has sectors of 512 bytes, and its IV counts from 0 at the first sector.

mod dump;
mod format;
mod header;
mod keys;
mod repair;

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

pub(super) use format::data_offset;
pub use format::{Options, begin, header_len};
pub use header::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, KeyslotState, SALT_LEN};
pub use keys::{add_key, remove_key, replace_key};
pub use repair::{Fix, repair};

use super::hash::HashAlgorithm;
use super::limits::{Budget, Work};
use super::{DataDisk, Disks, Limits, LuksError, UnlockedVolume, kdf, keyslot};
use crate::layout::Segment;

use crate::key::{Passphrase, VolumeKey};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::signature::is_unfinished;
use crate::store::{BlockStore, read_unaligned};

/// A LUKS1 volume that nbdcrypt can open with the right passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    header: Header,
    hash: HashAlgorithm,
    key_len: usize,
    digest_iterations: NonZeroU32,
    segment: Segment,
    /// For each keyslot, the reason why it is never tried, if there is one.
    faults: [Option<SlotFault>; KEYSLOTS],
    /// The first keyslot that is tried only if it is named, because the keyslots before it cost too much.
    beyond_budget: Option<usize>,
}

/// Why one keyslot cannot be tried while the rest of the header is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotFault {
    Undecided(u32),
    NoIterations,
    TooManyIterations { found: u32, limit: u32 },
}

impl SlotFault {
    fn of(index: usize, slot: &Keyslot, limits: &Limits) -> Option<Self> {
        match slot.state {
            KeyslotState::Disabled => None,
            KeyslotState::Undecided(word) => Some(Self::Undecided(word)),
            KeyslotState::Enabled => match limits.iterations(|| field(index), slot.iterations) {
                Ok(_) => None,
                Err(LuksError::TooManyIterations { found, limit, .. }) => {
                    Some(Self::TooManyIterations { found, limit })
                }
                Err(_) => Some(Self::NoIterations),
            },
        }
    }

    fn error(self, index: usize) -> LuksError {
        match self {
            Self::Undecided(state) => LuksError::UndecidedKeyslot { keyslot: index, state },
            Self::NoIterations => LuksError::NoIterations(index),
            Self::TooManyIterations { found, limit } => {
                LuksError::TooManyIterations { field: field(index), found, limit }
            }
        }
    }
}

/// Returns the name of the field with the iterations of a keyslot.
fn field(index: usize) -> String {
    format!("iterations of keyslot {index}")
}

/// Reads the header in order to show it. The header may name any cipher.
///
/// # Errors
/// [`LuksError`] if there is no header or it is corrupt.
pub fn read_header(store: &dyn BlockStore) -> Result<Header, LuksError> {
    let mut bytes = [0; 1024];
    if store.len() < bytes.len() as u64 {
        return Err(LuksError::NotLuks);
    }
    read_unaligned(store, &mut bytes, 0)?;
    if is_unfinished(&bytes) {
        return Err(LuksError::Unfinished);
    }
    let header = Header::parse(&bytes)?;
    // As in cryptsetup, a header whose key material is cut off is not valid.
    let needed = header.end_of_keyslots();
    if needed > store.len() {
        return Err(LuksError::TooSmall { needed, available: store.len() });
    }
    Ok(header)
}

/// Reads the header of a volume in order to open it.
///
/// # Errors
/// [`LuksError`] if there is no header, if it is corrupt, or if it asks for too much work or for something that nbdcrypt
/// does not support.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<Locked, LuksError> {
    let disks = disks.into();
    let locked = Locked::new(read_header(disks.header())?, disks.data_disk(), limits)?;
    keyslot::refuse_short_iv(&locked.header.cipher(), &locked.segment)?;
    Ok(locked)
}

impl Locked {
    /// Returns the volume that `header` describes, with its data on `disk`.
    ///
    /// # Errors
    /// [`LuksError`] if the header asks for too much work or for something that nbdcrypt does not support, or if the disk is
    /// too small.
    pub fn new(header: Header, disk: DataDisk, limits: &Limits) -> Result<Self, LuksError> {
        let key_len = keyslot::key_len(&header.cipher(), header.key_bytes)?;
        let hash = HashAlgorithm::from_name(&header.hash_spec).ok_or_else(|| LuksError::Unsupported {
            what: "hash",
            found: header.hash_spec.clone(),
            supported: HashAlgorithm::SUPPORTED,
        })?;
        let digest_iterations = limits.iterations(|| "mk-digest-iter".to_owned(), header.digest_iterations)?;
        let (mut budget, mut beyond_budget) = (Budget::default(), None);
        let faults = std::array::from_fn(|index| SlotFault::of(index, &header.keyslots[index], limits));
        let used = || header.keyslots.iter().enumerate().filter(|(_, slot)| slot.state != KeyslotState::Disabled);
        let first_fault = used().find_map(|(index, _)| faults[index].map(|fault| fault.error(index)));
        if let Some(error) = first_fault.filter(|_| used().all(|(index, _)| faults[index].is_some())) {
            return Err(error);
        }
        for (index, slot) in used().filter(|(index, _)| faults[*index].is_none()) {
            let iterations = limits.iterations(|| field(index), slot.iterations)?;
            let digest = Work::of_pbkdf2(limits, hash, digest_iterations, DIGEST_LEN);
            if !budget.spend(Work::of_pbkdf2(limits, hash, iterations, key_len).and(digest)) {
                beyond_budget = beyond_budget.or(Some(index));
            }
        }
        if header.payload_offset == 0 && !disk.is_detached {
            return Err(LuksError::Detached);
        }
        let offset = header.payload_offset_bytes();
        let len = disk.len.saturating_sub(offset) / LBA_UNIT * LBA_UNIT;
        if len == 0 {
            return Err(LuksError::TooSmall { needed: offset + LBA_UNIT, available: disk.len });
        }
        let segment = Segment { offset, len, sector_size: SectorSize::B512, iv_start: Lba512(0) };
        Ok(Self { header, hash, key_len, digest_iterations, segment, faults, beyond_budget })
    }

    /// Tries the passphrase on the keyslots, in their order.
    ///
    /// # Errors
    /// - [`LuksError::WrongPassphrase`] if it opens no keyslot.
    /// - [`LuksError::DamagedKeyslot`], [`LuksError::UnreadableKeyslot`], [`LuksError::UndecidedKeyslot`],
    ///   [`LuksError::NoIterations`], [`LuksError::Corrupt`], [`LuksError::TooManyIterations`] or
    ///   [`LuksError::TooMuchWork`] if it opens no keyslot and not all could be tried.
    /// - [`LuksError::NoKeyslot`] if none is in use.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        let mut refusal = LuksError::NoKeyslot;
        for (keyslot, slot) in self.header.keyslots.iter().enumerate() {
            if slot.state == KeyslotState::Disabled {
                continue;
            }
            if self.beyond_budget == Some(keyslot) {
                return Err(LuksError::TooMuchWork { keyslot });
            }
            match self.unlock_keyslot(store, keyslot, passphrase) {
                // If one keyslot could not be tried, that error is returned instead of `WrongPassphrase`.
                Err(error @ LuksError::WrongPassphrase) => {
                    if let LuksError::NoKeyslot = refusal {
                        refusal = error;
                    }
                }
                Err(
                    error @ (LuksError::DamagedKeyslot { .. }
                    | LuksError::UnreadableKeyslot { .. }
                    | LuksError::UndecidedKeyslot { .. }
                    | LuksError::NoIterations(_)
                    | LuksError::Corrupt { .. }
                    | LuksError::TooManyIterations { .. }),
                ) => {
                    if matches!(refusal, LuksError::NoKeyslot | LuksError::WrongPassphrase) {
                        refusal = error;
                    }
                }
                result => return result,
            }
        }
        Err(refusal)
    }

    /// Tries the passphrase on one keyslot.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], and the errors of [`Locked::unlock`].
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        passphrase: &Passphrase,
    ) -> Result<UnlockedVolume, LuksError> {
        if let Some(fault) = self.faults.get(keyslot).copied().flatten() {
            return Err(fault.error(keyslot));
        }
        let slot = self.header.enabled_keyslot(keyslot)?;
        let mut material = Zeroizing::new(vec![0; keyslot::material_len(self.key_len)]);
        read_unaligned(store, &mut material, u64::from(slot.material_offset) * LBA_UNIT)
            .map_err(|source| LuksError::UnreadableKeyslot { keyslot, source })?;
        let damaged = keyslot::damaged_sector(&material);
        if let Some(key) = self.try_keyslot(slot, &mut material, passphrase)? {
            return Ok(UnlockedVolume { key, segment: self.segment, keyslot });
        }
        // This comes after the attempt, because key material that looks damaged may still be correct.
        Err(match damaged {
            Some(sector) => {
                LuksError::DamagedKeyslot { keyslot, sector: u64::from(slot.material_offset) + sector as u64 }
            }
            None => LuksError::WrongPassphrase,
        })
    }

    /// Returns the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Returns the hash that all keyslots use.
    pub fn hash(&self) -> HashAlgorithm {
        self.hash
    }

    /// Returns the length of the volume key in bits, with both halves counted.
    pub fn key_bits(&self) -> usize {
        self.key_len * 8
    }

    fn try_keyslot(
        &self,
        slot: &Keyslot,
        material: &mut [u8],
        passphrase: &Passphrase,
    ) -> Result<Option<VolumeKey>, LuksError> {
        let Some(iterations) = NonZeroU32::new(slot.iterations) else {
            return Ok(None);
        };
        let slot_key = kdf::pbkdf2(self.hash, passphrase.expose(), &slot.salt, iterations, self.key_len);
        let mut candidate = keyslot::unseal(self.hash, slot_key, self.key_len, material)?;
        let digest = digest_of(self.hash, &candidate, &self.header.digest_salt, self.digest_iterations);
        if !bool::from(digest.ct_eq(&self.header.digest)) {
            return Ok(None);
        }
        Ok(Some(VolumeKey::new(std::mem::take(&mut *candidate))?))
    }
}

/// Returns `mk-digest = PBKDF2(volume key, mk-digest-salt, mk-digest-iter, LUKS_DIGESTSIZE)`.
fn digest_of(hash: HashAlgorithm, key: &[u8], salt: &[u8], iterations: NonZeroU32) -> [u8; DIGEST_LEN] {
    let mut digest = [0; DIGEST_LEN];
    digest.copy_from_slice(&kdf::pbkdf2(hash, key, salt, iterations, DIGEST_LEN));
    digest
}
