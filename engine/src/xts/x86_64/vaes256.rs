//! AES on 256-bit registers, two blocks each, without AVX-512: Zen 3, Alder Lake.
//!
//! Eight registers of data go through the rounds together, half a [`Piece`]. Of the sixteen registers that there are, none
//! remains for tweaks: these lie in memory, and the next piece's are made between the rounds.

use core::arch::x86_64::{
    __m256i, _mm256_add_epi64, _mm256_aesdec_epi128, _mm256_aesdeclast_epi128, _mm256_aesenc_epi128,
    _mm256_aesenclast_epi128, _mm256_broadcastsi128_si256, _mm256_bslli_epi128, _mm256_bsrli_epi128,
    _mm256_clmulepi64_epi128, _mm256_loadu_si256, _mm256_set_epi64x, _mm256_set1_epi64x, _mm256_sllv_epi64,
    _mm256_srlv_epi64, _mm256_storeu_si256, _mm256_xor_si256,
};
use std::hint::black_box;

use cipher::inout::InOut;
use zerocopy::IntoBytes;
use zeroize::Zeroize;

use super::aesni::AesNi;
use super::keys::{RoundKeys, Schedules, load as load_block};
use super::{PIECE_BLOCKS, POLYNOMIAL, Piece};
use crate::xts::Direction;
use crate::xts::run::{Run, UnitNumbers};

/// Proof that this CPU has AVX2, VAES and VPCLMULQDQ, and that the operating system keeps their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vaes256(AesNi);

impl Vaes256 {
    pub(crate) fn new() -> Option<Self> {
        let there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("vaes")
            && is_x86_feature_detected!("vpclmulqdq");
        AesNi::new().filter(|_| there).map(Self)
    }

    /// VAES is AES-NI on wider registers.
    pub(super) fn aesni(self) -> AesNi {
        self.0
    }

    pub(crate) fn crypt<const N: usize>(self, direction: Direction, keys: &Schedules<N>, run: Run<'_, '_>) {
        match direction {
            // SAFETY: a `Vaes256` exists only where the CPU has what `crypt` is compiled for.
            Direction::Encrypt => unsafe { crypt::<N, false>(&keys.encrypt, &keys.tweak, run) },
            // SAFETY: as above.
            Direction::Decrypt => unsafe { crypt::<N, true>(&keys.decrypt, &keys.tweak, run) },
        }
    }
}

/// Registers of data in flight.
const WIDTH: usize = 8;

/// Halves of a piece.
const HALVES: usize = 2;

/// Sectors whose tweaks are encrypted together.
const TWEAKS: usize = 2 * WIDTH;

/// Encrypted tweaks of the sectors ahead.
#[repr(C, align(64))]
struct Tweaks([u128; TWEAKS]);

/// The tweaks of one piece's blocks, `T · α^j`.
#[repr(C, align(64))]
struct Masks([u128; PIECE_BLOCKS]);

#[target_feature(enable = "avx2,vaes,vpclmulqdq")]
fn crypt<const N: usize, const DECRYPT: bool>(data_keys: &RoundKeys<N>, tweak_keys: &RoundKeys<N>, run: Run<'_, '_>) {
    let (sector_size, mut numbers, data) = run.into_parts();
    let (pieces, _) = data.into_chunks();
    let pieces_per_sector = sector_size.bytes() / size_of::<Piece>();
    let mut sectors = pieces.len() / pieces_per_sector;
    if sectors == 0 {
        return;
    }

    let mut tweaks = Tweaks([0; TWEAKS]);
    let (mut even, mut odd) = (Masks([0; PIECE_BLOCKS]), Masks([0; PIECE_BLOCKS]));
    let (mut current, mut following) = (&mut even, &mut odd);
    refill(&mut tweaks, tweak_keys, &mut numbers, sectors);
    let first = broadcast(&tweaks.0[0]);
    for i in 0..HALVES * WIDTH {
        let vector = start(i, first, current);
        current.set(i, vector);
    }
    let mut ahead = 1;
    let mut left = pieces_per_sector;
    for mut piece in pieces {
        left -= 1;
        if left > 0 {
            crypt_piece::<N, DECRYPT, false>(data_keys, &mut piece, current, following, first);
        } else {
            left = pieces_per_sector;
            sectors -= 1;
            if ahead == TWEAKS {
                refill(&mut tweaks, tweak_keys, &mut numbers, sectors);
                ahead = 0;
            }
            let next = broadcast(&tweaks.0[ahead]);
            ahead += 1;
            crypt_piece::<N, DECRYPT, true>(data_keys, &mut piece, current, following, next);
        }
        (current, following) = (following, current);
    }
    tweaks.0.as_mut_slice().zeroize();
    even.0.as_mut_slice().zeroize();
    odd.0.as_mut_slice().zeroize();
}

/// Encrypts the tweaks of the next data units, at most [`TWEAKS`] and at least `wanted` if that is less.
#[target_feature(enable = "avx2,vaes,vpclmulqdq")]
fn refill<const N: usize>(tweaks: &mut Tweaks, keys: &RoundKeys<N>, numbers: &mut UnitNumbers, wanted: usize) {
    match wanted {
        0 => {}
        1..=2 => encrypt_numbers::<N, 1>(tweaks, keys, numbers),
        3..=8 => encrypt_numbers::<N, 4>(tweaks, keys, numbers),
        _ => encrypt_numbers::<N, WIDTH>(tweaks, keys, numbers),
    }
}

#[target_feature(enable = "avx2,vaes,vpclmulqdq")]
fn encrypt_numbers<const N: usize, const VECTORS: usize>(
    tweaks: &mut Tweaks,
    keys: &RoundKeys<N>,
    numbers: &mut UnitNumbers,
) {
    let UnitNumbers { low, high, step } = *numbers;
    let (low, high, step) = (low.cast_signed(), high.cast_signed(), step.cast_signed());
    // Wrapping, as the IV does; the high halves stay.
    let mut two = _mm256_add_epi64(_mm256_set_epi64x(high, low, high, low), _mm256_set_epi64x(0, step, 0, 0));
    let stride = _mm256_set_epi64x(0, 2 * step, 0, 2 * step);
    let mut vectors = [two; VECTORS];
    for vector in &mut vectors {
        *vector = _mm256_xor_si256(two, broadcast(&keys.0[0]));
        two = _mm256_add_epi64(two, stride);
    }
    for key in &keys.0[1..N - 1] {
        let key = broadcast(key);
        for vector in &mut vectors {
            *vector = _mm256_aesenc_epi128(*vector, key);
        }
    }
    let (to, _) = tweaks.0.as_mut_bytes().as_chunks_mut();
    for (vector, to) in vectors.iter().zip(to) {
        store(to, _mm256_aesenclast_epi128(*vector, broadcast(&keys.0[N - 1])));
    }
    for _ in 0..2 * VECTORS {
        numbers.advance();
    }
}

/// Encrypts or decrypts one piece, and makes the next one's masks: those of this one times α³², or, where `START` is set,
/// those of a sector that begins with the tweak `next`.
#[target_feature(enable = "avx2,vaes,vpclmulqdq")]
#[inline]
fn crypt_piece<const N: usize, const DECRYPT: bool, const START: bool>(
    keys: &RoundKeys<N>,
    piece: &mut InOut<'_, '_, Piece>,
    masks: &Masks,
    following: &mut Masks,
    next: __m256i,
) {
    // Opaque, so that the compiler keeps no round keys in registers across pieces: they would not fit, and be spilled to
    // stack that nobody wipes.
    let (keys, masks) = (black_box(keys), black_box(masks));
    let round = |data: &mut [__m256i; WIDTH], n: usize| {
        let key = broadcast(&keys.0[n]);
        for vector in data {
            *vector = if DECRYPT { _mm256_aesdec_epi128(*vector, key) } else { _mm256_aesenc_epi128(*vector, key) };
        }
    };
    for half in 0..HALVES {
        let at = half * WIDTH;
        let (from, _) = piece.get_in().as_chunks();
        let key = broadcast(&keys.0[0]);
        let mut data = [key; WIDTH];
        for i in 0..WIDTH {
            data[i] = _mm256_xor_si256(_mm256_xor_si256(load(&from[at + i]), key), masks.get(at + i));
        }
        for i in 0..WIDTH {
            round(&mut data, i + 1);
            let vector =
                if START { start(at + i, next, following) } else { times_alpha_bytes::<4, 12>(masks.get(at + i)) };
            following.set(at + i, vector);
        }
        for n in WIDTH + 1..N - 1 {
            round(&mut data, n);
        }
        let key = broadcast(&keys.0[N - 1]);
        let (to, _) = piece.get_out().as_chunks_mut();
        for i in 0..WIDTH {
            let last = _mm256_xor_si256(masks.get(at + i), key);
            let out =
                if DECRYPT { _mm256_aesdeclast_epi128(data[i], last) } else { _mm256_aesenclast_epi128(data[i], last) };
            store(&mut to[at + i], out);
        }
    }
}

impl Masks {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn get(&self, i: usize) -> __m256i {
        let (vectors, _) = self.0.as_bytes().as_chunks();
        load(&vectors[i])
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn set(&mut self, i: usize, value: __m256i) {
        let (vectors, _) = self.0.as_mut_bytes().as_chunks_mut();
        store(&mut vectors[i], value);
    }
}

/// Vector `i` of a sector's first masks: `T · α^(2i + lane)`, from `T` in every lane or from the first four vectors.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn start(i: usize, tweak: __m256i, before: &Masks) -> __m256i {
    match i {
        0 => times_alpha_by_lane(tweak, [0, 1]),
        1 => times_alpha_by_lane(tweak, [2, 3]),
        2 => times_alpha_by_lane(tweak, [4, 5]),
        3 => times_alpha_by_lane(tweak, [6, 7]),
        4..=7 => times_alpha_bytes::<1, 15>(before.get(i - 4)),
        8..=11 => times_alpha_bytes::<2, 14>(before.get(i - 8)),
        _ => times_alpha_bytes::<3, 13>(before.get(i - 12)),
    }
}

/// `T · α^n` in each lane with an `n` of its own, up to 7: 64-bit shifts, with the bits that leave a half put where they
/// belong.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn times_alpha_by_lane(tweak: __m256i, n: [i64; 2]) -> __m256i {
    let [a, b] = n;
    let shifted = _mm256_sllv_epi64(tweak, _mm256_set_epi64x(b, b, a, a));
    let carried = _mm256_srlv_epi64(tweak, _mm256_set_epi64x(64 - b, 64 - b, 64 - a, 64 - a));
    // From the low half into the high one, and from the high one around through the polynomial.
    let across = _mm256_bslli_epi128::<8>(carried);
    let around = _mm256_clmulepi64_epi128::<0x01>(carried, _mm256_set1_epi64x(POLYNOMIAL));
    _mm256_xor_si256(_mm256_xor_si256(shifted, across), around)
}

/// `T · α^(8 LEFT)`, with `RIGHT = 16 - LEFT`: the bytes move up, and what leaves comes back through the polynomial.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn times_alpha_bytes<const LEFT: i32, const RIGHT: i32>(tweak: __m256i) -> __m256i {
    let around = _mm256_clmulepi64_epi128::<0x00>(_mm256_bsrli_epi128::<RIGHT>(tweak), _mm256_set1_epi64x(POLYNOMIAL));
    _mm256_xor_si256(_mm256_bslli_epi128::<LEFT>(tweak), around)
}

#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(block: &u128) -> __m256i {
    _mm256_broadcastsi128_si256(load_block(block))
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(from: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes, of any alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(to: &mut [u8; 32], value: __m256i) {
    // SAFETY: 32 writable bytes, of any alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}
