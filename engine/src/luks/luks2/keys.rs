//! Adds, changes and removes the keyslots of a LUKS2 volume.
//!
//! ```text
//!   add      key material in a free area ─ header
//!   change   the new key's material ─ header: new key under the old number, old key under a free one ─ remove the old key
//!            (without a free number: header: new key under the old number ─ old key material overwritten)
//!   remove   key material overwritten ─ header
//! ```
//!
//! If an update is interrupted at any point, the volume opens either with the old keys or with the new keys. As in
//! cryptsetup, key material is overwritten before it disappears from the header. So no interruption leaves key material on
//! the disk that the header no longer names.

use serde_json::Value;

use super::Keyslot;
use super::metadata::{AREA_ALIGNMENT, area_len};
use super::update::Update;
use crate::key::VolumeKey;
use crate::luks::{Limits, LuksError, NewKey, Random, keyslot};
use crate::store::{BlockStore, write_unaligned};

/// Writes `key`, encrypted with the passphrase of `new`, into the named keyslot, or into a free keyslot if none is named. Returns the
/// keyslot's number.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`], [`LuksError::KeyslotInUse`], [`LuksError::NoRoomForKey`] or [`LuksError::MetadataFull`]; the
/// volume's keys are then unchanged. Otherwise the error of the disk or of `random`.
pub fn add_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    new: &NewKey<'_>,
    wanted: Option<usize>,
    random: Random<'_>,
) -> Result<usize, LuksError> {
    let mut update = Update::open(store, random)?;
    let digest = update.digest_of(key, limits)?;
    let id = update.metadata.free_keyslot(wanted)?;
    let offset = free_area(&update, area_len(key.expose().len())).ok_or(LuksError::NoRoomForKey)?;
    let slot = write_material(&mut update, key, new, offset)?;
    let mut json = update.metadata.json.clone();
    insert(&mut json, id, slot, digest);
    update.commit(&json)?;
    Ok(id)
}

/// Replaces the passphrase of a keyslot that holds `key`. The keyslot keeps its number, priority and tokens.
///
/// The new key material needs a free part of the keyslots area. If there is no free part and `in_place` is set, the new key
/// material is written over the old key material. If this write is interrupted, neither the old nor the new passphrase opens the
/// keyslot.
///
/// # Errors
/// [`LuksError::NoRoomToChange`] if there is no room for both keys and `in_place` is false,
/// [`LuksError::UnboundKeyslot`] if the keyslot holds another key, and the errors of [`add_key`].
pub fn change_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    new: &NewKey<'_>,
    index: usize,
    in_place: bool,
    random: Random<'_>,
) -> Result<(), LuksError> {
    let mut update = Update::open(store, random)?;
    let digest = update.digest_of(key, limits)?;
    let id = existing(&update, index)?;
    if !update.metadata.digests[&digest].keyslots.contains(&id) {
        return Err(LuksError::UnboundKeyslot(index));
    }
    let old_area = update.metadata.keyslots[&id].area.clone();
    let aside = update.metadata.free_keyslot(None).ok();
    let size = area_len(key.expose().len());
    let offset = match free_area(&update, size) {
        Some(offset) => offset,
        None if in_place && old_area.size >= size => old_area.offset,
        None => return Err(LuksError::NoRoomToChange(index)),
    };
    let slot = write_material(&mut update, key, new, offset)?;
    let mut json = update.metadata.json.clone();
    let name = id.to_string();
    let old = json["keyslots"][&name].clone();
    // Only the members of the new key are replaced. The priority and unknown members belong to the keyslot and stay.
    for (member, value) in slot.as_object().into_iter().flatten() {
        json["keyslots"][&name][member] = value.clone();
    }
    if offset == old_area.offset {
        return update.commit(&json);
    }
    if let Some(aside) = aside {
        insert(&mut json, aside, old, digest);
        update.commit(&json)?;
        let aside = existing(&update, aside)?;
        return remove(update, aside);
    }
    update.commit(&json)?;
    // The header no longer contains the old salt. So an interruption from here on leaves nothing that the old passphrase opens.
    keyslot::wipe(update.store, old_area.offset, old_area.size, update.random)
}

/// Removes a keyslot, and its number from the lists of all tokens and digests. The last keyslot is removed only with `force`.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`] or [`LuksError::LastKeyslot`]; the volume's keys are then unchanged. Otherwise the error of the
/// disk or of `random`.
pub fn remove_key(store: &dyn BlockStore, index: usize, force: bool, random: Random<'_>) -> Result<(), LuksError> {
    let update = Update::open(store, random)?;
    let id = existing(&update, index)?;
    let (metadata, mut others) = (&update.metadata, Vec::new());
    for digest in metadata.digests.values().filter(|digest| !digest.segments.is_empty()) {
        if digest.keyslots.contains(&id) {
            others.extend(digest.keyslots.iter().copied().filter(|keyslot| *keyslot != id));
        }
    }
    let mut is_last =
        metadata.digests.values().any(|digest| !digest.segments.is_empty() && digest.keyslots.contains(&id));
    for other in others {
        is_last = is_last && !is_whole(&update, other);
    }
    if is_last && !force {
        return Err(LuksError::LastKeyslot(index));
    }
    remove(update, id)
}

/// Returns whether a keyslot may still open: its material can be read and does not come from an interrupted removal.
fn is_whole(update: &Update<'_, '_>, id: u32) -> bool {
    let Some(slot) = update.metadata.keyslots.get(&id).filter(|slot| slot.opening.is_some() && slot.fault.is_none())
    else {
        return false;
    };
    keyslot::may_open(update.store, slot.area.offset, slot.key_size as usize)
}

fn remove(mut update: Update<'_, '_>, id: u32) -> Result<(), LuksError> {
    let area = &update.metadata.keyslots[&id].area;
    keyslot::wipe(update.store, area.offset, area.size, update.random)?;
    let mut json = update.metadata.json.clone();
    let name = id.to_string();
    if let Some(keyslots) = json["keyslots"].as_object_mut() {
        // `shift_remove` keeps the order of the others.
        keyslots.shift_remove(&name);
    }
    for kind in ["digests", "tokens"] {
        for object in json[kind].as_object_mut().into_iter().flat_map(|objects| objects.values_mut()) {
            if let Some(list) = object["keyslots"].as_array_mut() {
                list.retain(|keyslot| *keyslot != name.as_str());
            }
        }
    }
    update.commit(&json)
}

fn insert(json: &mut Value, id: usize, slot: Value, digest: u32) {
    json["keyslots"][id.to_string()] = slot;
    if let Some(list) = json["digests"][digest.to_string()]["keyslots"].as_array_mut() {
        list.push(id.to_string().into());
    }
}

/// Writes the key material at `offset` and returns the keyslot that describes it.
fn write_material(
    update: &mut Update<'_, '_>,
    key: &VolumeKey,
    new: &NewKey<'_>,
    offset: u64,
) -> Result<Value, LuksError> {
    let (salt, material) = new.seal(key, update.random)?;
    write_unaligned(update.store, &material, offset)?;
    update.store.flush()?;
    Ok(Keyslot::new(new, &salt, key.expose().len(), offset).to_json())
}

/// Returns the offset of the first gap between keyslot areas that is large enough. cryptsetup chooses the same gap.
fn free_area(update: &Update<'_, '_>, size: u64) -> Option<u64> {
    let start = 2 * update.binary.header_size;
    let end = (start + update.metadata.config.keyslots_size).min(update.store.len());
    let mut areas: Vec<(u64, u64)> =
        update.metadata.keyslots.values().map(|slot| (slot.area.offset, slot.area.size)).collect();
    areas.sort_unstable();
    let mut free_from = start;
    for (offset, len) in areas {
        if offset >= free_from + size {
            break;
        }
        free_from = (offset + len).next_multiple_of(AREA_ALIGNMENT);
    }
    (free_from + size <= end).then_some(free_from)
}

pub(super) fn existing(update: &Update<'_, '_>, index: usize) -> Result<u32, LuksError> {
    let id = u32::try_from(index).ok().filter(|id| update.metadata.keyslots.contains_key(id));
    id.ok_or(LuksError::NoSuchKeyslot(index))
}
