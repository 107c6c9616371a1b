//! A keyslot's key material: the volume key, split by [`af`] and encrypted with a key that the passphrase gives.

use std::io;

use zeroize::Zeroizing;

use super::af;
use super::hash::HashAlgorithm;
use super::{LuksError, Random};
use crate::key::{VolumeKey, VolumeKeyError};
use crate::sector::{Lba512, SectorSize};
use crate::store::{BlockStore, write_unaligned};
use crate::xts::Xts;

/// Stripes that a key is split into, in every LUKS volume there is (specification, "LUKS constants": `LUKS_STRIPES`).
pub(super) const STRIPES: usize = 4000;

/// Bytes of key material that a key of `key_len` bytes takes, up to a whole sector.
pub(super) fn material_len(key_len: usize) -> usize {
    (key_len * STRIPES).next_multiple_of(SectorSize::B512.bytes())
}

/// Every cipher, for an error about another one.
pub(super) const SUPPORTED_CIPHERS: &str = "it does aes-xts-plain64 with 512 or 256 bits";

/// The length in bytes of the key of a volume or a keyslot, if it is encrypted with what nbdcrypt does.
///
/// # Errors
/// [`LuksError::Unsupported`], with the cipher's name.
pub(super) fn key_len(cipher: &str, key_bytes: u32) -> Result<usize, LuksError> {
    match (cipher, key_bytes) {
        ("aes-xts-plain64", 32) => Ok(VolumeKey::AES_128),
        ("aes-xts-plain64", 64) => Ok(VolumeKey::AES_256),
        _ => Err(LuksError::Unsupported {
            what: "cipher",
            found: format!("{cipher} with a key of {} bits", u64::from(key_bytes) * 8),
            supported: SUPPORTED_CIPHERS,
        }),
    }
}

/// What the encryption is called, where nbdcrypt does it.
pub(super) fn encryption(cipher: &str, key_bytes: u32) -> Option<&'static str> {
    key_len(cipher, key_bytes).ok().map(|len| if len == VolumeKey::AES_256 { "AES-256-XTS" } else { "AES-128-XTS" })
}

/// The key that `material` holds, if `slot_key` is the right one; else noise. `material` is decrypted where it stands.
///
/// # Errors
/// When `slot_key` is no XTS key.
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

/// The key material that holds `key`: the inverse of [`unseal`].
///
/// # Errors
/// What the source of randomness said.
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

/// Overwrites key material: with random bytes, which no disk compresses or takes for a hole, then with zeros. Where a disk
/// writes to new cells instead, as flash does, the old ones stay until it erases them.
///
/// ```text
///   first sector zero ─ the others random ─ the others zero ─ first sector random ─ first sector zero
/// ```
///
/// Cut off anywhere, there are zeros in it, in which an interrupted removal is recognised ([`damaged_sector`]): what opens
/// no more must not count as a key that is left.
pub(super) fn wipe(store: &dyn BlockStore, offset: u64, len: u64, random: Random<'_>) -> Result<(), LuksError> {
    // No truncation: an area is a part of the header.
    let len = usize::try_from(len).unwrap_or(0);
    // The area of a keyslot of an unknown type may be as short as its writer likes.
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

/// The first sector of `material` that cannot be key material, if there is one. Ciphertext looks random: 512 random
/// bytes have about 221 different values, and fewer than 128 once in a time longer than any disk lasts. What zeroes, a
/// filesystem or text leave behind has fewer.
pub(super) fn damaged_sector(material: &[u8]) -> Option<usize> {
    material.chunks_exact(SectorSize::B512.bytes()).position(|sector| {
        let mut seen = [false; 256];
        sector.iter().for_each(|byte| seen[usize::from(*byte)] = true);
        seen.iter().filter(|seen| **seen).count() < 128
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_of_any_length_is_wiped_and_nothing_beside_it() {
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
