//! The path that runs everywhere. It calls the `aes` crate with many blocks at once. That crate uses the CPU's AES instructions
//! (AES-NI, VAES, ARMv8), and runs in constant time on a CPU that has none.

use aes::{Aes128, Aes256, Block};
use cipher::consts::U16;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zerocopy::IntoBytes;
use zeroize::Zeroize;

use super::Direction;
use super::run::{BLOCK, Run};

/// The number of blocks that one call encrypts. No implementation of the `aes` crate takes more at once.
const CHUNK: usize = 64;

/// Sectors whose tweaks are encrypted in one call.
const TWEAKS: usize = 64;

/// Blocks in the smallest sector. Every sector is a whole number of such pieces.
const PIECE: usize = 512 / BLOCK;

/// The two ciphers of an XTS key. They wipe their round keys when dropped.
pub(super) enum Keys {
    Aes256 { data: Box<Aes256>, tweak: Box<Aes256> },
    Aes128 { data: Box<Aes128>, tweak: Box<Aes128> },
}

impl Keys {
    /// Expands the two halves of an XTS key, 32 or 16 bytes each.
    pub(super) fn new(data: &[u8], tweak: &[u8]) -> Self {
        if data.len() == 32 {
            Self::Aes256 { data: cipher(data), tweak: cipher(tweak) }
        } else {
            Self::Aes128 { data: cipher(data), tweak: cipher(tweak) }
        }
    }

    pub(super) fn crypt(&self, direction: Direction, run: Run<'_, '_>) {
        match (self, direction) {
            (Self::Aes256 { data, tweak }, Direction::Encrypt) => crypt(&**tweak, run, |b| data.encrypt_blocks(b)),
            (Self::Aes256 { data, tweak }, Direction::Decrypt) => crypt(&**tweak, run, |b| data.decrypt_blocks(b)),
            (Self::Aes128 { data, tweak }, Direction::Encrypt) => crypt(&**tweak, run, |b| data.encrypt_blocks(b)),
            (Self::Aes128 { data, tweak }, Direction::Decrypt) => crypt(&**tweak, run, |b| data.decrypt_blocks(b)),
        }
    }
}

fn cipher<C: KeyInit>(key: &[u8]) -> Box<C> {
    // `VolumeKey` allows no other lengths.
    Box::new(C::new_from_slice(key).unwrap_or_else(|_| unreachable!("half an XTS key is an AES key")))
}

/// Computes XEX over every block of the run, a chunk of blocks at a time: `C = E(P ⊕ T) ⊕ T` with `T = E₂(n) · α^j`
/// (IEEE 1619, 5.3).
fn crypt(tweak_cipher: &impl BlockCipherEncrypt<BlockSize = U16>, run: Run<'_, '_>, cipher: impl Fn(&mut [Block])) {
    let Run { sector_size, first: mut number, step, mut data } = run;
    let pieces_per_sector = sector_size.bytes() / (PIECE * BLOCK);
    let mut scratch = Scratch { tweaks: [0; TWEAKS], masks: [0; CHUNK], blocks: [0; CHUNK] };
    let Scratch { tweaks, masks, blocks } = &mut scratch;

    while !data.is_empty() {
        let sectors = (data.len() / sector_size.bytes()).min(TWEAKS);
        for tweak in &mut tweaks[..sectors] {
            *tweak = number.whole().to_le();
            number = number.after(1, step);
        }
        tweak_cipher.encrypt_blocks(blocks_of(&mut tweaks[..sectors]));

        let (mut batch, rest) = data.split_at(sectors * sector_size.bytes());
        data = rest;
        let mut piece = 0;
        let mut mask = 0;
        while !batch.is_empty() {
            let len = batch.len().min(CHUNK * BLOCK);
            let (mut chunk, rest) = batch.split_at(len);
            batch = rest;
            let count = len / BLOCK;
            let (masks, blocks) = (&mut masks[..count], &mut blocks[..count]);
            for masks in masks.chunks_exact_mut(PIECE) {
                if piece % pieces_per_sector == 0 {
                    mask = u128::from_le(tweaks[piece / pieces_per_sector]);
                }
                piece += 1;
                for slot in masks {
                    *slot = mask.to_le();
                    mask = times_alpha(mask);
                }
            }
            // The blocks go through a local buffer. The compiler knows that it overlaps neither of the caller's
            // buffers.
            for ((block, mask), from) in blocks.iter_mut().zip(&*masks).zip(chunk.get_in().as_chunks().0) {
                *block = u128::from_ne_bytes(*from) ^ mask;
            }
            cipher(blocks_of(blocks));
            for ((block, mask), to) in blocks.iter().zip(&*masks).zip(chunk.get_out().as_chunks_mut().0) {
                *to = (block ^ mask).to_ne_bytes();
            }
        }
    }
}

/// What a call leaves on the stack: tweaks, masks, and blocks that hold plaintext. They are in one place so that one drop
/// wipes them.
struct Scratch {
    tweaks: [u128; TWEAKS],
    masks: [u128; CHUNK],
    blocks: [u128; CHUNK],
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // `zeroize` wipes slices many bytes at a time.
        self.tweaks.as_mut_slice().zeroize();
        self.masks.as_mut_slice().zeroize();
        self.blocks.as_mut_slice().zeroize();
    }
}

/// Returns `T · α` in GF(2¹²⁸) with the polynomial x¹²⁸ + x⁷ + x² + x + 1 (IEEE 1619, 5.2). It does not branch on secret bits.
fn times_alpha(tweak: u128) -> u128 {
    (tweak << 1) ^ (0x87 & (tweak >> 127).wrapping_neg())
}

fn blocks_of(words: &mut [u128]) -> &mut [Block] {
    // A word is as long as a block, so no bytes remain.
    Block::slice_as_chunks_mut(words.as_mut_bytes()).0
}
