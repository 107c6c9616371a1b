//! What the benches share: who is measured, and how.
//!
//! How to measure, and what the figures mean: README.md beside this crate's manifest.

pub mod measure;
#[cfg(feature = "peers")]
mod peers;
pub mod report;

use engine::key::VolumeKey;
use engine::sector::{Lba512, SectorSize};
use engine::xts::{CpuPath, Xts};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

impl Op {
    /// `encrypt` or `decrypt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
        }
    }
}

/// Someone who does AES-256-XTS on a run of sectors in place, as a block device needs it: each sector with a tweak of its
/// own, the key set up beforehand.
pub trait Contestant {
    /// A name for tables.
    fn name(&self) -> String;

    /// Encrypts or decrypts `data`, whose first sector lies at `first`.
    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]);
}

/// The key that everybody uses: 64 bytes without meaning.
pub fn key_bytes() -> [u8; VolumeKey::AES_256] {
    std::array::from_fn(|i| u8::try_from(i * 37 % 251).unwrap_or_default())
}

/// This project's paths on this CPU, widest first.
///
/// # Panics
/// Never: the key is one.
pub fn ours() -> Vec<Ours> {
    #[expect(clippy::unwrap_used, reason = "two different halves of 32 bytes, and a path that is available")]
    CpuPath::available()
        .map(|path| Ours(Xts::with_path(&VolumeKey::new(key_bytes().to_vec()).unwrap(), path).unwrap()))
        .collect()
}

/// The others; none unless this was built with the feature `peers`.
pub fn peers() -> Vec<Box<dyn Contestant>> {
    #[cfg(feature = "peers")]
    return peers::all();
    #[cfg(not(feature = "peers"))]
    Vec::new()
}

/// One of this project's paths.
pub struct Ours(Xts);

impl Ours {
    /// Which one.
    pub fn path(&self) -> CpuPath {
        self.0.path()
    }
}

impl Contestant for Ours {
    fn name(&self) -> String {
        format!("nbdcrypt {}", self.path())
    }

    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        match op {
            Op::Encrypt => self.0.encrypt(sector_size, first, data),
            Op::Decrypt => self.0.decrypt(sector_size, first, data),
        }
    }
}
