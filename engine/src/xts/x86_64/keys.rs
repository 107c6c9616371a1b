//! AES key schedules (FIPS 197), computed with the AES-NI instructions.

use core::arch::x86_64::{
    __m128i, _mm_aesenclast_si128, _mm_aesimc_si128, _mm_cvtsi128_si32, _mm_load_si128, _mm_set1_epi32,
    _mm_setzero_si128, _mm_store_si128,
};

use std::hint::black_box;

use zerocopy::{FromBytes, IntoBytes};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::aesni::AesNi;

/// Round keys in the order in which they are used.
#[derive(Zeroize)]
#[repr(C, align(64))]
pub(crate) struct RoundKeys<const N: usize>(pub(super) [u128; N]);

impl<const N: usize> RoundKeys<N> {
    /// Returns one round key through an opaque reference. The compiler must then load the key when it is needed.
    /// Otherwise it would load all keys in advance. They do not fit into the registers, so it would spill them to stack
    /// memory that nobody wipes.
    #[inline(always)]
    pub(super) fn get(&self, round: usize) -> &u128 {
        black_box(&self.0[round])
    }
}

/// The three schedules of an XTS key, with `N` round keys each: 15 for AES-256, 11 for AES-128. They are expanded in place on
/// the heap and wiped when dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(crate) struct Schedules<const N: usize> {
    /// Encrypts data.
    pub(super) encrypt: RoundKeys<N>,
    /// Decrypts data with the equivalent inverse cipher (FIPS 197, 5.3.5), which the instructions compute.
    pub(super) decrypt: RoundKeys<N>,
    /// Encrypts tweaks.
    pub(super) tweak: RoundKeys<N>,
}

impl<const N: usize> Schedules<N> {
    /// Expands the two halves of an XTS key, of `4 (N - 7)` bytes each.
    pub(crate) fn new(cpu: AesNi, data: &[u8], tweak: &[u8]) -> Box<Self> {
        let mut keys =
            Box::new(Self { encrypt: RoundKeys([0; N]), decrypt: RoundKeys([0; N]), tweak: RoundKeys([0; N]) });
        cpu.expand(data, &mut keys.encrypt);
        cpu.expand(tweak, &mut keys.tweak);
        let Self { encrypt, decrypt, .. } = &mut *keys;
        cpu.invert(encrypt, decrypt);
        keys
    }
}

impl AesNi {
    /// Computes `KeyExpansion` (FIPS 197, 5.2).
    fn expand<const N: usize>(self, key: &[u8], to: &mut RoundKeys<N>) {
        // SAFETY: an `AesNi` exists only where the CPU has AES-NI.
        unsafe { expand(key, to) }
    }

    /// Computes the round keys of the equivalent inverse cipher.
    fn invert<const N: usize>(self, from: &RoundKeys<N>, to: &mut RoundKeys<N>) {
        // SAFETY: an `AesNi` exists only where the CPU has AES-NI.
        unsafe { invert(from, to) }
    }
}

#[target_feature(enable = "aes")]
fn expand<const N: usize>(key: &[u8], to: &mut RoundKeys<N>) {
    let words = key.len() / 4;
    assert_eq!(words + 7, N, "AES-128 has 11 round keys, AES-256 has 15");
    to.0.as_mut_bytes()[..key.len()].copy_from_slice(key);
    let Ok(w) = <[u32]>::mut_from_bytes(to.0.as_mut_bytes()) else { unreachable!("words within u128s") };
    let mut rcon = 1;
    for i in words..w.len() {
        let mut temp = w[i - 1];
        if i % words == 0 {
            // RotWord of a little-endian word. Rcon is a power of x in GF(2⁸). It is reduced when it passes 0x80.
            temp = sub_word(temp.rotate_right(8)) ^ rcon;
            rcon <<= 1;
            if rcon > 0x80 {
                rcon ^= 0x11b;
            }
        } else if words > 6 && i % words == 4 {
            temp = sub_word(temp);
        }
        w[i] = w[i - words] ^ temp;
    }
}

#[target_feature(enable = "aes")]
fn invert<const N: usize>(from: &RoundKeys<N>, to: &mut RoundKeys<N>) {
    for i in 0..N {
        let key = load(&from.0[N - 1 - i]);
        store(&mut to.0[i], if i == 0 || i == N - 1 { key } else { _mm_aesimc_si128(key) });
    }
}

/// Computes `SubWord`. The last AES round with an all-zero key is ShiftRows and SubBytes. ShiftRows changes nothing here,
/// because all four columns are equal.
#[target_feature(enable = "aes")]
fn sub_word(word: u32) -> u32 {
    let columns = _mm_set1_epi32(word.cast_signed());
    _mm_cvtsi128_si32(_mm_aesenclast_si128(columns, _mm_setzero_si128())).cast_unsigned()
}

#[inline(always)]
pub(super) fn load(from: &u128) -> __m128i {
    // SAFETY: a `u128` is 16 bytes long and aligned to 16.
    unsafe { _mm_load_si128(std::ptr::from_ref(from).cast()) }
}

#[inline(always)]
pub(super) fn store(to: &mut u128, value: __m128i) {
    // SAFETY: a `u128` is 16 bytes long and aligned to 16, and it is borrowed mutably.
    unsafe { _mm_store_si128(std::ptr::from_mut(to).cast(), value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last round keys of FIPS 197, appendices A.1 and A.3.
    #[test]
    fn schedules_end_with_the_round_keys_of_fips_197() {
        let Some(cpu) = AesNi::new() else { return };
        let key = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes();
        let mut schedule = RoundKeys::<11>([0; 11]);
        cpu.expand(&key, &mut schedule);
        assert_eq!(schedule.0[10].to_le_bytes(), 0xd014_f9a8_c9ee_2589_e13f_0cc8_b663_0ca6_u128.to_be_bytes());

        let mut key = [0; 32];
        key[..16].copy_from_slice(&0x603d_eb10_15ca_71be_2b73_aef0_857d_7781_u128.to_be_bytes());
        key[16..].copy_from_slice(&0x1f35_2c07_3b61_08d7_2d98_10a3_0914_dff4_u128.to_be_bytes());
        let mut schedule = RoundKeys::<15>([0; 15]);
        cpu.expand(&key, &mut schedule);
        assert_eq!(schedule.0[14].to_le_bytes(), 0xfe48_90d1_e618_8d0b_046d_f344_706c_631e_u128.to_be_bytes());
    }
}
