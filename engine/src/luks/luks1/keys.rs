//! Keyslots of a LUKS1 volume, added and removed so that a cut at any sector leaves every other keyslot as it was.
//!
//! There is one header, without a checksum, and it crosses a sector boundary within keyslot 6. So a keyslot is described
//! while it is disabled, and enabled by a write that changes one sector alone:
//!
//! ```text
//!   add      key material ─ flush ─ salt, iterations ─ flush ─ enabled
//!   remove   key material overwritten ─ flush ─ disabled ─ flush ─ salt, iterations zero
//! ```
//!
//! Material goes first in a removal, as with cryptsetup: cut off, the header still names the keyslot, which then can be
//! removed again. The other way round, key material would be left that nobody looks for.

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::header::{HEADER_LEN, KEYSLOTS, SALT_LEN};
use super::{Header, digest_of, read_header};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{Limits, LuksError, Random, kdf, keyslot};
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Puts `key` into a free keyslot, or the one that is named, under `passphrase`; returns its number.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`], [`LuksError::KeyslotInUse`] or [`LuksError::NoRoomForKey`], with the disk untouched; else
/// what the disk or the source of randomness said.
pub fn add_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    passphrase: &Passphrase,
    iterations: NonZeroU32,
    wanted: Option<usize>,
    random: Random<'_>,
) -> Result<usize, LuksError> {
    let mut header = read_header(store)?;
    let hash = HashAlgorithm::from_name(&header.hash_spec).ok_or_else(|| LuksError::Unsupported {
        what: "hash",
        found: header.hash_spec.clone(),
        supported: HashAlgorithm::SUPPORTED,
    })?;
    let key_len = keyslot::key_len(&header.cipher(), header.key_bytes)?;
    let digest_iterations = limits.iterations(|| "mk-digest-iter".to_owned(), header.digest_iterations)?;
    let digest = digest_of(hash, key.expose(), &header.digest_salt, digest_iterations);
    if key.expose().len() != key_len || !bool::from(digest.ct_eq(&header.digest)) {
        return Err(LuksError::WrongVolumeKey);
    }
    let index = match wanted {
        Some(index) if index >= KEYSLOTS => {
            return Err(LuksError::impossible("keyslot", index, "LUKS1 has keyslots 0 to 7"));
        }
        Some(index) if header.keyslots[index].enabled => return Err(LuksError::KeyslotInUse(index)),
        Some(index) => index,
        None => header.keyslots.iter().position(|slot| !slot.enabled).ok_or(LuksError::NoRoomForKey)?,
    };
    let mut salt = [0; SALT_LEN];
    random(&mut salt).map_err(LuksError::Random)?;
    let mut slot_key = kdf::pbkdf2(hash, passphrase.expose(), &salt, iterations, key_len);
    let slot_key = VolumeKey::new(std::mem::take(&mut *slot_key))?;
    let material = keyslot::seal(hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;

    let slot = &mut header.keyslots[index];
    write_unaligned(store, &material, u64::from(slot.material_offset) * LBA_UNIT)?;
    store.flush()?;
    (slot.salt, slot.iterations) = (salt, iterations.get());
    write_header(store, &header)?;
    header.keyslots[index].enabled = true;
    write_header(store, &header)?;
    Ok(index)
}

/// Removes a keyslot, the last one only with `force`.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`] or [`LuksError::LastKeyslot`], with the disk untouched; else what the disk or the source of
/// randomness said.
pub fn remove_key(store: &dyn BlockStore, index: usize, force: bool, random: Random<'_>) -> Result<(), LuksError> {
    let mut header = read_header(store)?;
    let slot = header.keyslots.get(index).filter(|slot| slot.enabled).ok_or(LuksError::NoSuchKeyslot(index))?;
    // No truncation: a header's key is at most 256 bytes.
    let len = keyslot::material_len(header.key_bytes as usize);
    let place = u64::from(slot.material_offset) * LBA_UNIT;
    let mut is_last = true;
    for (other, slot) in header.keyslots.iter().enumerate() {
        if other != index && slot.enabled {
            // One whose removal was cut off opens nothing any more, and neither does one that cannot be read.
            let mut material = Zeroizing::new(vec![0; len]);
            let read = read_unaligned(store, &mut material, u64::from(slot.material_offset) * LBA_UNIT);
            is_last = is_last && (read.is_err() || keyslot::damaged_sector(&material).is_some());
        }
    }
    if is_last && !force {
        return Err(LuksError::LastKeyslot(index));
    }
    keyslot::wipe(store, place, len as u64, random)?;
    header.keyslots[index].enabled = false;
    write_header(store, &header)?;
    (header.keyslots[index].iterations, header.keyslots[index].salt) = (0, [0; SALT_LEN]);
    write_header(store, &header)
}

/// Both of the header's sectors; what lies behind it in them stays.
fn write_header(store: &dyn BlockStore, header: &Header) -> Result<(), LuksError> {
    let mut sectors = [0; 1024];
    read_unaligned(store, &mut sectors, 0)?;
    sectors[..HEADER_LEN].copy_from_slice(&header.to_bytes());
    write_unaligned(store, &sectors, 0)?;
    store.flush()?;
    Ok(())
}
