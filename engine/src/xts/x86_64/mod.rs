//! The paths for x86-64, by the width of the registers that the AES instructions work on.
//!
//! This is a room with `unsafe` in it: Rust asks for it where a function compiled for an instruction set is called
//! from code that is not, and where a vector is loaded from or stored to memory. Who calls into an instruction set
//! shows a value ([`AesNi`], [`Vaes256`], [`Vaes512`]) that only a run-time check makes;
//! within it all functions are safe `#[target_feature]` functions.
//!
//! All paths work on [`Piece`]s, the 512 bytes of the smallest sector, and share the keys.
#![allow(unsafe_code, reason = "intrinsics; see above for the invariants")]

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
    /// `None` when the CPU does not have the path, or the path is none of those here.
    pub(super) fn new(path: CpuPath) -> Option<Self> {
        match path {
            CpuPath::AesNi => AesNi::new().map(Self::AesNi),
            CpuPath::Vaes256 => Vaes256::new().map(Self::Vaes256),
            CpuPath::Vaes512 => Vaes512::new().map(Self::Vaes512),
            CpuPath::Portable => None,
        }
    }

    /// Every CPU that has wider registers has AES-NI too, which the key schedules need.
    fn aesni(self) -> AesNi {
        match self {
            Self::AesNi(cpu) => cpu,
            Self::Vaes256(cpu) => cpu.aesni(),
            Self::Vaes512(cpu) => cpu.aesni(),
        }
    }
}

/// The round keys of an XTS key, the same for all paths here.
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

/// What the kernels work on: the smallest sector, 32 blocks. Every sector is a whole number of them.
type Piece = Array<u8, U512>;

/// Blocks in a [`Piece`].
const PIECE_BLOCKS: usize = 32;

/// A byte shuffle that leaves a zero.
const ZERO: u8 = 0x80;

/// The polynomial of GF(2¹²⁸) less its x¹²⁸: what a bit shifted out of a tweak is replaced by.
const POLYNOMIAL: i64 = 0x87;
