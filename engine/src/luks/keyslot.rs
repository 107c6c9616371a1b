//! A keyslot's key material: the volume key, split by [`af`] and encrypted with the key that is derived from the passphrase.

use std::io;

use zeroize::Zeroizing;

use super::af;
use super::hash::HashAlgorithm;
use super::{LuksError, Random};
use crate::key::{VolumeKey, VolumeKeyError};
use crate::layout::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::store::{BlockStore, read_unaligned, write_unaligned};
use crate::xts::Xts;

/// The number of stripes that a key is split into. It is the same in all LUKS volumes (specification, "LUKS constants":
/// `LUKS_STRIPES`).
pub(super) const STRIPES: usize = 4000;
/// The length in bytes of a keyslot's salt. cryptsetup reads no other length.
pub(super) const SALT_LEN: usize = 32;

/// Returns the length of the key material for a key of `key_len` bytes, rounded up to whole sectors.
pub(super) fn material_len(key_len: usize) -> usize {
    (key_len * STRIPES).next_multiple_of(SectorSize::B512.bytes())
}

/// The supported ciphers, for the error about an unsupported cipher.
pub(super) const SUPPORTED_CIPHERS: &str = "it supports aes-xts-plain64 with 512 or 256 bits";

/// AES-XTS with an IV of 32 bits. It equals `aes-xts-plain64` as long as every sector number fits into 32 bits. For key
/// material this is always true.
pub(super) const SHORT_IV: &str = "aes-xts-plain";
/// The number of IVs of 32 bits.
const SHORT_IVS: u64 = 1 << 32;

/// Refuses data that is encrypted with an IV of 32 bits and has sector numbers that do not fit.
///
/// # Errors
/// [`LuksError::Unsupported`] if a sector number needs more than 32 bits.
pub(super) fn refuse_short_iv(cipher: &str, segment: &Segment) -> Result<(), LuksError> {
    if cipher == SHORT_IV { refuse_iv_beyond_32_bits(segment, 1) } else { Ok(()) }
}

/// Refuses a segment whose sector numbers do not fit into an IV of 32 bits. The IV counts units of `unit` sectors of 512 bytes.
///
/// # Errors
/// [`LuksError::Unsupported`] if a sector number needs more than 32 bits.
pub(super) fn refuse_iv_beyond_32_bits(segment: &Segment, unit: u64) -> Result<(), LuksError> {
    let sectors = segment.iv_start.0.saturating_add(segment.len / LBA_UNIT);
    if sectors.div_ceil(unit) <= SHORT_IVS {
        return Ok(());
    }
    let found = format!("{SHORT_IV} with sectors up to number {}", sectors.div_ceil(unit) - 1);
    let supported = "an IV of 32 bits repeats from sector 4294967296 on, which is at 2 TiB with sectors of 512 bytes; it \
                     supports smaller volumes with aes-xts-plain";
    Err(LuksError::unsupported("cipher", found, supported))
}

/// Returns the length in bytes of the key of a volume or a keyslot.
///
/// # Errors
/// [`LuksError::Unsupported`], with the name of the cipher, if nbdcrypt does not support it.
pub(super) fn key_len(cipher: &str, key_bytes: u32) -> Result<usize, LuksError> {
    match (cipher, key_bytes) {
        ("aes-xts-plain64" | SHORT_IV, 32) => Ok(VolumeKey::AES_128),
        ("aes-xts-plain64" | SHORT_IV, 64) => Ok(VolumeKey::AES_256),
        _ => {
            let found = format!("{cipher} with a key of {} bits", u64::from(key_bytes) * 8);
            Err(LuksError::unsupported("cipher", found, SUPPORTED_CIPHERS))
        }
    }
}

/// Returns the name of the encryption, or `None` if nbdcrypt does not support it.
pub(super) fn encryption(cipher: &str, key_bytes: u32) -> Option<&'static str> {
    key_len(cipher, key_bytes).ok().map(|len| if len == VolumeKey::AES_256 { "AES-256-XTS" } else { "AES-128-XTS" })
}

/// Returns the key in `material`, or noise if `slot_key` is wrong. Decrypts `material` in place.
///
/// # Errors
/// [`VolumeKeyError`] if `slot_key` is not an XTS key.
pub(super) fn unseal(
    hash: HashAlgorithm,
    mut slot_key: Zeroizing<Vec<u8>>,
    key_len: usize,
    material: &mut [u8],
) -> Result<Zeroizing<Vec<u8>>, VolumeKeyError> {
    let cipher = Xts::new(&VolumeKey::new(std::mem::take(&mut *slot_key))?);
    cipher.decrypt(SectorSize::B512, Lba512(0), material);
    Ok(af::merge(hash, key_len, &material[..key_len * STRIPES]))
}

/// Returns the key material that holds `key`: the inverse of [`unseal`].
///
/// # Errors
/// The error of `random`.
pub(super) fn seal(
    hash: HashAlgorithm,
    slot_key: &VolumeKey,
    key: &[u8],
    random: Random<'_>,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let split = af::split(hash, key, STRIPES, random)?;
    let mut material = Zeroizing::new(vec![0; material_len(key.len())]);
    material[..split.len()].copy_from_slice(&split);
    Xts::new(slot_key).encrypt(SectorSize::B512, Lba512(0), &mut material);
    Ok(material)
}

/// Overwrites key material twice: first with random bytes, which a disk can neither compress nor store as a hole, then
/// with zeros. Flash memory writes to new cells, so its old cells keep their contents until the disk erases them.
///
/// ```text
///   first sector zero ─ the others random ─ the others zero ─ first sector random ─ first sector zero
/// ```
///
/// If this is interrupted at any point, the key material contains zeros, so [`damaged_sector`] recognises the interrupted
/// removal. This matters because a keyslot that no longer opens must not count as a remaining key.
pub(super) fn wipe(store: &dyn BlockStore, offset: u64, len: u64, random: Random<'_>) -> Result<(), LuksError> {
    // No truncation: an area is part of the header.
    let len = usize::try_from(len).unwrap_or(0);
    // The area of a keyslot of an unknown type may have any length.
    let first = SectorSize::B512.bytes().min(len);
    let zeros = vec![0; len];
    let mut noise = vec![0; len];
    random(&mut noise).map_err(LuksError::Random)?;
    for (bytes, part) in
        [(&zeros, 0..first), (&noise, first..len), (&zeros, first..len), (&noise, 0..first), (&zeros, 0..first)]
    {
        write_unaligned(store, &bytes[part.clone()], offset + part.start as u64)?;
        store.flush()?;
    }
    Ok(())
}

/// Returns the first sector of `material` that cannot be key material, if there is one. Ciphertext looks random: 512 random
/// bytes have about 221 different values, and practically never fewer than 128. Zeros, filesystem structures and text have
/// fewer.
pub(super) fn damaged_sector(material: &[u8]) -> Option<usize> {
    material.chunks_exact(SectorSize::B512.bytes()).position(|sector| {
        let mut seen = [false; 256];
        sector.iter().for_each(|byte| seen[usize::from(*byte)] = true);
        seen.iter().filter(|seen| **seen).count() < 128
    })
}

/// Returns whether the keyslot at `offset` may still open: its material can be read and does not come from an interrupted
/// removal.
pub(super) fn may_open(store: &dyn BlockStore, offset: u64, key_len: usize) -> bool {
    let mut material = Zeroizing::new(vec![0; material_len(key_len)]);
    read_unaligned(store, &mut material, offset).is_ok() && damaged_sector(&material).is_none()
}

/// Returns the number of the keyslot for a new key: `wanted`, or the first free keyslot. `check` returns why a keyslot is not
/// free.
///
/// # Errors
/// The error of `check`, [`LuksError::NoRoomForKey`], or [`LuksError::Impossible`] if the format has fewer keyslots.
pub(super) fn free(
    wanted: Option<usize>,
    format: &str,
    count: usize,
    check: impl Fn(usize) -> Result<(), LuksError>,
) -> Result<usize, LuksError> {
    match wanted {
        None => (0..count).find(|keyslot| check(*keyslot).is_ok()).ok_or(LuksError::NoRoomForKey),
        Some(keyslot) if keyslot < count => check(keyslot).map(|()| keyslot),
        Some(keyslot) => {
            Err(LuksError::impossible("keyslot", keyslot, format!("{format} has keyslots 0 to {}", count - 1)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wiping_an_area_of_any_length_changes_nothing_else() {
        for len in [0, 1, 511, 512, 513, 4096] {
            let store = crate::store::MemoryStore::from(vec![7; 8192]);
            let mut random = |data: &mut [u8]| {
                data.fill(9);
                Ok(())
            };
            wipe(&store, 1000, len, &mut random).unwrap();
            let end = 1000 + usize::try_from(len).unwrap();
            let found = store.snapshot();
            assert!(found[1000..end].iter().all(|byte| *byte == 0), "{len}");
            assert!(found[..1000].iter().chain(&found[end..]).all(|byte| *byte == 7), "{len}");
        }
    }

    #[test]
    fn a_sealed_key_opens_and_looks_random() {
        let slot_key = VolumeKey::new((0..64).collect()).unwrap();
        let key: Vec<u8> = (100..164).collect();
        let mut state = 1u64;
        let mut random = |data: &mut [u8]| {
            data.fill_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            });
            Ok(())
        };
        let mut material = seal(HashAlgorithm::Sha256, &slot_key, &key, &mut random).unwrap();
        assert_eq!(damaged_sector(&material), None);
        let mut damaged = material.clone();
        damaged[1024..1536].fill(0);
        assert_eq!(damaged_sector(&damaged), Some(2));
        let slot_key = Zeroizing::new(slot_key.expose().to_vec());
        assert_eq!(*unseal(HashAlgorithm::Sha256, slot_key, 64, &mut material).unwrap(), key);
    }
}
