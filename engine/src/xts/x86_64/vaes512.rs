//! AES on 512-bit registers of four blocks each, for Ice Lake, Zen 4 and later.
//!
//! Eight registers of data, one [`Piece`], go through the rounds together. The masks of the next piece are computed
//! between the rounds, where the AES units leave the other units idle, and are kept in memory. They would fit into
//! registers. But if they were kept there, nothing would stop the compiler from computing them after the rounds, where
//! they would wait behind a full scheduler.
//!
//! For requests of one sector, the fixed cost of a call matters: see `encrypt_numbers` and [`UnitNumber`].

use core::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi64, _mm512_aesdec_epi128, _mm512_aesdeclast_epi128,
    _mm512_aesenc_epi128, _mm512_aesenclast_epi128, _mm512_broadcast_i32x4, _mm512_bslli_epi128, _mm512_bsrli_epi128,
    _mm512_clmulepi64_epi128, _mm512_loadu_si512, _mm512_maskz_shuffle_epi32, _mm512_set_epi64, _mm512_set1_epi64,
    _mm512_shuffle_epi8, _mm512_sllv_epi64, _mm512_srlv_epi64, _mm512_storeu_si512, _mm512_ternarylogic_epi64,
    _mm512_xor_si512,
};
use std::hint::black_box;

use cipher::inout::{InOut, InOutBuf};
use zerocopy::IntoBytes;
use zeroize::{Zeroize, optimization_barrier};

use super::aesni::AesNi;
use super::keys::{RoundKeys, Schedules, load as load_block};
use super::{PIECE_BLOCKS, POLYNOMIAL, Piece, ZERO};
use crate::sector::SectorSize;
use crate::xts::Direction;
use crate::xts::run::{Run, UnitNumber};

/// Proof that this CPU has AVX-512, VAES and VPCLMULQDQ, and that the operating system saves their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vaes512(AesNi);

impl Vaes512 {
    pub(crate) fn new() -> Option<Self> {
        let there = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("vaes")
            && is_x86_feature_detected!("vpclmulqdq");
        AesNi::new().filter(|_| there).map(Self)
    }

    /// Returns the proof of AES-NI. VAES is AES-NI on wider registers.
    pub(super) fn aesni(self) -> AesNi {
        self.0
    }

    #[inline(always)]
    pub(crate) fn crypt<const N: usize>(self, direction: Direction, keys: &Schedules<N>, run: Run<'_, '_>) {
        let Run { sector_size, first, step, data } = run;
        let (pieces, _) = data.into_chunks();
        match direction {
            // SAFETY: a `Vaes512` exists only where the CPU has what `crypt` is compiled for.
            Direction::Encrypt => unsafe { crypt::<N, false>(keys, first, step, sector_size, pieces) },
            // SAFETY: as above.
            Direction::Decrypt => unsafe { crypt::<N, true>(keys, first, step, sector_size, pieces) },
        }
    }
}

/// Registers in a piece.
const WIDTH: usize = 8;

/// Base vectors of a piece's masks. The others are computed from them by moving whole bytes: vector `i + BASES · k` is vector
/// `i` times α^8k.
const BASES: usize = 2;

/// Sectors whose tweaks are encrypted together: two registers.
const TWEAKS: usize = 8;

/// Encrypted tweaks: one batch for the current sectors and one for the sectors after them. The two take turns.
#[repr(C, align(64))]
struct Tweaks([[u128; TWEAKS]; 2]);

/// Bytes from the current piece to the piece that is prefetched into the cache. This is three pages, because the CPU's own
/// prefetching stops at the end of a page. With prefetching, data in the third-level cache is encrypted 1.15 times as fast.
/// This was measured on Zen 5 with 1 MiB of data, of which the second-level cache keeps a part (see benches/README.md).
const FETCH_AHEAD: usize = 3 * 4096;

/// The masks of the blocks of one piece, `T · α^j`.
#[repr(C, align(64))]
struct Masks([u128; PIECE_BLOCKS]);

#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
fn crypt<const N: usize, const DECRYPT: bool>(
    keys: &Schedules<N>,
    first: UnitNumber,
    step: u64,
    sector_size: SectorSize,
    pieces: InOutBuf<'_, '_, Piece>,
) {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let pieces_per_sector = sector_size.bytes() / size_of::<Piece>();
    let sectors = pieces.len() >> pieces_per_sector.trailing_zeros();
    if sectors == 0 {
        return;
    }

    let mut tweaks = Tweaks([[0; TWEAKS]; 2]);
    let mut masks = Masks([0; PIECE_BLOCKS]);
    encrypt_numbers(&mut tweaks.0[0], &keys.tweak, first, step);
    let tweak = broadcast(&tweaks.0[0][0]);
    let mut current = [tweak; WIDTH];
    for group in 0..BASES {
        let base = start(group, tweak);
        let around = tops_around(base);
        current[group] = base;
        current[group + BASES] = times_alpha_8(base, around);
        current[group + 2 * BASES] = times_alpha_16(base, around);
        current[group + 3 * BASES] = times_alpha_24(base, around);
    }
    let mut sector = 0;
    let mut left = pieces_per_sector;
    let mut behind = pieces.len();
    for piece in pieces {
        behind -= 1;
        if behind >= FETCH_AHEAD / size_of::<Piece>() {
            fetch_ahead(&piece);
        }
        left -= 1;
        if left > 0 || sector + 1 == sectors {
            crypt_piece::<N, DECRYPT, false>(data_keys, piece, current, &mut masks, tweak);
        } else {
            left = pieces_per_sector;
            // Encrypts the tweaks one batch ahead, so that their rounds run beside those of the data.
            if sector % TWEAKS == 0 && sectors - sector > TWEAKS {
                let next = sector + TWEAKS;
                encrypt_numbers(&mut tweaks.0[next / TWEAKS % 2], &keys.tweak, first.after(next, step), step);
            }
            sector += 1;
            let next = broadcast(&tweaks.0[sector / TWEAKS % 2][sector % TWEAKS]);
            crypt_piece::<N, DECRYPT, true>(data_keys, piece, current, &mut masks, next);
        }
        // `black_box` stops the compiler from also keeping the new masks in registers.
        let masks = black_box(&mut masks);
        for (i, current) in current.iter_mut().enumerate() {
            *current = masks.get(i);
        }
    }
    tweaks.0.as_flattened_mut().zeroize();
    masks.0.as_mut_slice().zeroize();
}

/// Encrypts the tweaks of the [`TWEAKS`] data units from `first` on.
///
/// This always computes two registers, although one sector needs only a quarter of one. A branch would cost a small call more
/// than it saves.
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
#[inline]
fn encrypt_numbers<const N: usize>(tweaks: &mut [u128; TWEAKS], keys: &RoundKeys<N>, first: UnitNumber, step: u64) {
    // `black_box` stops the compiler from keeping these keys for the next call in stack memory that nobody wipes.
    let keys = black_box(keys);
    let (low, high, step) = (first.low.cast_signed(), first.high.cast_signed(), step.cast_signed());
    // The low halves wrap, as the IV does. The high halves stay.
    let mut four = _mm512_add_epi64(
        _mm512_set_epi64(high, low, high, low, high, low, high, low),
        _mm512_set_epi64(0, 3 * step, 0, 2 * step, 0, step, 0, 0),
    );
    let stride = _mm512_set_epi64(0, 4 * step, 0, 4 * step, 0, 4 * step, 0, 4 * step);
    let mut vectors = [four; TWEAKS / 4];
    for vector in &mut vectors {
        *vector = _mm512_xor_si512(four, broadcast(&keys.0[0]));
        four = _mm512_add_epi64(four, stride);
    }
    for key in &keys.0[1..N - 1] {
        for vector in &mut vectors {
            *vector = _mm512_aesenc_epi128(*vector, broadcast(key));
        }
    }
    let (to, _) = tweaks.as_mut_bytes().as_chunks_mut();
    for (vector, to) in vectors.iter().zip(to) {
        store(to, _mm512_aesenclast_epi128(*vector, broadcast(&keys.0[N - 1])));
    }
}

/// Encrypts or decrypts one piece with the masks `current`, and computes the masks of the next piece. Without `START`, these
/// are the current masks times α³². With `START`, they are the masks of a sector that begins with the tweak `next`.
#[target_feature(enable = "avx512f,avx512bw,vaes,vpclmulqdq")]
#[inline]
fn crypt_piece<const N: usize, const DECRYPT: bool, const START: bool>(
    keys: &RoundKeys<N>,
    mut piece: InOut<'_, '_, Piece>,
    current: [__m512i; WIDTH],
    masks: &mut Masks,
    next: __m512i,
) {
    // `black_box` stops the compiler from loading all round keys before the loop. They would not fit into the registers and
    // would be kept in stack memory that nobody wipes.
    let keys = black_box(keys);
    let round = |data: &mut [__m512i; WIDTH], n: usize| {
        let key = broadcast(&keys.0[n]);
        for vector in data {
            *vector = if DECRYPT { _mm512_aesdec_epi128(*vector, key) } else { _mm512_aesenc_epi128(*vector, key) };
        }
    };

    let (from, _) = piece.get_in().as_chunks();
    let key = broadcast(&keys.0[0]);
    let mut data = [key; WIDTH];
    for i in 0..WIDTH {
        data[i] = xor3(load(&from[i]), current[i], key);
    }
    let mut put = |i: usize, mask: __m512i| {
        masks.set(i, mask);
        // Keeps the computation of the mask at this place.
        optimization_barrier(masks);
    };
    // This is unrolled by hand, because the compiler would leave it a loop with branches.
    macro_rules! rounds_and_masks {
        ($($group:literal)*) => {$(
            round(&mut data, 4 * $group + 1);
            let base = if START { start($group, next) } else { times_alpha_32(current[$group]) };
            put($group, base);
            round(&mut data, 4 * $group + 2);
            let around = tops_around(base);
            put($group + BASES, times_alpha_8(base, around));
            round(&mut data, 4 * $group + 3);
            put($group + 2 * BASES, times_alpha_16(base, around));
            round(&mut data, 4 * $group + 4);
            put($group + 3 * BASES, times_alpha_24(base, around));
        )*};
    }
    rounds_and_masks!(0 1);
    for n in WIDTH + 1..N - 1 {
        round(&mut data, n);
    }
    let key = broadcast(&keys.0[N - 1]);
    let (to, _) = piece.get_out().as_chunks_mut();
    for i in 0..WIDTH {
        let last = _mm512_xor_si512(current[i], key);
        let out =
            if DECRYPT { _mm512_aesdeclast_epi128(data[i], last) } else { _mm512_aesenclast_epi128(data[i], last) };
        store(&mut to[i], out);
    }
}

/// Prefetches the piece that lies [`FETCH_AHEAD`] bytes after this one.
#[target_feature(enable = "avx512f")]
#[inline]
fn fetch_ahead(piece: &InOut<'_, '_, Piece>) {
    for line in 0..size_of::<Piece>() / 64 {
        let at = piece.get_in().as_ptr().wrapping_add(FETCH_AHEAD + 64 * line);
        // A prefetch is a hint. It never faults, whatever the address.
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
}

impl Masks {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn get(&self, i: usize) -> __m512i {
        let (vectors, _) = self.0.as_bytes().as_chunks();
        load(&vectors[i])
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn set(&mut self, i: usize, value: __m512i) {
        let (vectors, _) = self.0.as_mut_bytes().as_chunks_mut();
        store(&mut vectors[i], value);
    }
}

/// Returns vector `group` of a sector's first masks. `tweak` has the sector's tweak in every lane.
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn start(group: usize, tweak: __m512i) -> __m512i {
    match group {
        0 => times_alpha_by_lane(tweak, [0, 1, 2, 3]),
        _ => times_alpha_by_lane(tweak, [4, 5, 6, 7]),
    }
}

/// Returns `T · α^n` in each lane, with an `n` up to 7 for each lane. This takes 64-bit shifts, and the bits that leave a half
/// are put where they belong.
#[target_feature(enable = "avx512f,vpclmulqdq")]
#[inline]
fn times_alpha_by_lane(tweak: __m512i, n: [i64; 4]) -> __m512i {
    let [a, b, c, d] = n;
    let shifted = _mm512_sllv_epi64(tweak, _mm512_set_epi64(d, d, c, c, b, b, a, a));
    let back = _mm512_set_epi64(64 - d, 64 - d, 64 - c, 64 - c, 64 - b, 64 - b, 64 - a, 64 - a);
    let carried = _mm512_srlv_epi64(tweak, back);
    // Bits of the low half go into the high half. Bits of the high half go through the polynomial into the low half.
    let across = _mm512_maskz_shuffle_epi32::<0b01_00_11_10>(0b1100_1100_1100_1100, carried);
    let around = _mm512_clmulepi64_epi128::<0x01>(carried, _mm512_set1_epi64(POLYNOMIAL));
    xor3(shifted, across, around)
}

/// Returns `T · α³²`. The bytes move up by four, and the bytes that leave return through the polynomial.
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn times_alpha_32(tweak: __m512i) -> __m512i {
    let around = _mm512_clmulepi64_epi128::<0x00>(_mm512_bsrli_epi128::<12>(tweak), _mm512_set1_epi64(POLYNOMIAL));
    _mm512_xor_si512(_mm512_bslli_epi128::<4>(tweak), around)
}

/// The byte shuffle that gathers the topmost one, two and three bytes of a tweak. The product of such a run with
/// [`POLYNOMIAL`] is seven bits longer than the run, so the runs lie far enough apart that their products do not overlap.
/// Three bytes lie at 0 to 2, two at 4 and 5, and one at 7.
const TOPS: u128 =
    u128::from_le_bytes([13, 14, 15, ZERO, 14, 15, ZERO, 15, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO]);

/// The byte shuffles that move each of the three products of [`TOPS`] to the lowest bytes.
const AROUND_1: u128 = bottom([7, 8, ZERO, ZERO]);
const AROUND_2: u128 = bottom([4, 5, 6, ZERO]);
const AROUND_3: u128 = bottom([0, 1, 2, 3]);

const fn bottom(from: [u8; 4]) -> u128 {
    ((u128::MAX / 0xff * (ZERO as u128)) & !0xffff_ffff) | u32::from_le_bytes(from) as u128
}

/// Computes what [`times_alpha_8`], [`times_alpha_16`] and [`times_alpha_24`] add to the lowest bytes. One carry-less
/// multiplication serves all three, because it is the only instruction here that takes the place of an AES operation (Zen 4).
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn tops_around(tweak: __m512i) -> __m512i {
    let tops = _mm512_shuffle_epi8(tweak, broadcast(&TOPS));
    _mm512_clmulepi64_epi128::<0x00>(tops, _mm512_set1_epi64(POLYNOMIAL))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn times_alpha_8(tweak: __m512i, around: __m512i) -> __m512i {
    _mm512_xor_si512(_mm512_bslli_epi128::<1>(tweak), _mm512_shuffle_epi8(around, broadcast(&AROUND_1)))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn times_alpha_16(tweak: __m512i, around: __m512i) -> __m512i {
    _mm512_xor_si512(_mm512_bslli_epi128::<2>(tweak), _mm512_shuffle_epi8(around, broadcast(&AROUND_2)))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn times_alpha_24(tweak: __m512i, around: __m512i) -> __m512i {
    _mm512_xor_si512(_mm512_bslli_epi128::<3>(tweak), _mm512_shuffle_epi8(around, broadcast(&AROUND_3)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(a, b, c)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn broadcast(block: &u128) -> __m512i {
    _mm512_broadcast_i32x4(load_block(block))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(from: &[u8; 64]) -> __m512i {
    // SAFETY: these are 64 readable bytes. The instruction accepts any alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(to: &mut [u8; 64], value: __m512i) {
    // SAFETY: these are 64 writable bytes. The instruction accepts any alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) }
}
