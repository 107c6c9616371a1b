//! Adds and removes keyslots of a LUKS1 volume. An interruption at any sector leaves all other keyslots unchanged.
//!
//! There is only one header, it has no checksum, and a sector boundary lies within keyslot 6. So a keyslot's fields are written
//! while it is disabled. The write that enables or disables it then changes only one sector:
//!
//! ```text
//!   add      key material ─ flush ─ salt, iterations ─ flush ─ enabled
//!   remove   key material overwritten ─ flush ─ disabled ─ flush ─ salt, iterations zero
//! ```
//!
//! As in cryptsetup, a removal overwrites the key material first. If the removal is interrupted, the header still names the
//! keyslot, so the keyslot can be removed again. In the other order, an interruption could leave key material on the disk
//! although the header no longer names its keyslot.

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::header::{HEADER_LEN, KEYSLOTS, SALT_LEN};
use super::{Header, KeyslotState, digest_of, read_header};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{Limits, LuksError, Random, kdf, keyslot};
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Writes `key`, encrypted with `passphrase`, into the named keyslot, or into a free keyslot if none is named. Returns the
/// keyslot's number.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`], [`LuksError::KeyslotInUse`] or [`LuksError::NoRoomForKey`]; the disk is then unchanged.
/// Otherwise the error of the disk or of `random`.
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
    let hash = hash_if_key_of(&header, key, limits)?;
    let index = match wanted {
        Some(index) if index >= KEYSLOTS => {
            return Err(LuksError::impossible("keyslot", index, "LUKS1 has keyslots 0 to 7"));
        }
        Some(index) => match header.keyslots[index].state {
            KeyslotState::Disabled => index,
            KeyslotState::Enabled => return Err(LuksError::KeyslotInUse(index)),
            KeyslotState::Undecided(state) => return Err(LuksError::UndecidedKeyslot { keyslot: index, state }),
        },
        None => {
            let free = header.keyslots.iter().position(|slot| slot.state == KeyslotState::Disabled);
            free.ok_or(LuksError::NoRoomForKey)?
        }
    };
    let (salt, material) = new_material(hash, key, passphrase, iterations, random)?;
    let slot = &mut header.keyslots[index];
    write_unaligned(store, &material, u64::from(slot.material_offset) * LBA_UNIT)?;
    store.flush()?;
    (slot.salt, slot.iterations) = (salt, iterations.get());
    write_header(store, &header)?;
    header.keyslots[index].state = KeyslotState::Enabled;
    write_header(store, &header)?;
    Ok(index)
}

/// Replaces the contents of a keyslot that is in use by `key`, encrypted with a new passphrase.
///
/// If the replacement is interrupted, neither the old nor the new passphrase opens the keyslot. To avoid this, add the new key to
/// a free keyslot first, and then remove the old key.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`] or [`LuksError::NoSuchKeyslot`]; the disk is then unchanged. Otherwise the error of the disk
/// or of `random`.
pub fn replace_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    passphrase: &Passphrase,
    iterations: NonZeroU32,
    index: usize,
    random: Random<'_>,
) -> Result<(), LuksError> {
    let mut header = read_header(store)?;
    let hash = hash_if_key_of(&header, key, limits)?;
    header.enabled_keyslot(index)?;
    // Everything that takes long comes before the first write.
    let (salt, material) = new_material(hash, key, passphrase, iterations, random)?;
    let slot = &mut header.keyslots[index];
    write_unaligned(store, &material, u64::from(slot.material_offset) * LBA_UNIT)?;
    store.flush()?;
    (slot.salt, slot.iterations) = (salt, iterations.get());
    write_header(store, &header)
}

/// Returns the volume's hash, after checking that `key` is the volume's key.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`] if `key` is another volume's key, or an error about something that nbdcrypt does not support.
fn hash_if_key_of(header: &Header, key: &VolumeKey, limits: &Limits) -> Result<HashAlgorithm, LuksError> {
    let hash = HashAlgorithm::from_name(&header.hash_spec).ok_or_else(|| LuksError::Unsupported {
        what: "hash",
        found: header.hash_spec.clone(),
        supported: HashAlgorithm::SUPPORTED,
    })?;
    let key_len = keyslot::key_len(&header.cipher(), header.key_bytes)?;
    let digest_iterations = limits.iterations(|| "mk-digest-iter".to_owned(), header.digest_iterations)?;
    let digest = digest_of(hash, key.expose(), &header.digest_salt, digest_iterations);
    let is_right = key.expose().len() == key_len && bool::from(digest.ct_eq(&header.digest));
    if is_right { Ok(hash) } else { Err(LuksError::WrongVolumeKey) }
}

/// Returns a new salt, and the key material: `key` encrypted with `passphrase` and the salt.
fn new_material(
    hash: HashAlgorithm,
    key: &VolumeKey,
    passphrase: &Passphrase,
    iterations: NonZeroU32,
    random: Random<'_>,
) -> Result<([u8; SALT_LEN], Zeroizing<Vec<u8>>), LuksError> {
    let mut salt = [0; SALT_LEN];
    random(&mut salt).map_err(LuksError::Random)?;
    let mut slot_key = kdf::pbkdf2(hash, passphrase.expose(), &salt, iterations, key.expose().len());
    let slot_key = VolumeKey::new(std::mem::take(&mut *slot_key))?;
    let material = keyslot::seal(hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;
    Ok((salt, material))
}

/// Removes a keyslot. The last keyslot is removed only with `force`.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`] or [`LuksError::LastKeyslot`]; the disk is then unchanged. Otherwise the error of the disk or
/// of `random`.
pub fn remove_key(store: &dyn BlockStore, index: usize, force: bool, random: Random<'_>) -> Result<(), LuksError> {
    let mut header = read_header(store)?;
    let slot = header.enabled_keyslot(index)?;
    // No truncation: a header's key is at most 256 bytes.
    let len = keyslot::material_len(header.key_bytes as usize);
    let place = u64::from(slot.material_offset) * LBA_UNIT;
    let mut is_last = true;
    for (other, slot) in header.keyslots.iter().enumerate() {
        if other != index && slot.is_enabled() {
            // A keyslot opens nothing if its removal was interrupted or if it cannot be read.
            let mut material = Zeroizing::new(vec![0; len]);
            let read = read_unaligned(store, &mut material, u64::from(slot.material_offset) * LBA_UNIT);
            is_last = is_last && (read.is_err() || keyslot::damaged_sector(&material).is_some());
        }
    }
    if is_last && !force {
        return Err(LuksError::LastKeyslot(index));
    }
    keyslot::wipe(store, place, len as u64, random)?;
    header.keyslots[index].state = KeyslotState::Disabled;
    write_header(store, &header)?;
    (header.keyslots[index].iterations, header.keyslots[index].salt) = (0, [0; SALT_LEN]);
    write_header(store, &header)
}

/// Writes the two sectors of the header. The bytes after the header in these sectors stay unchanged.
fn write_header(store: &dyn BlockStore, header: &Header) -> Result<(), LuksError> {
    let mut sectors = [0; 1024];
    read_unaligned(store, &mut sectors, 0)?;
    sectors[..HEADER_LEN].copy_from_slice(&header.to_bytes());
    write_unaligned(store, &sectors, 0)?;
    store.flush()?;
    Ok(())
}
