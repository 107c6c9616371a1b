//! AES on 128-bit registers of one block each, for every x86-64 server of the last decade.
//!
//! Eight blocks go through the rounds together. None of the sixteen registers is free for masks, so masks are kept in memory.
//! The masks of the next eight blocks are computed between the rounds, each from the one before it.

use core::arch::x86_64::{
    __m128i, _mm_add_epi64, _mm_aesdec_si128, _mm_aesdeclast_si128, _mm_aesenc_si128, _mm_aesenclast_si128,
    _mm_and_si128, _mm_loadu_si128, _mm_set_epi32, _mm_set_epi64x, _mm_shuffle_epi32, _mm_srai_epi32, _mm_storeu_si128,
    _mm_xor_si128,
};
use std::hint::black_box;

use cipher::inout::{InOut, InOutBuf};
use zeroize::Zeroize;

use super::keys::{RoundKeys, Schedules, load as load_block, store as store_block};
use super::{POLYNOMIAL, Piece};
use crate::sector::SectorSize;
use crate::xts::Direction;
use crate::xts::run::{BLOCK, Run, UnitNumber};

/// Proof that this CPU has AES-NI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AesNi(());

impl AesNi {
    pub(crate) fn new() -> Option<Self> {
        is_x86_feature_detected!("aes").then_some(Self(()))
    }

    #[inline(always)]
    pub(crate) fn crypt<const N: usize>(self, direction: Direction, keys: &Schedules<N>, run: Run<'_, '_>) {
        let Run { sector_size, first, step, data } = run;
        let (pieces, _) = data.into_chunks();
        match direction {
            // SAFETY: an `AesNi` exists only if the CPU has AES-NI, which `crypt` requires.
            Direction::Encrypt => unsafe { crypt::<N, false>(keys, first, step, sector_size, pieces) },
            // SAFETY: as above.
            Direction::Decrypt => unsafe { crypt::<N, true>(keys, first, step, sector_size, pieces) },
        }
    }
}

/// Blocks in flight.
const WIDTH: usize = 8;

/// Sectors whose tweaks are encrypted together.
const TWEAKS: usize = WIDTH;

/// Groups in a piece. The blocks of a group go through the rounds together. A group is a quarter of a piece.
const GROUPS: usize = size_of::<Piece>() / (WIDTH * BLOCK);

/// Encrypted tweaks of the next sectors.
#[repr(C, align(64))]
struct Tweaks([u128; TWEAKS]);

/// The masks of the blocks of one group, `T · α^j`.
#[repr(C, align(64))]
struct Masks([u128; WIDTH]);

#[target_feature(enable = "aes")]
fn crypt<const N: usize, const DECRYPT: bool>(
    keys: &Schedules<N>,
    mut number: UnitNumber,
    step: u64,
    sector_size: SectorSize,
    pieces: InOutBuf<'_, '_, Piece>,
) {
    let data_keys = if DECRYPT { &keys.decrypt } else { &keys.encrypt };
    let pieces_per_sector = sector_size.bytes() / size_of::<Piece>();
    let mut sectors = pieces.len() / pieces_per_sector;
    if sectors == 0 {
        return;
    }

    let mut tweaks = Tweaks([0; TWEAKS]);
    let mut masks = [Masks([0; WIDTH]), Masks([0; WIDTH])];
    refill(&mut tweaks, &keys.tweak, number, step, sectors);
    let mut mask = load_block(&tweaks.0[0]);
    for slot in &mut masks[0].0 {
        store_block(slot, mask);
        mask = times_alpha(mask);
    }
    let mut ahead = 1;
    let mut left = pieces_per_sector;
    for mut piece in pieces {
        left -= 1;
        // From here on `mask` is the first mask of the next group.
        for group in 0..GROUPS {
            if group == GROUPS - 1 && left == 0 {
                left = pieces_per_sector;
                sectors -= 1;
                if ahead == TWEAKS {
                    number = number.after(TWEAKS, step);
                    refill(&mut tweaks, &keys.tweak, number, step, sectors);
                    ahead = 0;
                }
                mask = load_block(&tweaks.0[ahead]);
                ahead += 1;
            }
            let [even, odd] = &mut masks;
            let (current, following) = if group % 2 == 0 { (even, odd) } else { (odd, even) };
            mask = crypt_group::<N, DECRYPT>(data_keys, &mut piece, group, current, following, mask);
        }
    }
    tweaks.0.as_mut_slice().zeroize();
    for masks in &mut masks {
        masks.0.as_mut_slice().zeroize();
    }
}

/// Encrypts at least `min(wanted, TWEAKS)` and at most `TWEAKS` tweaks, starting at the data unit `first`.
#[target_feature(enable = "aes")]
fn refill<const N: usize>(tweaks: &mut Tweaks, keys: &RoundKeys<N>, first: UnitNumber, step: u64, wanted: usize) {
    match wanted {
        0 => {}
        1 => encrypt_numbers::<N, 1>(tweaks, keys, first, step),
        _ => encrypt_numbers::<N, TWEAKS>(tweaks, keys, first, step),
    }
}

#[target_feature(enable = "aes")]
fn encrypt_numbers<const N: usize, const COUNT: usize>(
    tweaks: &mut Tweaks,
    keys: &RoundKeys<N>,
    first: UnitNumber,
    step: u64,
) {
    let mut blocks = [load_block(keys.get(0)); COUNT];
    for (i, block) in blocks.iter_mut().enumerate() {
        let UnitNumber { low, high } = first.after(i, step);
        *block = _mm_xor_si128(*block, _mm_set_epi64x(high.cast_signed(), low.cast_signed()));
    }
    // `black_box` keeps this a loop. If it were unrolled, the compiler would load all keys before the rounds.
    for round in 1..black_box(N - 1) {
        let key = load_block(keys.get(round));
        for block in &mut blocks {
            *block = _mm_aesenc_si128(*block, key);
        }
    }
    let key = load_block(keys.get(N - 1));
    for (block, to) in blocks.iter().zip(&mut tweaks.0) {
        store_block(to, _mm_aesenclast_si128(*block, key));
    }
}

/// Encrypts or decrypts the blocks of one group and computes the masks of the next group. `mask` is the first of these masks.
/// Returns the mask that follows the last of them.
#[target_feature(enable = "aes")]
#[inline]
fn crypt_group<const N: usize, const DECRYPT: bool>(
    keys: &RoundKeys<N>,
    piece: &mut InOut<'_, '_, Piece>,
    group: usize,
    masks: &Masks,
    following: &mut Masks,
    mut mask: __m128i,
) -> __m128i {
    // `black_box` stops the compiler from keeping round keys in registers across groups. They would not fit and would be
    // spilled to stack memory that nobody wipes.
    let (keys, masks) = (black_box(keys), black_box(masks));
    let round = |data: &mut [__m128i; WIDTH], n: usize| {
        let key = load_block(&keys.0[n]);
        for block in data {
            *block = if DECRYPT { _mm_aesdec_si128(*block, key) } else { _mm_aesenc_si128(*block, key) };
        }
    };
    let (from, _) = piece.get_in()[group * WIDTH * BLOCK..][..WIDTH * BLOCK].as_chunks();
    let key = load_block(&keys.0[0]);
    let mut data = [key; WIDTH];
    for i in 0..WIDTH {
        data[i] = _mm_xor_si128(_mm_xor_si128(load(&from[i]), key), load_block(&masks.0[i]));
    }
    for i in 0..WIDTH {
        round(&mut data, i + 1);
        store_block(&mut following.0[i], mask);
        mask = times_alpha(mask);
    }
    for n in WIDTH + 1..N - 1 {
        round(&mut data, n);
    }
    let key = load_block(&keys.0[N - 1]);
    let (to, _) = piece.get_out()[group * WIDTH * BLOCK..][..WIDTH * BLOCK].as_chunks_mut();
    for i in 0..WIDTH {
        let last = _mm_xor_si128(load_block(&masks.0[i]), key);
        let out = if DECRYPT { _mm_aesdeclast_si128(data[i], last) } else { _mm_aesenclast_si128(data[i], last) };
        store(&mut to[i], out);
    }
    mask
}

/// Returns `T · α`: both 64-bit halves are doubled, and the bit that leaves each half is put where it belongs.
#[target_feature(enable = "sse2")]
#[inline]
fn times_alpha(tweak: __m128i) -> __m128i {
    #[expect(clippy::cast_possible_truncation, reason = "0x87")]
    let into = _mm_set_epi32(0, 1, 0, POLYNOMIAL as i32);
    // The carry of the low half goes into the high half. The carry of the high half is reduced by the polynomial into the low
    // half.
    let signs = _mm_srai_epi32::<31>(_mm_shuffle_epi32::<0b00_01_00_11>(tweak));
    _mm_xor_si128(_mm_add_epi64(tweak, tweak), _mm_and_si128(signs, into))
}

#[target_feature(enable = "sse2")]
#[inline]
fn load(from: &[u8; BLOCK]) -> __m128i {
    // SAFETY: these are 16 readable bytes. The instruction accepts any alignment.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

#[target_feature(enable = "sse2")]
#[inline]
fn store(to: &mut [u8; BLOCK], value: __m128i) {
    // SAFETY: these are 16 writable bytes. The instruction accepts any alignment.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), value) }
}
