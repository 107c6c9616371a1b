//! LUKS1, as its on-disk format specification 1.2.3 defines it.
//!
//! A volume begins with a header of 592 bytes. After it come eight keyslots, each with the split and encrypted key, and then
//! the data. The data has sectors of 512 bytes, and its IV counts from 0 at the first sector.

mod dump;
mod format;
mod header;
mod keys;
mod repair;

pub(super) use format::data_offset;
pub use format::{Options, begin, header_len};
pub use header::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, KeyslotState, SALT_LEN};
pub use keys::{add_key, remove_key, replace_key};
pub use repair::{Fix, repair};

use super::hash::HashAlgorithm;
use super::kdf::KdfOptions;
use super::limits::Budget;
use super::opening::{KeyDigest, Keyslots, Lock, Opening, Order};
use super::{DataDisk, Disks, KeyslotFault, Limits, LuksError, UnlockedVolume, keyslot};
use crate::key::Passphrase;
use crate::layout::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::signature::is_unfinished;
use crate::store::{BlockStore, read_unaligned};

/// A LUKS1 volume that nbdcrypt can open with the right passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    header: Header,
    hash: HashAlgorithm,
    lock: Lock,
}

/// Reads the sectors with the header, which may belong to any program.
///
/// # Errors
/// [`LuksError::NotLuks`] if the disk is too short, and [`LuksError::Unfinished`].
fn first_sectors(store: &dyn BlockStore) -> Result<[u8; 1024], LuksError> {
    let mut sectors = [0; 1024];
    if store.len() < sectors.len() as u64 {
        return Err(LuksError::NotLuks);
    }
    read_unaligned(store, &mut sectors, 0)?;
    if is_unfinished(&sectors) { Err(LuksError::Unfinished) } else { Ok(sectors) }
}

/// Reads the header in order to show it. The header may name any cipher.
///
/// # Errors
/// [`LuksError`] if there is no header or it is corrupt.
pub fn read_header(store: &dyn BlockStore) -> Result<Header, LuksError> {
    let bytes = first_sectors(store)?;
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
    keyslot::refuse_short_iv(&locked.header.cipher(), &locked.lock.segment)?;
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
        let hash = header.hash()?;
        let digest = header.key_digest(hash, limits)?;
        let used = (0..KEYSLOTS).filter(|index| header.keyslots[*index].state != KeyslotState::Disabled);
        let mut openings: Vec<_> = used.map(|index| (index, header.opening(index, hash, key_len, limits))).collect();
        // If no keyslot can be tried, the first error says why.
        if openings.iter().all(|(_, opening)| opening.is_err())
            && let Some((_, Err(error))) = openings.drain(..).next()
        {
            return Err(error);
        }
        let order = Order::new(openings, &digest, limits, &mut Budget::default());
        if header.payload_offset == 0 && !disk.is_detached {
            return Err(LuksError::Detached);
        }
        let offset = header.payload_offset_bytes();
        let len = disk.len.saturating_sub(offset) / LBA_UNIT * LBA_UNIT;
        if len == 0 {
            return Err(LuksError::TooSmall { needed: offset + LBA_UNIT, available: disk.len });
        }
        let segment = Segment { offset, len, sector_size: SectorSize::B512, iv_start: Lba512(0) };
        Ok(Self { header, hash, lock: Lock { segment, key_len, digest, order, limits: *limits } })
    }

    /// Tries the passphrase on the keyslots, in their order.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`] if it opens no keyslot. [`LuksError::Keyslot`], [`LuksError::UndecidedKeyslot`],
    /// [`LuksError::TooManyIterations`] or [`LuksError::TooMuchWork`] if it opens no keyslot and not all could be tried.
    /// [`LuksError::NoKeyslot`] if none is in use.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        self.try_in_order(store, passphrase, LuksError::NoKeyslot)
    }

    /// Returns the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the hash that all keyslots use.
    pub fn hash(&self) -> HashAlgorithm {
        self.hash
    }
}

impl Keyslots for Locked {
    fn lock(&self) -> &Lock {
        &self.lock
    }

    fn opening(&self, keyslot: usize) -> Result<Opening, LuksError> {
        self.header.opening(keyslot, self.hash, self.lock.key_len, &self.lock.limits)
    }
}

impl Header {
    fn hash(&self) -> Result<HashAlgorithm, LuksError> {
        HashAlgorithm::supported("hash", &self.hash_spec)
    }

    /// Returns the digest of the volume key: `PBKDF2(volume key, mk-digest-salt, mk-digest-iter, LUKS_DIGESTSIZE)`.
    fn key_digest(&self, hash: HashAlgorithm, limits: &Limits) -> Result<KeyDigest, LuksError> {
        let iterations = limits.iterations(|| "mk-digest-iter".to_owned(), self.digest_iterations)?;
        Ok(KeyDigest { hash, iterations, salt: self.digest_salt.to_vec(), digest: self.digest.to_vec() })
    }

    /// Returns how a passphrase opens a keyslot.
    fn opening(
        &self,
        index: usize,
        hash: HashAlgorithm,
        key_len: usize,
        limits: &Limits,
    ) -> Result<Opening, LuksError> {
        let slot = self.enabled_keyslot(index)?;
        if slot.iterations == 0 {
            return Err(KeyslotFault::NoIterations.of(index));
        }
        let iterations = limits.iterations(|| format!("iterations of keyslot {index}"), slot.iterations)?;
        Ok(Opening {
            kdf: KdfOptions::Pbkdf2 { hash, iterations },
            salt: slot.salt.to_vec(),
            key_len,
            slot_key_len: key_len,
            af_hash: hash,
            offset: slot.material_at(),
        })
    }
}
