//! The paths for x86-64, one for each width of the registers that the AES instructions work on.
//!
//! This module contains `unsafe` code. Rust requires `unsafe` where ordinary code calls a function that is compiled for an
//! instruction set, and where a vector is loaded from memory or stored to it. A caller of a function that is compiled for
//! an instruction set must show a value ([`AesNi`], [`Vaes256`], [`Vaes512`]) that only a run-time check of the CPU
//! creates. The functions that are compiled for an instruction set are themselves safe `#[target_feature]` functions.
//!
//! All paths work on [`Piece`]s, the 512 bytes of the smallest sector, and use the same round keys.
#![allow(unsafe_code, reason = "intrinsics; the module documentation names the invariants")]

mod aesni;
mod keys;
mod limit;
mod vaes256;
mod vaes512;
#[cfg(test)]
mod wiping;

use cipher::array::Array;
use cipher::consts::U512;

use super::run::Run;
use super::{CpuPath, Direction};
use aesni::AesNi;
use keys::Schedules;
use vaes256::Vaes256;
use vaes512::Vaes512;

/// Proof that this CPU has a path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cpu {
    AesNi(AesNi),
    Vaes256(Vaes256),
    Vaes512(Vaes512),
}

impl Cpu {
    /// Returns `None` if the CPU lacks the path, or if the path is [`CpuPath::Portable`].
    pub(super) fn new(path: CpuPath) -> Option<Self> {
        match path {
            CpuPath::AesNi => AesNi::new().map(Self::AesNi),
            CpuPath::Vaes256 => Vaes256::new().map(Self::Vaes256),
            CpuPath::Vaes512 => Vaes512::new().map(Self::Vaes512),
            CpuPath::Portable => None,
        }
    }

    /// Returns the proof of AES-NI, which the key schedules need. Every CPU with wider registers has AES-NI, too.
    fn aesni(self) -> AesNi {
        match self {
            Self::AesNi(cpu) => cpu,
            Self::Vaes256(cpu) => cpu.aesni(),
            Self::Vaes512(cpu) => cpu.aesni(),
        }
    }
}

/// The round keys of an XTS key. All paths of this module use the same schedules.
pub(super) enum Keys {
    Aes256(Box<Schedules<15>>),
    Aes128(Box<Schedules<11>>),
}

impl Keys {
    /// Expands the two halves of an XTS key, 32 or 16 bytes each.
    pub(super) fn new(cpu: Cpu, data: &[u8], tweak: &[u8]) -> Self {
        if data.len() == 32 {
            Self::Aes256(Schedules::new(cpu.aesni(), data, tweak))
        } else {
            Self::Aes128(Schedules::new(cpu.aesni(), data, tweak))
        }
    }
}

/// Encrypts or decrypts a run.
#[inline(always)]
pub(super) fn crypt(cpu: Cpu, direction: Direction, keys: &Keys, run: Run<'_, '_>) {
    match (cpu, keys) {
        (Cpu::AesNi(cpu), Keys::Aes256(keys)) => cpu.crypt(direction, keys, run),
        (Cpu::AesNi(cpu), Keys::Aes128(keys)) => cpu.crypt(direction, keys, run),
        (Cpu::Vaes256(cpu), Keys::Aes256(keys)) => cpu.crypt(direction, keys, run),
        (Cpu::Vaes256(cpu), Keys::Aes128(keys)) => cpu.crypt(direction, keys, run),
        (Cpu::Vaes512(cpu), Keys::Aes256(keys)) => cpu.crypt(direction, keys, run),
        (Cpu::Vaes512(cpu), Keys::Aes128(keys)) => cpu.crypt(direction, keys, run),
    }
}

/// The unit that the paths work on: the smallest sector, 32 blocks. Every sector is a whole number of pieces.
type Piece = Array<u8, U512>;

/// Blocks in a [`Piece`].
const PIECE_BLOCKS: usize = 32;

/// The index that makes a byte shuffle write a zero.
const ZERO: u8 = 0x80;

/// The polynomial of GF(2¹²⁸) without its term x¹²⁸. It replaces each bit that is shifted out of a tweak.
const POLYNOMIAL: i64 = 0x87;
