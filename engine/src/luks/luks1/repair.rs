//! Repairs a damaged LUKS1 header where that is possible, as `cryptsetup repair` does.
//!
//! There is only one header, and it has no checksum. So a field can be repaired only if its correct value is known. The
//! values of keyslots that are not in use are known, because keyslots lie at the same offsets in every volume. A partition
//! table that was written over the header ends within keyslot 6. So it damages keyslots that are often not in use. Keyslots
//! in use stay unchanged. Their part of the header also stays unchanged, even while the header is written.

use std::fmt;

use zerocopy::FromBytes;

use super::format::{KEYSLOT_ALIGNMENT, spacing};
use super::header::{DISABLED, ENABLED, RawHeader, RawKeyslot, SALT_LEN};
use super::{Header, KEYSLOTS, KeyslotState, first_sectors};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{LuksError, keyslot, printable};
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// The signature at the end of a partition table and of a boot sector, and its offset.
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const BOOT_SIGNATURE_AT: usize = 510;
/// The keyslot whose salt lies at that offset.
const KEYSLOT_AT_BOOT_SIGNATURE: usize = 6;

/// A repaired part of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// The cipher mode named an IV, but ECB has no IV.
    CipherMode {
        /// The old value.
        from: String,
    },
    /// The hash had upper-case letters.
    Hash {
        /// The old value.
        from: String,
    },
    /// The offset of a keyslot that is not in use, in 512-byte sectors.
    Offset {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The old value.
        from: u32,
        /// The new value.
        to: u32,
    },
    /// The number of stripes of a keyslot that is not in use.
    Stripes {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The old value.
        from: u32,
    },
    /// The salt of a keyslot that is not in use contained the signature of a partition table.
    BootSignature {
        /// The keyslot, from 0.
        keyslot: usize,
    },
    /// A keyslot was neither enabled nor disabled. It has a salt, iterations and key material, so it is enabled again.
    Enabled {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The old state.
        from: u32,
    },
    /// A keyslot holds no key. Its state was set to disabled, and its salt and iterations were cleared.
    Cleared {
        /// The keyslot, from 0.
        keyslot: usize,
    },
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CipherMode { from } => write!(f, "the cipher mode was {}, and is now ecb", printable(from)),
            Self::Hash { from } => {
                write!(f, "the hash was {}, and is now {}", printable(from), printable(&from.to_ascii_lowercase()))
            }
            Self::Offset { keyslot, from, to } => {
                write!(f, "keyslot {keyslot}: the offset of the key material was {from}, and is now {to}")
            }
            Self::Stripes { keyslot, from } => {
                write!(f, "keyslot {keyslot}: the number of stripes was {from}, and is now {}", keyslot::STRIPES)
            }
            Self::BootSignature { keyslot } => {
                write!(f, "keyslot {keyslot}: the salt contained the signature of a partition table")
            }
            Self::Enabled { keyslot, from } => {
                write!(
                    f,
                    "keyslot {keyslot}: the state was {from:#010x}, and is now enabled, because the keyslot holds a key"
                )
            }
            Self::Cleared { keyslot } => write!(f, "keyslot {keyslot}: disabled, and its salt cleared"),
        }
    }
}

/// Repairs a header. Returns the repaired parts.
///
/// # Errors
/// [`LuksError::NotLuks`], [`LuksError::Version`] or [`LuksError::Unfinished`] if there is no LUKS1 header, and
/// [`LuksError::BeyondRepair`] if a correct value is unknown; the disk is then unchanged. Otherwise
/// [`LuksError::Store`].
pub fn repair(store: &dyn BlockStore) -> Result<Vec<Fix>, LuksError> {
    let mut sectors = first_sectors(store)?;
    match Header::parse(&sectors) {
        Ok(header)
            if !has_iv_of_ecb(&header.cipher_mode)
                && is_lowercase(header.hash_spec.as_bytes())
                && !header.keyslots.iter().any(|slot| matches!(slot.state, KeyslotState::Undecided(_))) =>
        {
            return Ok(Vec::new());
        }
        Ok(_) | Err(LuksError::Corrupt { .. }) => {}
        Err(error) => return Err(error),
    }
    let has_boot_signature = sectors[BOOT_SIGNATURE_AT..][..BOOT_SIGNATURE.len()] == BOOT_SIGNATURE;
    let Ok((raw, _)) = RawHeader::mut_from_prefix(&mut sectors) else { return Err(LuksError::NotLuks) };
    let offsets = offsets(raw)?;
    let mut fixes = Vec::new();
    fixes.extend(repair_cipher_mode(&mut raw.cipher_mode));
    fixes.extend(repair_hash(&mut raw.hash_spec)?);
    // No truncation: `offsets` allows at most 64 bytes.
    let material_len = keyslot::material_len(raw.key_bytes.get() as usize);
    for (index, (slot, expected)) in raw.key_slots.iter_mut().zip(offsets).enumerate() {
        let has_boot_signature = has_boot_signature && index == KEYSLOT_AT_BOOT_SIGNATURE;
        repair_keyslot(store, index, slot, expected, material_len, has_boot_signature, &mut fixes)?;
    }
    // Only a header that can be read back is written.
    Header::parse(&sectors).map_err(LuksError::beyond_repair)?;
    write_unaligned(store, &sectors, 0)?;
    store.flush()?;
    Ok(fixes)
}

/// Returns the offsets of the keyslots in 512-byte sectors, for a volume with a key of this length.
fn offsets(raw: &RawHeader) -> Result<[u32; KEYSLOTS], LuksError> {
    let key_bytes = raw.key_bytes.get();
    if !matches!(key_bytes, 16 | 32 | 64) {
        return Err(LuksError::corrupt("key-bytes", key_bytes.to_string()).beyond_repair());
    }
    let sectors = |bytes: usize| u32::try_from(bytes as u64 / LBA_UNIT).unwrap_or(u32::MAX);
    let (first, spacing) = (sectors(KEYSLOT_ALIGNMENT), sectors(spacing(key_bytes as usize)));
    let mut offsets = [first; KEYSLOTS];
    for index in 1..KEYSLOTS {
        offsets[index] = offsets[index - 1] + spacing;
    }
    // The first versions of cryptsetup placed the keyslots elsewhere and closer together.
    let is_there = |(slot, expected): (&RawKeyslot, &u32)| {
        slot.active.get() == ENABLED && slot.key_material_offset.get() == *expected
    };
    let offset = raw.key_slots[0].key_material_offset.get();
    if offset < first && !raw.key_slots.iter().zip(&offsets).any(is_there) {
        let found = format!("sector {offset}, which is lower than in today's volumes");
        return Err(LuksError::corrupt("key-material-offset of keyslot 0", found).beyond_repair());
    }
    Ok(offsets)
}

fn repair_cipher_mode(field: &mut [u8; 32]) -> Option<Fix> {
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

fn repair_hash(field: &mut [u8; 32]) -> Result<Option<Fix>, LuksError> {
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

fn repair_keyslot(
    store: &dyn BlockStore,
    keyslot: usize,
    slot: &mut RawKeyslot,
    expected: u32,
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
    if offset != expected {
        fixes.push(Fix::Offset { keyslot, from: offset, to: expected });
        slot.key_material_offset = expected.into();
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
    // Only the state is damaged. A keyslot that is not in use has neither a salt nor iterations.
    if !is_damaged && slot.iterations.get() != 0 && slot.salt != [0; SALT_LEN] {
        let mut material = vec![0; material_len];
        let at = u64::from(expected) * LBA_UNIT;
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
