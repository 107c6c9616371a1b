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

use super::header::{HEADER_LEN, SALT_LEN};
use super::{Header, KeyslotState, read_header};
use crate::key::VolumeKey;
use crate::luks::kdf::KdfOptions;
use crate::luks::{Limits, LuksError, NewKey, Random, keyslot};
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Writes `key`, encrypted with the passphrase of `new`, into the named keyslot, or into a free keyslot if none is named. Returns
/// the keyslot's number.
///
/// # Errors
/// [`LuksError::Luks2Only`] for Argon2, [`LuksError::WrongVolumeKey`], [`LuksError::KeyslotInUse`] or
/// [`LuksError::NoRoomForKey`]; the disk is then unchanged. Otherwise the error of the disk or of `random`.
pub fn add_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    new: &NewKey<'_>,
    wanted: Option<usize>,
    random: Random<'_>,
) -> Result<usize, LuksError> {
    let mut header = read_header(store)?;
    let choose = |header: &Header| header.free_keyslot(wanted);
    let index = write_keyslot(store, &mut header, limits, key, new, &choose, random)?;
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
/// [`LuksError::Luks2Only`] for Argon2, [`LuksError::WrongVolumeKey`] or [`LuksError::NoSuchKeyslot`]; the disk is then
/// unchanged. Otherwise the error of the disk or of `random`.
pub fn replace_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    new: &NewKey<'_>,
    index: usize,
    random: Random<'_>,
) -> Result<(), LuksError> {
    let mut header = read_header(store)?;
    let choose = |header: &Header| header.enabled_keyslot(index).map(|_| index);
    write_keyslot(store, &mut header, limits, key, new, &choose, random).map(|_| ())
}

/// Writes the key material, the salt and the iterations of the keyslot that `choose` returns. The keyslot's state stays as it is.
fn write_keyslot(
    store: &dyn BlockStore,
    header: &mut Header,
    limits: &Limits,
    key: &VolumeKey,
    new: &NewKey<'_>,
    choose: &dyn Fn(&Header) -> Result<usize, LuksError>,
    random: Random<'_>,
) -> Result<usize, LuksError> {
    let KdfOptions::Pbkdf2 { iterations, .. } = new.kdf else {
        return Err(LuksError::Luks2Only("key derivation by Argon2"));
    };
    let hash = header.hash()?;
    let key_len = keyslot::key_len(&header.cipher(), header.key_bytes)?;
    if key.expose().len() != key_len || !header.key_digest(hash, limits)?.is_of(key.expose()) {
        return Err(LuksError::WrongVolumeKey);
    }
    let index = choose(header)?;
    // Everything that takes long comes before the first write. The header has one hash for all.
    let new = NewKey { passphrase: new.passphrase, kdf: KdfOptions::Pbkdf2 { hash, iterations }, hash };
    let (salt, material) = new.seal(key, random)?;
    let slot = &mut header.keyslots[index];
    write_unaligned(store, &material, slot.material_at())?;
    store.flush()?;
    (slot.salt, slot.iterations) = (salt, iterations.get());
    write_header(store, header)?;
    Ok(index)
}

/// Removes a keyslot. The last keyslot is removed only with `force`.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`] or [`LuksError::LastKeyslot`]; the disk is then unchanged. Otherwise the error of the disk or
/// of `random`.
pub fn remove_key(store: &dyn BlockStore, index: usize, force: bool, random: Random<'_>) -> Result<(), LuksError> {
    let mut header = read_header(store)?;
    let slot = header.enabled_keyslot(index)?;
    let place = slot.material_at();
    // No truncation: a header's key is at most 256 bytes.
    let key_len = header.key_bytes as usize;
    let mut others = header.keyslots.iter().enumerate().filter(|(other, slot)| *other != index && slot.is_enabled());
    // A keyslot opens nothing if its removal was interrupted or if it cannot be read.
    let is_last = !others.any(|(_, slot)| keyslot::may_open(store, slot.material_at(), key_len));
    if is_last && !force {
        return Err(LuksError::LastKeyslot(index));
    }
    keyslot::wipe(store, place, keyslot::material_len(key_len) as u64, random)?;
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
