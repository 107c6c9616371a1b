//! Keyslots of a LUKS2 volume, added, changed and removed.
//!
//! ```text
//!   add      key material in a free area ─ header
//!   change   the new key's material ─ header: new key under the old number, old key under a free one ─ remove that
//!   remove   key material overwritten ─ header
//! ```
//!
//! Cut off anywhere, a volume opens with what opened it before or with what shall. Key material is overwritten before the
//! header forgets it, as with cryptsetup, so that no cut leaves any that nobody looks for.

use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::KdfOptions;
use super::format::{AREA_ALIGNMENT, CIPHER, SLOT_SALT_LEN, kdf_json, slot_key};
use super::metadata::MAX_OBJECTS;
use super::update::Update;
use crate::key::{Passphrase, VolumeKey};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{Limits, LuksError, Random, keyslot};
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Puts `key` into a free keyslot, or the one that is named, under `passphrase`; returns its number.
///
/// # Errors
/// [`LuksError::WrongVolumeKey`], [`LuksError::KeyslotInUse`], [`LuksError::NoRoomForKey`] or [`LuksError::MetadataFull`],
/// with the volume's keys untouched; else what the disk or the source of randomness said.
#[allow(clippy::too_many_arguments, reason = "each is one thing, and none belongs to another")]
pub fn add_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    passphrase: &Passphrase,
    kdf: &KdfOptions,
    hash: HashAlgorithm,
    wanted: Option<usize>,
    random: Random<'_>,
) -> Result<usize, LuksError> {
    let mut update = Update::open(store, random)?;
    let digest = update.digest_of(key, limits)?;
    let id = free_id(&update, wanted)?;
    let slot = write_material(&mut update, key, passphrase, kdf, hash)?;
    let mut json = update.metadata.json.clone();
    insert(&mut json, id, slot, digest);
    update.commit(&json)?;
    Ok(id as usize)
}

/// Replaces the passphrase of a keyslot that holds `key`. Its number, priority and tokens stay.
///
/// # Errors
/// As [`add_key`] has them; [`LuksError::NoRoomForKey`] where there is no room for both keys for a moment.
#[allow(clippy::too_many_arguments, reason = "each is one thing, and none belongs to another")]
pub fn change_key(
    store: &dyn BlockStore,
    limits: &Limits,
    key: &VolumeKey,
    passphrase: &Passphrase,
    kdf: &KdfOptions,
    hash: HashAlgorithm,
    index: usize,
    random: Random<'_>,
) -> Result<(), LuksError> {
    let mut update = Update::open(store, random)?;
    let digest = update.digest_of(key, limits)?;
    let id = existing(&update, index)?;
    if !update.metadata.digests[&digest].keyslots.contains(&id) {
        return Err(LuksError::NoSuchKeyslot(index));
    }
    let aside = free_id(&update, None)?;
    let slot = write_material(&mut update, key, passphrase, kdf, hash)?;
    let mut json = update.metadata.json.clone();
    let name = id.to_string();
    let old = json["keyslots"][&name].clone();
    // What belongs to the keyslot and not to its key: its priority, and what is not known here.
    for (member, value) in slot.as_object().into_iter().flatten() {
        json["keyslots"][&name][member] = value.clone();
    }
    insert(&mut json, aside, old, digest);
    update.commit(&json)?;
    remove(update, aside)
}

/// Removes a keyslot, the last one only with `force`, and takes it out of every token's and digest's list.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`] or [`LuksError::LastKeyslot`], with the volume's keys untouched; else what the disk or the
/// source of randomness said.
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

/// Whether a keyslot is one that may still open: its material can be read, and is not that of a removal which was cut off.
fn is_whole(update: &Update<'_, '_>, id: u32) -> bool {
    let Some(slot) = update.metadata.keyslots.get(&id).filter(|slot| slot.opening.is_some()) else { return false };
    let mut material = Zeroizing::new(vec![0; keyslot::material_len(slot.key_size as usize)]);
    let read = read_unaligned(update.store, &mut material, slot.area.offset);
    read.is_ok() && keyslot::damaged_sector(&material).is_none()
}

fn remove(mut update: Update<'_, '_>, id: u32) -> Result<(), LuksError> {
    let area = &update.metadata.keyslots[&id].area;
    keyslot::wipe(update.store, area.offset, area.size, update.random)?;
    let mut json = update.metadata.json.clone();
    let name = id.to_string();
    if let Some(keyslots) = json["keyslots"].as_object_mut() {
        // The others keep their order.
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

fn insert(json: &mut Value, id: u32, slot: Value, digest: u32) {
    json["keyslots"][id.to_string()] = slot;
    if let Some(list) = json["digests"][digest.to_string()]["keyslots"].as_array_mut() {
        list.push(id.to_string().into());
    }
}

/// Writes the key material, and returns the keyslot that describes it.
fn write_material(
    update: &mut Update<'_, '_>,
    key: &VolumeKey,
    passphrase: &Passphrase,
    kdf: &KdfOptions,
    hash: HashAlgorithm,
) -> Result<Value, LuksError> {
    let key_len = key.expose().len();
    let size = keyslot::material_len(key_len).next_multiple_of(AREA_ALIGNMENT) as u64;
    let offset = free_area(update, size).ok_or(LuksError::NoRoomForKey)?;
    let mut salt = [0; SLOT_SALT_LEN];
    (update.random)(&mut salt).map_err(LuksError::Random)?;
    let slot_key = slot_key(kdf, passphrase, &salt, key_len)?;
    let material = keyslot::seal(hash, &slot_key, key.expose(), update.random).map_err(LuksError::Random)?;
    let slot = json!({
        "type": "luks2",
        "key_size": key_len,
        "af": { "type": "luks1", "stripes": keyslot::STRIPES, "hash": hash.name() },
        "area": {
            "type": "raw",
            "offset": offset.to_string(),
            "size": size.to_string(),
            "encryption": CIPHER,
            "key_size": key_len,
        },
        "kdf": kdf_json(kdf, &salt),
    });
    write_unaligned(update.store, &material, offset)?;
    update.store.flush()?;
    Ok(slot)
}

/// The first gap between keyslot areas that is large enough, as cryptsetup chooses it.
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
        free_from = (offset + len).next_multiple_of(AREA_ALIGNMENT as u64);
    }
    (free_from + size <= end).then_some(free_from)
}

fn free_id(update: &Update<'_, '_>, wanted: Option<usize>) -> Result<u32, LuksError> {
    let is_free = |id: &u32| !update.metadata.keyslots.contains_key(id);
    let most = MAX_OBJECTS;
    match wanted {
        None => (0..most).find(is_free).ok_or(LuksError::NoRoomForKey),
        Some(index) => match u32::try_from(index) {
            Ok(id) if id < most && is_free(&id) => Ok(id),
            Ok(id) if id < most => Err(LuksError::KeyslotInUse(index)),
            _ => Err(LuksError::impossible("keyslot", index, "LUKS2 has keyslots 0 to 31")),
        },
    }
}

pub(super) fn existing(update: &Update<'_, '_>, index: usize) -> Result<u32, LuksError> {
    let id = u32::try_from(index).ok().filter(|id| update.metadata.keyslots.contains_key(id));
    id.ok_or(LuksError::NoSuchKeyslot(index))
}
