//! The anti-forensic splitter (LUKS1 on-disk format specification 1.2.3, section 2.4). It expands a key into `stripes`
//! blocks, and getting the key back needs all blocks. So overwriting any one of them destroys the key, even if the disk
//! has remapped sectors and keeps old copies of other blocks.

use std::io;

use zeroize::Zeroizing;

use super::Random;
use super::hash::HashAlgorithm;

/// `AFsplit`: `s_1 … s_(n-1)` are random, `s_n = d_(n-1) ⊕ key`, with `d_0 = 0` and `d_k = H1(d_(k-1) ⊕ s_k)`.
///
/// Returns `key.len() * stripes` bytes.
///
/// # Errors
/// The error of `random`.
pub(super) fn split(
    hash: HashAlgorithm,
    key: &[u8],
    stripes: usize,
    random: Random<'_>,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes]);
    let (random_stripes, last) = material.split_at_mut(key.len() * (stripes - 1));
    random(random_stripes)?;
    let diffused = diffuse_all(hash, key.len(), random_stripes);
    last.copy_from_slice(key);
    xor(last, &diffused);
    Ok(material)
}

/// `AFmerge`: returns the key that `material` was split from. `material` is a whole number of stripes of `key_len` bytes.
pub(super) fn merge(hash: HashAlgorithm, key_len: usize, material: &[u8]) -> Zeroizing<Vec<u8>> {
    let (random_stripes, last) = material.split_at(material.len() - key_len);
    let mut key = diffuse_all(hash, key_len, random_stripes);
    xor(&mut key, last);
    key
}

/// Returns `d_(n-1)`. `stripes` are all stripes but the last.
fn diffuse_all(hash: HashAlgorithm, key_len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_len]);
    let mut diffused = Zeroizing::new(vec![0; key_len]);
    for stripe in stripes.chunks_exact(key_len) {
        xor(&mut block, stripe);
        diffuse(hash, &block, &mut diffused);
        block.copy_from_slice(&diffused);
    }
    block
}

/// `H1`: splits the block into pieces `p_i` of one digest length and replaces each with `H(i ‖ p_i)`. The last piece may be
/// shorter, and its digest is truncated. `i` counts from 0 and is a 32-bit big-endian number.
fn diffuse(hash: HashAlgorithm, block: &[u8], out: &mut [u8]) {
    let pieces = block.chunks(hash.output_len()).zip(out.chunks_mut(hash.output_len()));
    for (index, (piece, out)) in (0u32..).zip(pieces) {
        hash.digest_into(&[&index.to_be_bytes(), piece], out);
    }
}

fn xor(target: &mut [u8], other: &[u8]) {
    target.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_merges_again_with_every_hash() {
        for hash in HashAlgorithm::ALL {
            for len in [16, 20, 32, 48, 64, 100] {
                let key: Vec<u8> = (0..len).collect();
                let mut seed = 1u8;
                let mut random = |data: &mut [u8]| {
                    data.fill_with(|| {
                        seed = seed.wrapping_mul(5).wrapping_add(17);
                        seed
                    });
                    Ok(())
                };
                let material = split(hash, &key, 40, &mut random).unwrap();
                assert_eq!(material.len(), usize::from(len) * 40);
                assert_eq!(*merge(hash, key.len(), &material), key);
                let mut damaged = material.clone();
                damaged[3] ^= 1;
                assert_ne!(*merge(hash, key.len(), &damaged), key, "every bit of every stripe is needed");
            }
        }
    }
}
