//! LUKS1, after the on-disk format specification, version 1.2.3.
//!
//! A header of 592 bytes, eight keyslots of split and encrypted key, then the data, in sectors of 512 bytes whose IV counts
//! from 0 at the first of them.

mod dump;
mod format;
mod header;
mod keys;
mod repair;

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

pub use format::{Options, begin, header_len};
pub use header::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, SALT_LEN};
pub use keys::{add_key, remove_key};
pub use repair::{Fix, repair};

use super::hash::HashAlgorithm;
use super::limits::{Budget, Work};
use super::{DataDisk, Disks, Limits, LuksError, Segment, UnlockedVolume, kdf, keyslot};
use crate::key::{Passphrase, VolumeKey};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::signature::is_unfinished;
use crate::store::{BlockStore, read_unaligned};

/// A LUKS1 volume that nbdcrypt can open, given a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    header: Header,
    hash: HashAlgorithm,
    key_len: usize,
    digest_iterations: NonZeroU32,
    segment: Segment,
    /// The first keyslot that is tried only when it is named, for what those before it cost.
    beyond_budget: Option<usize>,
}

/// Reads the header, whatever cipher it names: enough to show it.
///
/// # Errors
/// [`LuksError`] when there is none, or it is corrupt.
pub fn read_header(store: &dyn BlockStore) -> Result<Header, LuksError> {
    let mut bytes = [0; 1024];
    if store.len() < bytes.len() as u64 {
        return Err(LuksError::NotLuks);
    }
    read_unaligned(store, &mut bytes, 0)?;
    if is_unfinished(&bytes) {
        return Err(LuksError::Unfinished);
    }
    Header::parse(&bytes)
}

/// Reads the header of a volume that shall be opened.
///
/// # Errors
/// [`LuksError`] when there is none, or it is corrupt, or asks for what nbdcrypt does not do or for too much work.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<Locked, LuksError> {
    let disks = disks.into();
    Locked::new(read_header(disks.header())?, disks.data_disk(), limits)
}

impl Locked {
    /// The volume that `header` describes, with its data on `disk`.
    ///
    /// # Errors
    /// [`LuksError`] when it asks for what nbdcrypt does not do or for too much work, or the disk is too small for it.
    pub fn new(header: Header, disk: DataDisk, limits: &Limits) -> Result<Self, LuksError> {
        let key_len = keyslot::key_len(&header.cipher(), header.key_bytes)?;
        let hash = HashAlgorithm::from_name(&header.hash_spec).ok_or_else(|| LuksError::Unsupported {
            what: "hash",
            found: header.hash_spec.clone(),
            supported: HashAlgorithm::SUPPORTED,
        })?;
        let digest_iterations = limits.iterations(|| "mk-digest-iter".to_owned(), header.digest_iterations)?;
        let (mut budget, mut beyond_budget) = (Budget::default(), None);
        for (index, slot) in header.keyslots.iter().enumerate().filter(|(_, slot)| slot.enabled) {
            let iterations = limits.iterations(|| format!("iterations of keyslot {index}"), slot.iterations)?;
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
        Ok(Self { header, hash, key_len, digest_iterations, segment, beyond_budget })
    }

    /// Tries the passphrase on the keyslots, in their order.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`] when it opens none of them; [`LuksError::DamagedKeyslot`] or
    /// [`LuksError::UnreadableKeyslot`] when it opens none, and not all could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        let mut refusal = LuksError::NoKeyslot;
        for (keyslot, _) in self.header.keyslots.iter().enumerate().filter(|(_, slot)| slot.enabled) {
            if self.beyond_budget == Some(keyslot) {
                return Err(LuksError::TooMuchWork { keyslot });
            }
            match self.unlock_keyslot(store, keyslot, passphrase) {
                // What kept a keyslot from being tried is told before what was tried in vain.
                Err(error @ LuksError::WrongPassphrase) => {
                    if let LuksError::NoKeyslot = refusal {
                        refusal = error;
                    }
                }
                Err(error @ (LuksError::DamagedKeyslot { .. } | LuksError::UnreadableKeyslot { .. })) => {
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
    /// [`LuksError::NoSuchKeyslot`], and as [`Locked::unlock`] has them.
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        passphrase: &Passphrase,
    ) -> Result<UnlockedVolume, LuksError> {
        let slot = self.header.keyslots.get(keyslot).filter(|slot| slot.enabled);
        let slot = slot.ok_or(LuksError::NoSuchKeyslot(keyslot))?;
        let mut material = Zeroizing::new(vec![0; keyslot::material_len(self.key_len)]);
        read_unaligned(store, &mut material, u64::from(slot.material_offset) * LBA_UNIT)
            .map_err(|source| LuksError::UnreadableKeyslot { keyslot, source })?;
        if let Some(sector) = keyslot::damaged_sector(&material) {
            return Err(LuksError::DamagedKeyslot { keyslot, sector: u64::from(slot.material_offset) + sector as u64 });
        }
        let key = self.try_keyslot(slot, &mut material, passphrase)?.ok_or(LuksError::WrongPassphrase)?;
        Ok(UnlockedVolume { key, segment: self.segment, keyslot })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// The hash of all its keyslots.
    pub fn hash(&self) -> HashAlgorithm {
        self.hash
    }

    /// The length of the volume key in bits, both halves counted.
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

/// `mk-digest = PBKDF2(volume key, mk-digest-salt, mk-digest-iter, LUKS_DIGESTSIZE)`.
fn digest_of(hash: HashAlgorithm, key: &[u8], salt: &[u8], iterations: NonZeroU32) -> [u8; DIGEST_LEN] {
    let mut digest = [0; DIGEST_LEN];
    digest.copy_from_slice(&kdf::pbkdf2(hash, key, salt, iterations, DIGEST_LEN));
    digest
}
