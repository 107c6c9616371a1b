//! `nbdcrypt-bench xts`: AES-256-XTS compared with other libraries and with the limit of the AES units.

mod compare;
mod measure;
#[cfg(feature = "peers")]
mod peers;
mod report;

pub use compare::{Args, run};

use engine::key::VolumeKey;
use engine::sector::{Lba512, SectorSize};
use engine::xts::{CpuPath, Xts};

/// The operation that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

impl Op {
    /// Returns `encrypt` or `decrypt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
        }
    }
}

/// An implementation of AES-256-XTS as a block device needs it. It works in place on a run of sectors, and each sector has
/// its own tweak. The key is set up beforehand.
pub trait Contestant {
    /// Returns the contestant's name for tables.
    fn name(&self) -> String;

    /// Encrypts or decrypts `data`, whose first sector lies at `first`.
    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]);
}

/// Returns the key that all contestants use: 64 bytes without meaning.
pub fn key_bytes() -> [u8; VolumeKey::AES_256] {
    std::array::from_fn(|i| u8::try_from(i * 37 % 251).unwrap_or_default())
}

/// Returns this project's paths that this CPU has, the widest first.
///
/// # Panics
/// Never: the key is valid and the paths are available.
pub fn ours() -> Vec<Ours> {
    #[expect(clippy::unwrap_used, reason = "the key has two different halves of 32 bytes, and the path is available")]
    CpuPath::available()
        .map(|path| Ours(Xts::with_path(&VolumeKey::new(key_bytes().to_vec()).unwrap(), path).unwrap()))
        .collect()
}

/// Returns the other libraries, or none if this was built without the feature `peers`.
pub fn peers() -> Vec<Box<dyn Contestant>> {
    #[cfg(feature = "peers")]
    return peers::all();
    #[cfg(not(feature = "peers"))]
    Vec::new()
}

/// One of this project's paths.
pub struct Ours(Xts);

impl Ours {
    /// Returns the path.
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
