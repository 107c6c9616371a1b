//! Tests that a call leaves no round keys, tweaks or masks on the stack. They prove this only for a release build, and only
//! for the calls that they make. A build with debug assertions may leave such data on the stack, which does not matter.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;

use aes::{Aes128, Aes256};
use cipher::inout::InOutBuf;
use cipher::{Array, BlockCipherEncrypt, KeyInit};

use super::{Cpu, Keys, PIECE_BLOCKS, crypt};
use crate::sector::SectorSize;
use crate::xts::run::Run;
use crate::xts::{CpuPath, Direction};

/// Returns the bytes that earlier calls have left on this thread's stack, below the current frames. Reads them through
/// /proc/self/mem, because Rust does not allow reading them directly.
#[inline(never)]
fn left_on_the_stack() -> Vec<u8> {
    let here = 0_u8;
    let here = black_box(&raw const here).addr();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let start = maps
        .lines()
        .filter_map(|line| line.split_once(' ')?.0.split_once('-'))
        .map(|(start, end)| [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap()))
        .find_map(|[start, end]| (start..end).contains(&here).then_some(start))
        .unwrap();
    let mut bytes = vec![0; (here - start) / 16 * 16];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, (start + 15) as u64 / 16 * 16).unwrap();
    bytes
}

/// Calls `call` on a blank stack, deep enough that the search for its traces does not overwrite them.
#[inline(never)]
fn far_down(mut call: impl FnMut()) {
    #[inline(never)]
    fn blank() {
        let mut zeros = [1_u8; 512 << 10];
        black_box(&mut zeros).fill(0);
        black_box(&zeros);
    }
    #[inline(never)]
    fn below(gap: &[u8; 64 << 10], call: &mut dyn FnMut()) {
        call();
        black_box(gap);
    }
    blank();
    let gap = [0; 64 << 10];
    below(black_box(&gap), &mut call);
}

/// Returns how many of the secrets are on the stack. Vectors are stored to the stack at multiples of 16.
fn found(secrets: &HashSet<u128>, stack: &[u8]) -> usize {
    stack.as_chunks().0.iter().filter(|block| secrets.contains(&u128::from_le_bytes(**block))).count()
}

/// Sectors past the end of a run whose tweaks may be computed as well.
const SECTORS_AHEAD: u64 = 16;

/// Returns all round keys, and the masks of `blocks` blocks of each sector of a run and of [`SECTORS_AHEAD`] sectors after it.
/// The sectors are numbered from `first`, `step` apart.
fn secrets(keys: &Keys, tweak_key: &[u8], first: u128, sectors: u64, step: u64, blocks: usize) -> HashSet<u128> {
    let mut secrets = HashSet::new();
    match keys {
        Keys::Aes256(keys) => {
            secrets.extend([&keys.encrypt, &keys.decrypt, &keys.tweak].iter().flat_map(|keys| keys.0))
        }
        Keys::Aes128(keys) => {
            secrets.extend([&keys.encrypt, &keys.decrypt, &keys.tweak].iter().flat_map(|keys| keys.0))
        }
    }
    for sector in 0..sectors + SECTORS_AHEAD {
        let mut block = Array((first + u128::from(sector * step)).to_le_bytes());
        match keys {
            Keys::Aes256(_) => Aes256::new_from_slice(tweak_key).unwrap().encrypt_block(&mut block),
            Keys::Aes128(_) => Aes128::new_from_slice(tweak_key).unwrap().encrypt_block(&mut block),
        }
        let mut mask = u128::from_le_bytes(block.0);
        for _ in 0..blocks {
            secrets.insert(mask);
            mask = (mask << 1) ^ (0x87 & (mask >> 127).wrapping_neg());
        }
    }
    secrets
}

#[cfg_attr(not(debug_assertions), test)]
#[cfg_attr(debug_assertions, expect(dead_code, reason = "see the module documentation"))]
fn no_round_key_tweak_or_mask_stays_on_the_stack() {
    for cpu in CpuPath::available().filter_map(Cpu::new) {
        for half in [16, 32] {
            let key: Vec<u8> = (0..2 * half).map(|i: u8| i.wrapping_mul(37) ^ 0x5a).collect();
            let (data_key, tweak_key) = key.split_at(key.len() / 2);
            for (size, sectors) in [
                (SectorSize::B512, 1),
                (SectorSize::B512, 2),
                (SectorSize::B512, 40),
                (SectorSize::B4096, 1),
                (SectorSize::B4096, 20),
            ] {
                // Numbers from 0 on, and numbers that carry from the low word into the high word.
                for (direction, first, in_place) in [
                    (Direction::Encrypt, 0, true),
                    (Direction::Encrypt, (1 << 64) - 8, false),
                    (Direction::Decrypt, 0, false),
                    (Direction::Decrypt, (1 << 64) - 8, true),
                ] {
                    let mut data = vec![0x33; size.bytes() * sectors];
                    let source = data.clone();
                    let mut keys = None;
                    far_down(|| {
                        let keys = keys.insert(Keys::new(cpu, data_key, tweak_key));
                        let data = match in_place {
                            true => InOutBuf::from(&mut data[..]),
                            false => InOutBuf::new(&source, &mut data).unwrap(),
                        };
                        crypt(cpu, direction, keys, Run::new(size, first, data));
                    });
                    let (stack, keys) = (left_on_the_stack(), keys.unwrap());
                    // Masks are computed one piece in advance, and so past the end of a sector's last piece.
                    let blocks = size.bytes() / 16 + 2 * PIECE_BLOCKS;
                    let secrets = secrets(&keys, tweak_key, first, sectors as u64, size.lba_step(), blocks);
                    let call = format!("{cpu:?}, {half}, {size}, {sectors}, {direction:?}, {first}, {in_place}");
                    assert_eq!(found(&secrets, &stack), 0, "{call}");
                }
            }
        }
    }
}

/// The search finds what a call leaves on the stack.
#[test]
fn what_stays_on_the_stack_is_found() {
    let secret = 0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978;
    far_down(|| {
        let copies = [secret; 5];
        black_box(&copies);
    });
    assert_eq!(found(&HashSet::from([secret]), &left_on_the_stack()), 5);
}
