//! AES-XTS over runs of sectors, as IEEE 1619 and NIST SP 800-38E define it and dm-crypt's `xts-plain64` uses it.
//!
//! Each sector is one data unit. Its tweak is the sector's [`Lba512`] as a 16-byte little-endian number, encrypted with
//! the second key. Block `j` of the sector is masked with `tweak · α^j` in GF(2¹²⁸) before and after AES with the first
//! key.
//!
//! Nothing here allocates after [`Xts::new`]. How long a call takes depends on neither the key nor the data.
//!
//! Round keys lie on the heap and are wiped on drop. Tweaks and masks lie on the stack and are wiped before a call returns.
//! SECURITY.md, "How far wiping goes", names the limits of this.

mod cpu;
mod portable;
mod run;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fmt;

use cipher::inout::InOutBuf;

use crate::key::VolumeKey;
use crate::sector::{Lba512, SectorSize};
use run::Run;

pub use cpu::{CpuPath, UnavailableCpuPath, UnknownCpuPath};

/// An expanded volume key. The key's length decides between AES-256-XTS and AES-128-XTS. The round keys are wiped on drop.
pub struct Xts {
    keys: Keys,
    path: CpuPath,
    key_bits: usize,
    large_sectors: bool,
}

impl Xts {
    /// Expands the key for the widest path that this CPU has.
    pub fn new(key: &VolumeKey) -> Self {
        Self::from_bytes(key.expose(), CpuPath::best()).unwrap_or_else(|_| unreachable!("the best path is available"))
    }

    /// Expands the key for the given path. Tests and benchmarks use this to choose the path.
    ///
    /// # Errors
    /// [`UnavailableCpuPath`] if this CPU lacks the path.
    pub fn with_path(key: &VolumeKey, path: CpuPath) -> Result<Self, UnavailableCpuPath> {
        Self::from_bytes(key.expose(), path)
    }

    /// Counts the IV in whole sectors instead of 512-byte units, as dm-crypt's `iv_large_sectors` does. The first sector must
    /// then lie on a multiple of the sector size. LUKS volumes never use this.
    #[must_use]
    pub fn with_large_sectors(self) -> Self {
        Self { large_sectors: true, ..self }
    }

    /// Encrypts `data` in place. `data` is a run of whole sectors and may start at any address. Its first sector lies at
    /// `first`. The IV counts 512-byte units and wraps at 2⁶⁴.
    ///
    /// # Panics
    /// Panics if `data` is not a whole number of sectors.
    pub fn encrypt(&self, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        self.run(Direction::Encrypt, Run::new(sector_size, first.into(), data.into()));
    }

    /// Decrypts `data` in place. This is the inverse of [`Xts::encrypt`].
    ///
    /// # Panics
    /// Panics if `data` is not a whole number of sectors.
    pub fn decrypt(&self, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        self.run(Direction::Decrypt, Run::new(sector_size, first.into(), data.into()));
    }

    /// Encrypts `plaintext` into `ciphertext`. This saves a copy if the caller may not change the plaintext, or if the
    /// ciphertext belongs elsewhere.
    ///
    /// # Panics
    /// Panics if the lengths differ or are not a whole number of sectors.
    pub fn encrypt_to(&self, sector_size: SectorSize, first: Lba512, plaintext: &[u8], ciphertext: &mut [u8]) {
        self.run(Direction::Encrypt, Run::new(sector_size, first.into(), pair(plaintext, ciphertext)));
    }

    /// Decrypts `ciphertext` into `plaintext`. This is the inverse of [`Xts::encrypt_to`].
    ///
    /// # Panics
    /// Panics if the lengths differ or are not a whole number of sectors.
    pub fn decrypt_to(&self, sector_size: SectorSize, first: Lba512, ciphertext: &[u8], plaintext: &mut [u8]) {
        self.run(Direction::Decrypt, Run::new(sector_size, first.into(), pair(ciphertext, plaintext)));
    }

    /// Does what [`Xts::encrypt_to`] does, for memory that may not be a slice.
    pub(crate) fn encrypt_between(&self, sector_size: SectorSize, first: Lba512, data: InOutBuf<'_, '_, u8>) {
        self.run(Direction::Encrypt, Run::new(sector_size, first.into(), data));
    }

    /// Does what [`Xts::decrypt_to`] does, for memory that may not be a slice.
    pub(crate) fn decrypt_between(&self, sector_size: SectorSize, first: Lba512, data: InOutBuf<'_, '_, u8>) {
        self.run(Direction::Decrypt, Run::new(sector_size, first.into(), data));
    }

    /// Returns the length of the volume key in bits, with both halves counted: 512 or 256.
    pub fn key_bits(&self) -> usize {
        self.key_bits
    }

    /// Returns the path in use.
    pub fn path(&self) -> CpuPath {
        self.path
    }

    /// Expands the bytes of an XTS key. [`VolumeKey`] has checked them; a test vector may have equal halves.
    fn from_bytes(key: &[u8], path: CpuPath) -> Result<Self, UnavailableCpuPath> {
        let keys = Keys::new(key, path).ok_or(UnavailableCpuPath(path))?;
        Ok(Self { keys, path, key_bits: key.len() * 8, large_sectors: false })
    }

    #[inline(always)]
    fn run(&self, direction: Direction, run: Run<'_, '_>) {
        let run = if self.large_sectors { run.numbered_by_sectors() } else { run };
        match &self.keys {
            #[cfg(target_arch = "x86_64")]
            Keys::X86(cpu, keys) => x86_64::crypt(*cpu, direction, keys, run),
            Keys::Portable(keys) => keys.crypt(direction, run),
        }
    }
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Xts({} bits, {})", self.key_bits, self.path)
    }
}

/// Round keys in the form that a path uses.
enum Keys {
    #[cfg(target_arch = "x86_64")]
    X86(x86_64::Cpu, x86_64::Keys),
    Portable(portable::Keys),
}

impl Keys {
    /// Returns `None` if this CPU lacks the path.
    fn new(key: &[u8], path: CpuPath) -> Option<Self> {
        let (data, tweak) = key.split_at(key.len() / 2);
        if path == CpuPath::Portable {
            return Some(Self::Portable(portable::Keys::new(data, tweak)));
        }
        #[cfg(target_arch = "x86_64")]
        return x86_64::Cpu::new(path).map(|cpu| Self::X86(cpu, x86_64::Keys::new(cpu, data, tweak)));
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// What the data half of the key does. The tweak half always encrypts.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Encrypt,
    Decrypt,
}

fn pair<'i, 'o>(from: &'i [u8], to: &'o mut [u8]) -> InOutBuf<'i, 'o, u8> {
    let lengths = (from.len(), to.len());
    InOutBuf::new(from, to).unwrap_or_else(|_| panic!("{} bytes do not fit into {}", lengths.0, lengths.1))
}
