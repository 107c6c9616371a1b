//! The rate at which the CPU can issue AES rounds: the rounds of AES-256 on registers, without memory and without tweaks.

use core::arch::x86_64::{
    _mm_aesenc_si128, _mm_set1_epi8, _mm_xor_si128, _mm256_aesenc_epi128, _mm256_set1_epi8, _mm256_xor_si256,
    _mm512_aesenc_epi128, _mm512_set1_epi8, _mm512_xor_si512,
};
use std::hint::black_box;

use super::Cpu;

/// Rounds of AES-256 for each block.
const ROUNDS: usize = 14;

impl Cpu {
    /// Computes the rounds for about `bytes` bytes of data. Returns the exact number of bytes.
    pub(in crate::xts) fn aes256_rounds(self, bytes: usize) -> usize {
        match self {
            // SAFETY: the variant proves that the CPU has what the function is compiled for.
            Self::AesNi(_) => unsafe { rounds_128(bytes) },
            // SAFETY: as above.
            Self::Vaes256(_) => unsafe { rounds_256(bytes) },
            // SAFETY: as above.
            Self::Vaes512(_) => unsafe { rounds_512(bytes) },
        }
    }
}

/// A loop for one register width. Enough independent registers are in flight to cover the latency of a round twice.
macro_rules! rounds {
    ($name:ident, $features:literal, $in_flight:literal, $set:ident, $xor:ident, $round:ident) => {
        #[target_feature(enable = $features)]
        fn $name(bytes: usize) -> usize {
            let key = black_box($set(0x5a));
            let mut data = [key; $in_flight];
            for (i, vector) in (0..).zip(&mut data) {
                *vector = $xor(*vector, $set(i));
            }
            let passes = bytes.div_ceil(size_of_val(&data));
            for _ in 0..passes {
                for _ in 0..ROUNDS {
                    for vector in &mut data {
                        *vector = $round(*vector, key);
                    }
                }
            }
            black_box(data);
            passes * size_of_val(&data)
        }
    };
}

rounds!(rounds_128, "aes", 12, _mm_set1_epi8, _mm_xor_si128, _mm_aesenc_si128);
rounds!(rounds_256, "avx2,vaes", 12, _mm256_set1_epi8, _mm256_xor_si256, _mm256_aesenc_epi128);
rounds!(rounds_512, "avx512f,avx512bw,vaes", 12, _mm512_set1_epi8, _mm512_xor_si512, _mm512_aesenc_epi128);
