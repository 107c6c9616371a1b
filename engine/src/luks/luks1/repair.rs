//! A LUKS1 header mended as far as it can be without a second copy: what describes keyslots that hold no key.
//!
//! There, everything is known: where the material would lie follows from the key's size, and the number of stripes is
//! always the same. Tools that took the disk for theirs have overwritten just that (a partition table's signature lies
//! in keyslot 6). What describes a keyslot with a key, the salt above all, cannot be found again, and is not touched.
//! `cryptsetup repair` does the same.

use zerocopy::FromBytes;

use super::KEYSLOTS;
use super::format::{KEYSLOT_ALIGNMENT, spacing};
use super::header::{HEADER_LEN, Header, RawHeader};
use crate::luks::LuksError;
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Mends the header on `store`, and returns the numbers of the keyslots that were mended, if any were. They hold no key.
///
/// # Errors
/// As [`super::read_header`] has them, with the disk untouched, where something else is wrong, which a backup alone can
/// mend; else what the disk said.
pub fn repair(store: &dyn BlockStore) -> Result<Vec<usize>, LuksError> {
    let wrong = match super::read_header(store) {
        Ok(_) => return Ok(Vec::new()),
        Err(error @ LuksError::Corrupt { .. }) => error,
        Err(error) => return Err(error),
    };
    let mut bytes = [0; HEADER_LEN];
    read_unaligned(store, &mut bytes, 0)?;
    let mended = mend(&mut bytes);
    // What is still wrong is told, not what was mended in vain.
    let header = Header::parse(&bytes)?;
    if mended.is_empty() {
        return Err(wrong);
    }
    write_unaligned(store, &header.to_bytes(), 0)?;
    store.flush()?;
    Ok(mended)
}

/// Lays out the keyslots without a key as every writer since cryptsetup 1.3 does, if those that hold one lie so.
fn mend(bytes: &mut [u8; HEADER_LEN]) -> Vec<usize> {
    let Ok(raw) = RawHeader::mut_from_bytes(bytes) else { return Vec::new() };
    let Ok(key_bytes @ (16 | 32 | 64)) = usize::try_from(raw.key_bytes.get()) else { return Vec::new() };
    let place = |index: usize| u32::try_from((KEYSLOT_ALIGNMENT + index * spacing(key_bytes)) as u64 / LBA_UNIT);
    let places: [u32; KEYSLOTS] = std::array::from_fn(|index| place(index).unwrap_or(u32::MAX));
    let mut slots = raw.key_slots.iter_mut().zip(places);
    if slots.any(|(slot, place)| slot.may_hold_a_key() && slot.key_material_offset.get() != place) {
        return Vec::new();
    }
    let mut mended = Vec::new();
    for (index, (slot, place)) in raw.key_slots.iter_mut().zip(places).enumerate() {
        if !slot.may_hold_a_key() && slot.lay_out(place) {
            mended.push(index);
        }
    }
    mended
}
