//! AES on 256-bit registers of two blocks each, without AVX-512, for Zen 3 and Alder Lake.
//!
//! Ten or eleven registers of data, a third of a [`Double`], go through the rounds together. Eight would be just enough to
//! keep the AES units busy. But then every other instruction would cost additional time. No register of the sixteen is left
//! for masks, so masks lie in memory. The masks of the next double are computed between the rounds, by moves of whole
//! bytes, additions and shifts. A carry-less multiplication would be shorter. But Zen splits it into four operations and
//! stops decoding for them, and one of the four takes the place of an AES operation.

use core::arch::x86_64::{
    __m256i, _mm256_add_epi64, _mm256_aesdec_epi128, _mm256_aesdeclast_epi128, _mm256_aesenc_epi128,
    _mm256_aesenclast_epi128, _mm256_broadcastsi128_si256, _mm256_bslli_epi128, _mm256_bsrli_epi128,
    _mm256_loadu_si256, _mm256_set_epi64x, _mm256_set1_epi64x, _mm256_shuffle_epi8, _mm256_slli_epi64,
    _mm256_sllv_epi64, _mm256_srlv_epi64, _mm256_storeu_si256, _mm256_sub_epi64, _mm256_xor_si256,
};
use std::hint::black_box;

use cipher::array::Array;
use cipher::consts::U1024;
use cipher::inout::{InOut, InOutBuf};
use zerocopy::IntoBytes;
use zeroize::Zeroize;

use super::ZERO;
use super::aesni::AesNi;
use super::keys::{RoundKeys, Schedules, load as load_block};
use crate::sector::SectorSize;
use crate::xts::Direction;
use crate::xts::run::{BLOCK, Run, UnitNumber};

/// Proof that this CPU has AVX2 and VAES, and that the operating system saves their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vaes256(AesNi);

impl Vaes256 {
    pub(crate) fn new() -> Option<Self> {
        let there = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("vaes");
        AesNi::new().filter(|_| there).map(Self)
    }

    /// Returns the proof of AES-NI. VAES is AES-NI on wider registers.
    pub(super) fn aesni(self) -> AesNi {
        self.0
    }

    #[inline(always)]
    pub(crate) fn crypt<const N: usize>(self, direction: Direction, keys: &Schedules<N>, run: Run<'_, '_>) {
        let Run { sector_size, first, step, data } = run;
        let (doubles, tail) = data.into_chunks();
        let sectors = doubles.len() * size_of::<Double>() / sector_size.bytes();
        match direction {
            // SAFETY: a `Vaes256` exists only where the CPU has what `crypt` is compiled for.
            Direction::Encrypt => unsafe { crypt::<N, false>(keys, first, step, sector_size, doubles) },
            // SAFETY: as above.
            Direction::Decrypt => unsafe { crypt::<N, true>(keys, first, step, sector_size, doubles) },
        }
        // One 512-byte sector is left, without a second sector to form a double.
        if !tail.is_empty() {
            let first = first.after(sectors, step);
            self.aesni().crypt(direction, keys, Run { sector_size, first, step, data: tail });
        }
    }
}

/// The unit that this path works on: a sector, a part of a sector, or two sectors of 512 bytes.
type Double = Array<u8, U1024>;

/// Base vectors among 16 vectors of masks. The others are computed from them by moving whole bytes: vector `i + BASES · k` is
/// vector `i` times α^8k. A group is one base vector and the vectors computed from it. A double has eight groups.
const BASES: usize = 4;

/// Registers that hold tweaks in flight.
const TWEAK_VECTORS: usize = 8;

/// Sectors whose tweaks are encrypted together. The number is even, so that pairs stay together.
const TWEAKS: usize = 2 * TWEAK_VECTORS;

/// Encrypted tweaks of the next sectors.
#[repr(C, align(64))]
struct Tweaks([u128; TWEAKS]);

/// The masks of the blocks of one double, `T · α^j`.
#[repr(C, align(64))]
struct Masks([u128; size_of::<Double>() / BLOCK]);

/// The base vectors of the next four groups, for a sector that continues in the next double.
#[repr(C, align(64))]
struct Bases([u128; 2 * BASES]);

/// Where the masks of the next double come from.
mod next {
    /// The same sector continues.
    pub(super) const SAME: u8 = 0;
    /// A sector begins.
    pub(super) const SECTOR: u8 = 1;
    /// Two sectors of 512 bytes follow.
    pub(super) const PAIR: u8 = 2;
}

#[target_feature(enable = "avx2,vaes")]
fn crypt<const N: usize, const DECRYPT: bool>(
    keys: &Schedules<N>,
    mut number: UnitNumber,
    step: u64,
    sector_size: SectorSize,
    doubles: InOutBuf<'_, '_, Double>,
) {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let pairs = sector_size == SectorSize::B512;
    let doubles_per_sector = (sector_size.bytes() / size_of::<Double>()).max(1);
    let mut sectors = doubles.len() / doubles_per_sector * if pairs { 2 } else { 1 };
    if sectors == 0 {
        return;
    }

    let mut tweaks = Tweaks([0; TWEAKS]);
    let (mut even, mut odd) = (Masks([0; _]), Masks([0; _]));
    let (mut current, mut following) = (&mut even, &mut odd);
    let mut bases = Bases([0; _]);
    refill(&mut tweaks, &keys.tweak, number, step, sectors);
    let mut ahead = if pairs { 2 } else { 1 };
    for group in 0..2 * BASES {
        // `black_box` makes the compiler load the tweak again instead of spilling it.
        let tweaks = &black_box(&tweaks).0;
        let base = match group {
            0..BASES => start(group, broadcast(&tweaks[0])),
            _ if pairs => start(group - BASES, broadcast(&tweaks[1])),
            _ => bases.get(group % BASES),
        };
        let (at, around) = (base_vector(group), tops_around(base));
        current.set(at, base);
        current.set(at + BASES, times_alpha_8(base, around));
        current.set(at + 2 * BASES, times_alpha_16(base, around));
        current.set(at + 3 * BASES, times_alpha_24(base, around));
        bases.set(group % BASES, times_alpha_32(base, around));
    }
    let mut left = doubles_per_sector;
    for mut double in doubles {
        macro_rules! crypt {
            ($next:ident) => {
                crypt_double::<N, DECRYPT, { next::$next }>(
                    data_keys,
                    &mut double,
                    current,
                    following,
                    &mut bases,
                    &tweaks,
                    ahead,
                );
            };
        }
        left -= 1;
        if left > 0 {
            crypt!(SAME);
        } else {
            left = doubles_per_sector;
            sectors -= if pairs { 2 } else { 1 };
            if ahead == TWEAKS {
                number = number.after(TWEAKS, step);
                refill(&mut tweaks, &keys.tweak, number, step, sectors);
                ahead = 0;
            }
            if pairs {
                crypt!(PAIR);
                ahead += 2;
            } else {
                crypt!(SECTOR);
                ahead += 1;
            }
        }
        (current, following) = (following, current);
    }
    tweaks.0.as_mut_slice().zeroize();
    even.0.as_mut_slice().zeroize();
    odd.0.as_mut_slice().zeroize();
    bases.0.as_mut_slice().zeroize();
}

/// Encrypts the tweaks of the data units from `first` on: up to [`TWEAKS`] of them, and at least `wanted` if that is fewer.
#[target_feature(enable = "avx2,vaes")]
fn refill<const N: usize>(tweaks: &mut Tweaks, keys: &RoundKeys<N>, first: UnitNumber, step: u64, wanted: usize) {
    match wanted {
        0 => {}
        1..=2 => encrypt_numbers::<N, 1>(tweaks, keys, first, step),
        3..=8 => encrypt_numbers::<N, 4>(tweaks, keys, first, step),
        _ => encrypt_numbers::<N, TWEAK_VECTORS>(tweaks, keys, first, step),
    }
}

#[target_feature(enable = "avx2,vaes")]
fn encrypt_numbers<const N: usize, const VECTORS: usize>(
    tweaks: &mut Tweaks,
    keys: &RoundKeys<N>,
    first: UnitNumber,
    step: u64,
) {
    let (low, high, step) = (first.low.cast_signed(), first.high.cast_signed(), step.cast_signed());
    // The low halves wrap, as the IV does. The high halves stay.
    let mut two = _mm256_add_epi64(_mm256_set_epi64x(high, low, high, low), _mm256_set_epi64x(0, step, 0, 0));
    let stride = _mm256_set_epi64x(0, 2 * step, 0, 2 * step);
    let key = broadcast(keys.get(0));
    let mut vectors = [two; VECTORS];
    for vector in &mut vectors {
        *vector = _mm256_xor_si256(two, key);
        two = _mm256_add_epi64(two, stride);
    }
    // `black_box` keeps this a loop. If it were unrolled, the compiler would load all keys before the rounds.
    for round in 1..black_box(N - 1) {
        let key = broadcast(keys.get(round));
        for vector in &mut vectors {
            *vector = _mm256_aesenc_epi128(*vector, key);
        }
    }
    let key = broadcast(keys.get(N - 1));
    let (to, _) = tweaks.0.as_mut_bytes().as_chunks_mut();
    for (vector, to) in vectors.iter().zip(to) {
        store(to, _mm256_aesenclast_epi128(*vector, key));
    }
}

/// Encrypts or decrypts one double and computes the masks of the next one. If a sector begins with the next double, its
/// tweak has the number `ahead`. If two sectors begin with it, the second tweak has the number after that.
#[target_feature(enable = "avx2,vaes")]
#[inline]
fn crypt_double<const N: usize, const DECRYPT: bool, const NEXT: u8>(
    keys: &RoundKeys<N>,
    double: &mut InOut<'_, '_, Double>,
    masks: &Masks,
    following: &mut Masks,
    bases: &mut Bases,
    tweaks: &Tweaks,
    ahead: usize,
) {
    // `black_box` stops the compiler from keeping round keys in registers across doubles. They would not fit and would be
    // spilled to stack memory that nobody wipes.
    let (keys, masks) = (black_box(keys), black_box(masks));
    // This makes the compiler assume that the rounds may end early. So it must leave each round beside the masks that
    // are computed there. Otherwise it would move all rounds behind all masks and load all round keys in advance, into
    // stack memory that nobody wipes.
    let end = black_box(N);
    // This is not a closure, because a closure that is not inlined makes the compiler spill all vectors around its call.
    macro_rules! base_of {
        ($group:expr) => {
            match NEXT {
                next::SAME => bases.get($group % BASES),
                _ if $group < BASES => start($group, broadcast(&black_box(tweaks).0[ahead])),
                next::PAIR => start($group - BASES, broadcast(&black_box(tweaks).0[ahead + 1])),
                _ => bases.get($group % BASES),
            }
        };
    }
    // The masks of one group are computed beside this many rounds. Each third of a double has up to three groups. The
    // rounds are the 13 or 9 between the first key and the last key.
    let beside_group = (N - 2) / 3;
    // Processes a third of the double: the vectors from `$at` to `$at + $width`, and the masks of the groups `$group`.
    macro_rules! third {
        ($at:literal, $width:literal, $($group:literal),+) => {
            let (from, _) = double.get_in().as_chunks();
            let key = broadcast(&keys.0[0]);
            let mut data = [key; $width];
            for i in 0..$width {
                data[i] = _mm256_xor_si256(_mm256_xor_si256(load(&from[$at + i]), key), masks.get($at + i));
            }
            'rounds: {
                macro_rules! round {
                    ($i:expr) => {
                        if end == $i {
                            break 'rounds;
                        }
                        let key = broadcast(&keys.0[$i]);
                        for vector in &mut data {
                            *vector = if DECRYPT {
                                _mm256_aesdec_epi128(*vector, key)
                            } else {
                                _mm256_aesenc_epi128(*vector, key)
                            };
                        }
                    };
                }
                let mut next = 1;
                $({
                    let base = base_of!($group);
                    let at = base_vector($group);
                    round!(next);
                    following.set(at, base);
                    let around = tops_around(base);
                    round!(next + 1);
                    following.set(at + BASES, times_alpha_8(base, around));
                    round!(next + 2);
                    following.set(at + 2 * BASES, times_alpha_16(base, around));
                    if NEXT != next::PAIR {
                        bases.set($group % BASES, times_alpha_32(base, around));
                    }
                    if beside_group > 3 {
                        round!(next + 3);
                    }
                    following.set(at + 3 * BASES, times_alpha_24(base, around));
                    next += beside_group;
                })+
                while next < N - 1 {
                    round!(next);
                    next += 1;
                }
            }
            let key = broadcast(&keys.0[N - 1]);
            let (to, _) = double.get_out().as_chunks_mut();
            for i in 0..$width {
                let last = _mm256_xor_si256(masks.get($at + i), key);
                let out = if DECRYPT {
                    _mm256_aesdeclast_epi128(data[i], last)
                } else {
                    _mm256_aesenclast_epi128(data[i], last)
                };
                store(&mut to[$at + i], out);
            }
        };
    }
    third!(0, 11, 0, 1, 2);
    third!(11, 11, 3, 4, 5);
    third!(22, 10, 6, 7);
}

/// Returns which vector of a double's masks is the base of group `group`, from 0 to 7.
#[inline(always)]
fn base_vector(group: usize) -> usize {
    if group < BASES { group } else { group + 3 * BASES }
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

impl Bases {
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

/// Returns vector `group` of a sector's first masks. `tweak` has the sector's tweak in both lanes. Each lane becomes `T · α^n`
/// with its own `n` up to 7. This takes 64-bit shifts, and the bits that leave a half are put where they belong.
#[target_feature(enable = "avx2")]
#[inline]
fn start(group: usize, tweak: __m256i) -> __m256i {
    let low = _mm256_set1_epi64x(2 * group as i64);
    let n = _mm256_add_epi64(low, _mm256_set_epi64x(1, 1, 0, 0));
    let shifted = _mm256_sllv_epi64(tweak, n);
    let carried = _mm256_srlv_epi64(tweak, _mm256_sub_epi64(_mm256_set1_epi64x(64), n));
    // Bits of the low half go into the high half. Bits of the high half go through the polynomial into the low half.
    let across = _mm256_bslli_epi128::<8>(carried);
    let around = _mm256_bsrli_epi128::<8>(times_polynomial(carried));
    _mm256_xor_si256(_mm256_xor_si256(shifted, across), around)
}

/// The byte shuffle that gathers the topmost bytes of a tweak, in four runs of one to four bytes. The product of a run with
/// the polynomial is seven bits longer than the run, so the runs lie far enough apart that their products do not overlap.
/// Three bytes lie at 0 to 2, two at 4 and 5, four at 8 to 11, and one at 13.
const TOPS: u128 = u128::from_le_bytes([13, 14, 15, ZERO, 14, 15, ZERO, ZERO, 12, 13, 14, 15, ZERO, 15, ZERO, ZERO]);

/// The byte shuffles that move each of the four products of [`TOPS`] to the lowest bytes.
const AROUND_1: u128 = bottom([13, 14, ZERO, ZERO, ZERO]);
const AROUND_2: u128 = bottom([4, 5, 6, ZERO, ZERO]);
const AROUND_3: u128 = bottom([0, 1, 2, 3, ZERO]);
const AROUND_4: u128 = bottom([8, 9, 10, 11, 12]);

const fn bottom([a, b, c, d, e]: [u8; 5]) -> u128 {
    u128::from_le_bytes([a, b, c, d, e, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO])
}

/// Computes what is added to the lowest bytes of a tweak that moves up by one to four bytes: the topmost bytes times the
/// polynomial.
#[target_feature(enable = "avx2")]
#[inline]
fn tops_around(tweak: __m256i) -> __m256i {
    times_polynomial(_mm256_shuffle_epi8(tweak, broadcast(&TOPS)))
}

/// Multiplies each half by x⁷ + x² + x + 1, the polynomial of GF(2¹²⁸) without its x¹²⁸. Bits beyond the half are lost.
#[target_feature(enable = "avx2")]
#[inline]
fn times_polynomial(halves: __m256i) -> __m256i {
    let low = _mm256_xor_si256(halves, _mm256_add_epi64(halves, halves));
    let high = _mm256_xor_si256(_mm256_slli_epi64::<2>(halves), _mm256_slli_epi64::<7>(halves));
    _mm256_xor_si256(low, high)
}

#[target_feature(enable = "avx2")]
#[inline]
fn times_alpha_8(tweak: __m256i, around: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_bslli_epi128::<1>(tweak), _mm256_shuffle_epi8(around, broadcast(&AROUND_1)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn times_alpha_16(tweak: __m256i, around: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_bslli_epi128::<2>(tweak), _mm256_shuffle_epi8(around, broadcast(&AROUND_2)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn times_alpha_24(tweak: __m256i, around: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_bslli_epi128::<3>(tweak), _mm256_shuffle_epi8(around, broadcast(&AROUND_3)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn times_alpha_32(tweak: __m256i, around: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_bslli_epi128::<4>(tweak), _mm256_shuffle_epi8(around, broadcast(&AROUND_4)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(block: &u128) -> __m256i {
    _mm256_broadcastsi128_si256(load_block(block))
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(from: &[u8; 32]) -> __m256i {
    // SAFETY: these are 32 readable bytes. The instruction accepts any alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(to: &mut [u8; 32], value: __m256i) {
    // SAFETY: these are 32 writable bytes. The instruction accepts any alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}
