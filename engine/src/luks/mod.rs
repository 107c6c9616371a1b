//! The LUKS on-disk formats: header bytes to keys, and keys to header bytes.
//!
//! ```text
//!   read ─► LockedVolume ─► unlock(passphrase) ─► UnlockedVolume { key, segment }
//!
//!   luks2::begin(passphrase, key) ─► PendingFormat { key, segment } ─► commit ─► a volume
//!                                                                   └► abandon ─► a blank disk
//! ```
//!
//! What is read is untrusted: a header is parsed once, into a type that cannot be wrong, and what it asks for is bounded
//! by [`Limits`].

mod af;
mod backup;
mod disks;
mod error;
mod format;
mod hash;
mod hex;
pub mod kdf;
mod keys;
mod keyslot;
mod limits;
pub mod luks1;
pub mod luks2;
pub mod plain;
mod repair;

use std::io;

use uuid::Uuid;

pub use backup::Backup;
pub use disks::{DataDisk, Disks};
pub use error::{KeyslotFault, LuksError};
pub use format::{PendingFormat, abandon_unfinished};
pub use hash::HashAlgorithm;
pub use keys::{NewKey, read_for_keys};
pub use limits::Limits;
pub use repair::{Repair, repair};

use crate::key::{Passphrase, VolumeKey};
use crate::sector::{Lba512, SectorSize};
use crate::store::BlockStore;

/// Where a volume's data lies on its disk, and how it is encrypted there: what a LUKS header says beside the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the data's disk to the first encrypted sector.
    pub offset: u64,
    /// The length of the data in bytes.
    pub len: u64,
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// The IV of the first sector.
    pub iv_start: Lba512,
}

/// Fills a buffer with bytes that nobody can guess: the operating system's, outside tests.
pub type Random<'a> = &'a mut dyn FnMut(&mut [u8]) -> io::Result<()>;

/// A volume whose header has been read and found in order. No secret is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LockedVolume {
    /// A LUKS1 volume.
    Luks1(Box<luks1::Locked>),
    /// A LUKS2 volume.
    Luks2(Box<luks2::Locked>),
}

/// A volume with its key.
#[derive(Debug)]
pub struct UnlockedVolume {
    /// What encrypts the data.
    pub key: VolumeKey,
    /// Where the data lies.
    pub segment: Segment,
    /// The keyslot that opened, from 0.
    pub keyslot: usize,
}

/// A header's text, for people: what a terminal would obey is shown by its number.
fn printable(text: &str) -> String {
    let shown = |letter: char| match letter.is_control() {
        true => letter.escape_unicode().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(shown).collect()
}

/// What a header says, with nothing secret in it. Its cipher may be one that nbdcrypt does not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dump {
    /// The header of a LUKS1 volume.
    Luks1(Box<luks1::Header>),
    /// The header of a LUKS2 volume.
    Luks2(Box<luks2::Header>),
}

/// Reads the header of the volume on `store`, to be shown.
///
/// # Errors
/// [`LuksError`] when there is none, or it is corrupt.
pub fn dump(store: &dyn BlockStore) -> Result<Dump, LuksError> {
    match luks1::read_header(store) {
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            luks2::read_header(store).map(|header| Dump::Luks2(Box::new(header)))
        }
        header => header.map(|header| Dump::Luks1(Box::new(header))),
    }
}

impl Dump {
    /// The text that `cryptsetup luksDump` prints for the disk of that name, and the name of the encryption.
    pub fn display(&self, disk: &str) -> String {
        match self {
            Self::Luks1(header) => header.display(disk).to_string(),
            Self::Luks2(header) => header.display().to_string(),
        }
    }

    /// What the encryption is called: AES-256-XTS, or AES-128-XTS where the key has 256 bits; `None` where nbdcrypt does
    /// not do it.
    pub fn encryption(&self) -> Option<&'static str> {
        match self {
            Self::Luks1(header) => header.encryption(),
            Self::Luks2(header) => header.encryption(),
        }
    }
}

/// Reads the header of the volume on `disks`: one store, or [`Disks::detached`].
///
/// # Errors
/// [`LuksError`] when there is none, or it is corrupt, or asks for what nbdcrypt does not do or for too much work.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<LockedVolume, LuksError> {
    let disks = disks.into();
    match luks1::read(disks, limits) {
        // Without its first header, it may still have its second.
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            luks2::read(disks, limits).map(|volume| LockedVolume::Luks2(Box::new(volume)))
        }
        volume => volume.map(|volume| LockedVolume::Luks1(Box::new(volume))),
    }
}

impl LockedVolume {
    /// Tries the passphrase on the keyslots, in their order. `store` is the header's disk.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`] or [`LuksError::WrongPassphraseBesideIgnored`] when it opens none of them;
    /// [`LuksError::DamagedKeyslot`],
    /// [`LuksError::UnreadableKeyslot`] and others when it opens none, and not all could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        match self {
            Self::Luks1(volume) => volume.unlock(store, passphrase),
            Self::Luks2(volume) => volume.unlock(store, passphrase),
        }
    }

    /// Where the data lies.
    pub fn segment(&self) -> Segment {
        match self {
            Self::Luks1(volume) => volume.segment(),
            Self::Luks2(volume) => volume.segment(),
        }
    }

    /// The UUID that the volume was given when it was formatted.
    pub fn uuid(&self) -> Uuid {
        match self {
            Self::Luks1(volume) => volume.header().uuid,
            Self::Luks2(volume) => volume.header().binary.uuid,
        }
    }

    /// The length of the volume's key in bits, both halves counted: 512 is AES-256-XTS, 256 is AES-128-XTS.
    pub fn key_bits(&self) -> usize {
        match self {
            Self::Luks1(volume) => volume.key_bits(),
            Self::Luks2(volume) => volume.key_bits(),
        }
    }
}

/// What a new volume shall be.
#[derive(Clone, Debug)]
pub enum FormatOptions {
    /// A LUKS1 volume.
    Luks1(luks1::Options),
    /// A LUKS2 volume.
    Luks2(Box<luks2::Options>),
}

impl FormatOptions {
    /// Begins to format `disks`: see [`PendingFormat`] for what must follow.
    ///
    /// # Errors
    /// As [`luks1::begin`] and [`luks2::begin`] have them.
    pub fn begin<'d>(
        &self,
        disks: impl Into<Disks<'d>>,
        passphrase: &Passphrase,
        key: VolumeKey,
        random: Random<'_>,
    ) -> Result<PendingFormat, LuksError> {
        match self {
            Self::Luks1(options) => luks1::begin(disks, options, passphrase, key, random),
            Self::Luks2(options) => luks2::begin(disks, options, passphrase, key, random),
        }
    }

    /// Bytes that a detached header takes, for a volume key of `key_len` bytes.
    pub fn header_len(&self, key_len: usize) -> u64 {
        match self {
            Self::Luks1(_) => luks1::header_len(key_len),
            Self::Luks2(options) => options.layout.header_len(),
        }
    }

    /// `LUKS1` or `LUKS2`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Luks1(_) => "LUKS1",
            Self::Luks2(_) => "LUKS2",
        }
    }

    /// What the volume will be called by.
    pub fn uuid(&self) -> Uuid {
        match self {
            Self::Luks1(options) => options.uuid,
            Self::Luks2(options) => options.uuid,
        }
    }
}

/// A new key for AES-XTS, of [`VolumeKey::AES_256`] or [`VolumeKey::AES_128`] bytes.
///
/// # Errors
/// What the source of randomness said.
pub fn new_volume_key(len: usize, random: Random<'_>) -> Result<VolumeKey, LuksError> {
    let mut bytes = vec![0; len];
    random(&mut bytes).map_err(LuksError::Random)?;
    Ok(VolumeKey::new(bytes)?)
}
