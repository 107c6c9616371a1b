//! A damaged LUKS1 header, put right where that is possible: what `cryptsetup repair` does.
//!
//! There is one header, without a checksum, so that it must be known what should stand there. That is known of keyslots
//! which are not in use: every volume has them at the same places. A partition table, which ends within keyslot 6, damages
//! them first. Keyslots in use stay as they are, and so does their part of the header while it is written.

use std::fmt;

use zerocopy::FromBytes;

use super::format::{KEYSLOT_ALIGNMENT, spacing};
use super::header::{DISABLED, ENABLED, RawHeader, RawKeyslot, SALT_LEN};
use super::{Header, KEYSLOTS};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{LuksError, keyslot, printable};
use crate::sector::LBA_UNIT;
use crate::signature::is_unfinished;
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// What ends a partition table, and a boot sector, and where.
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const BOOT_SIGNATURE_AT: usize = 510;
/// The keyslot whose salt is there.
const KEYSLOT_AT_BOOT_SIGNATURE: usize = 6;

/// Something in a header that was put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// The cipher mode ECB has no IV.
    CipherMode {
        /// What stood there.
        from: String,
    },
    /// A hash is written in small letters.
    Hash {
        /// What stood there.
        from: String,
    },
    /// The place of a keyslot that is not in use, in 512-byte sectors.
    Offset {
        /// The keyslot, from 0.
        keyslot: usize,
        /// What stood there.
        from: u32,
        /// What stands there now.
        to: u32,
    },
    /// The stripes of a keyslot that is not in use.
    Stripes {
        /// The keyslot, from 0.
        keyslot: usize,
        /// What stood there.
        from: u32,
    },
    /// A partition table's signature in the salt of a keyslot that is not in use.
    BootSignature {
        /// The keyslot, from 0.
        keyslot: usize,
    },
    /// A keyslot that was neither enabled nor disabled, and has a salt, iterations and key material: it is enabled again.
    Enabled {
        /// The keyslot, from 0.
        keyslot: usize,
        /// What stood there.
        from: u32,
    },
    /// A keyslot that is not in use was made to say so.
    Cleared {
        /// The keyslot, from 0.
        keyslot: usize,
    },
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CipherMode { from } => write!(f, "the cipher mode was {}, and is ecb", printable(from)),
            Self::Hash { from } => {
                write!(f, "the hash was {}, and is {}", printable(from), printable(&from.to_ascii_lowercase()))
            }
            Self::Offset { keyslot, from, to } => {
                write!(f, "keyslot {keyslot}: the key material's offset was {from}, and is {to}")
            }
            Self::Stripes { keyslot, from } => {
                write!(f, "keyslot {keyslot}: the stripes were {from}, and are {}", keyslot::STRIPES)
            }
            Self::BootSignature { keyslot } => {
                write!(f, "keyslot {keyslot}: there was the signature of a partition table")
            }
            Self::Enabled { keyslot, from } => {
                write!(f, "keyslot {keyslot}: its state was {from:#010x}, and it is enabled, since it holds a key")
            }
            Self::Cleared { keyslot } => write!(f, "keyslot {keyslot}: disabled, its salt cleared"),
        }
    }
}

/// Puts a header right; returns what was not.
///
/// # Errors
/// [`LuksError::NotLuks`], [`LuksError::Version`] or [`LuksError::Unfinished`] where there is none; [`LuksError::BeyondRepair`]
/// where it is not known what should stand in it, with the disk untouched; else what the disk said.
pub fn repair(store: &dyn BlockStore) -> Result<Vec<Fix>, LuksError> {
    let mut sectors = [0; 1024];
    if store.len() < sectors.len() as u64 {
        return Err(LuksError::NotLuks);
    }
    read_unaligned(store, &mut sectors, 0)?;
    if is_unfinished(&sectors) {
        return Err(LuksError::Unfinished);
    }
    match Header::parse(&sectors) {
        Ok(header) if !has_iv_of_ecb(&header.cipher_mode) && is_lowercase(header.hash_spec.as_bytes()) => {
            return Ok(Vec::new());
        }
        Ok(_) | Err(LuksError::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    let has_boot_signature = sectors[BOOT_SIGNATURE_AT..][..BOOT_SIGNATURE.len()] == BOOT_SIGNATURE;
    let Ok((raw, _)) = RawHeader::mut_from_prefix(&mut sectors) else { return Err(LuksError::NotLuks) };
    let places = places(raw)?;
    let mut fixes = Vec::new();
    fixes.extend(put_cipher_mode_right(&mut raw.cipher_mode));
    fixes.extend(put_hash_right(&mut raw.hash_spec)?);
    // No truncation: `places` allows 64 bytes at most.
    let material_len = keyslot::material_len(raw.key_bytes.get() as usize);
    for (index, (slot, place)) in raw.key_slots.iter_mut().zip(places).enumerate() {
        let has_boot_signature = has_boot_signature && index == KEYSLOT_AT_BOOT_SIGNATURE;
        put_keyslot_right(store, index, slot, place, material_len, has_boot_signature, &mut fixes)?;
    }
    // What is written can be read again.
    Header::parse(&sectors).map_err(LuksError::beyond_repair)?;
    write_unaligned(store, &sectors, 0)?;
    store.flush()?;
    Ok(fixes)
}

/// Where the keyslots of a volume with such a key are, in 512-byte sectors.
fn places(raw: &RawHeader) -> Result<[u32; KEYSLOTS], LuksError> {
    let key_bytes = raw.key_bytes.get();
    if !matches!(key_bytes, 16 | 32 | 64) {
        return Err(LuksError::corrupt("key-bytes", key_bytes.to_string()).beyond_repair());
    }
    let sectors = |bytes: usize| u32::try_from(bytes as u64 / LBA_UNIT).unwrap_or(u32::MAX);
    let (first, spacing) = (sectors(KEYSLOT_ALIGNMENT), sectors(spacing(key_bytes as usize)));
    let mut places = [first; KEYSLOTS];
    for index in 1..KEYSLOTS {
        places[index] = places[index - 1] + spacing;
    }
    // The first cryptsetup had them elsewhere, and closer together.
    let is_there =
        |(slot, place): (&RawKeyslot, &u32)| slot.active.get() == ENABLED && slot.key_material_offset.get() == *place;
    let offset = raw.key_slots[0].key_material_offset.get();
    if offset < first && !raw.key_slots.iter().zip(&places).any(is_there) {
        let found = format!("sector {offset}, before those of today's volumes");
        return Err(LuksError::corrupt("key-material-offset of keyslot 0", found).beyond_repair());
    }
    Ok(places)
}

fn put_cipher_mode_right(field: &mut [u8; 32]) -> Option<Fix> {
    let from = until_nul(field);
    if !has_iv_of_ecb(&from) {
        return None;
    }
    field.fill(0);
    field[..3].copy_from_slice(b"ecb");
    Some(Fix::CipherMode { from })
}

fn has_iv_of_ecb(mode: &str) -> bool {
    mode.starts_with("ecb-")
}

fn put_hash_right(field: &mut [u8; 32]) -> Result<Option<Fix>, LuksError> {
    if is_lowercase(field) {
        return Ok(None);
    }
    let from = until_nul(field);
    if HashAlgorithm::from_name(&from.to_ascii_lowercase()).is_none() {
        return Err(LuksError::corrupt("hash-spec", format!("\"{}\"", from.escape_default())).beyond_repair());
    }
    field.make_ascii_lowercase();
    Ok(Some(Fix::Hash { from }))
}

fn is_lowercase(text: &[u8]) -> bool {
    !text.iter().any(u8::is_ascii_uppercase)
}

fn until_nul(field: &[u8]) -> String {
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn put_keyslot_right(
    store: &dyn BlockStore,
    keyslot: usize,
    slot: &mut RawKeyslot,
    place: u32,
    material_len: usize,
    has_boot_signature: bool,
    fixes: &mut Vec<Fix>,
) -> Result<(), LuksError> {
    let state = slot.active.get();
    if state == ENABLED {
        return Ok(());
    }
    let before = fixes.len();
    let (offset, stripes) = (slot.key_material_offset.get(), slot.stripes.get());
    if offset != place {
        fixes.push(Fix::Offset { keyslot, from: offset, to: place });
        slot.key_material_offset = place.into();
    }
    if stripes as usize != keyslot::STRIPES {
        fixes.push(Fix::Stripes { keyslot, from: stripes });
        slot.stripes = u32::try_from(keyslot::STRIPES).unwrap_or(stripes).into();
    }
    if has_boot_signature {
        fixes.push(Fix::BootSignature { keyslot });
    }
    let is_damaged = fixes.len() > before;
    if state == DISABLED && !is_damaged {
        return Ok(());
    }
    // Nothing but the state is damaged, and a keyslot that is not in use has neither salt nor iterations.
    if !is_damaged && slot.iterations.get() != 0 && slot.salt != [0; SALT_LEN] {
        let mut material = vec![0; material_len];
        let at = u64::from(place) * LBA_UNIT;
        if at + material_len as u64 <= store.len() {
            read_unaligned(store, &mut material, at)?;
        }
        if keyslot::damaged_sector(&material).is_none() {
            slot.active = ENABLED.into();
            fixes.push(Fix::Enabled { keyslot, from: state });
            return Ok(());
        }
    }
    slot.active = DISABLED.into();
    slot.salt = [0; SALT_LEN];
    slot.iterations = 0.into();
    fixes.push(Fix::Cleared { keyslot });
    Ok(())
}
