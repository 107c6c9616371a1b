//! The LUKS on-disk formats: turns header bytes into keys, and keys into header bytes.
//!
//! ```text
//!   read ─► LockedVolume ─► unlock(passphrase) ─► UnlockedVolume { key, segment }
//!
//!   luks2::begin(passphrase, key) ─► PendingFormat { key, segment } ─► commit ─► a volume
//!                                                                   └► abandon ─► a blank disk
//! ```
//!
//! Headers are untrusted input. A header is parsed once, into a type that holds only valid values. [`Limits`] bounds the
//! work that it may ask for.

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
mod opening;
pub mod plain;
mod remaining;
mod repair;
mod uuid;

use std::io;

use ::uuid::Uuid;

use opening::Keyslots;

pub use backup::Backup;
pub use disks::{DataDisk, Disks};
pub use error::{KeyslotFault, LuksError, Others, Unsupported};
pub use format::{PendingFormat, abandon_unfinished, is_abandoned};
pub use hash::HashAlgorithm;
pub use keys::{NewKey, read_for_keys};
pub use limits::Limits;
pub use repair::{Repair, repair, repair_from};
pub use uuid::HeaderUuid;

use crate::key::{Passphrase, VolumeKey};
use crate::layout::Segment;
use crate::sector::SectorSize;
use crate::store::BlockStore;
use crate::text::printable;

/// Fills a buffer with unpredictable bytes. Outside tests they come from the operating system.
pub type Random<'a> = &'a mut dyn FnMut(&mut [u8]) -> io::Result<()>;

/// A volume whose header has been read and is valid. It contains no secret.
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
    /// The key that encrypts the data.
    pub key: VolumeKey,
    /// Where the data lies.
    pub segment: Segment,
    /// The number of the keyslot that opened, from 0.
    pub keyslot: usize,
}

/// The contents of a header, without secrets. nbdcrypt may not support its cipher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dump {
    /// The header of a LUKS1 volume.
    Luks1(Box<luks1::Header>),
    /// The header of a LUKS2 volume.
    Luks2(Box<luks2::Header>),
}

/// Reads the header of the volume on `store` in order to show it.
///
/// # Errors
/// [`LuksError`] if there is no header or it is corrupt.
pub fn dump(store: &dyn BlockStore) -> Result<Dump, LuksError> {
    match luks1::read_header(store) {
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            luks2::read_header(store).map(|header| Dump::Luks2(Box::new(header)))
        }
        header => header.map(|header| Dump::Luks1(Box::new(header))),
    }
}

impl Dump {
    /// Returns the text that `cryptsetup luksDump` prints for a disk named `disk`, with the name of the encryption added.
    pub fn display(&self, disk: &str) -> String {
        match self {
            Self::Luks1(header) => header.display(disk).to_string(),
            Self::Luks2(header) => header.display().to_string(),
        }
    }

    /// Returns the name of the encryption: AES-256-XTS for a key of 512 bits, AES-128-XTS for 256 bits. Returns `None` if
    /// nbdcrypt does not support the cipher.
    pub fn encryption(&self) -> Option<&'static str> {
        match self {
            Self::Luks1(header) => header.encryption(),
            Self::Luks2(header) => header.encryption(),
        }
    }
}

/// Reads the header of the volume on `disks`, which is one store or [`Disks::detached`].
///
/// # Errors
/// [`LuksError`] if there is no header, if it is corrupt, or if it asks for too much work or for something that nbdcrypt
/// does not support.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<LockedVolume, LuksError> {
    let disks = disks.into();
    match luks1::read(disks, limits) {
        // A LUKS2 volume whose first header is lost may still have its second header.
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            luks2::read(disks, limits).map(|volume| LockedVolume::Luks2(Box::new(volume)))
        }
        volume => volume.map(|volume| LockedVolume::Luks1(Box::new(volume))),
    }
}

impl LockedVolume {
    /// Tries the passphrase on the keyslots, in their order. `store` is the disk that holds the header.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`] or [`LuksError::WrongPassphraseBesideIgnored`] if the passphrase opens no keyslot.
    /// [`LuksError::Keyslot`] and others if it opens no keyslot and not all keyslots could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        match self {
            Self::Luks1(volume) => volume.unlock(store, passphrase),
            Self::Luks2(volume) => volume.unlock(store, passphrase),
        }
    }

    /// Returns the keyslots, which open in the same way in both formats.
    fn format(&self) -> &dyn Keyslots {
        match self {
            Self::Luks1(volume) => &**volume,
            Self::Luks2(volume) => &**volume,
        }
    }

    /// Returns where the data lies.
    pub fn segment(&self) -> Segment {
        self.format().lock().segment
    }

    /// Returns the UUID that the volume was given when it was formatted.
    pub fn uuid(&self) -> &HeaderUuid {
        match self {
            Self::Luks1(volume) => &volume.header().uuid,
            Self::Luks2(volume) => &volume.header().binary.uuid,
        }
    }

    /// Returns the length of the volume key in bits, with both halves counted: 512 for AES-256-XTS, 256 for AES-128-XTS.
    pub fn key_bits(&self) -> usize {
        self.format().lock().key_len * 8
    }
}

/// The format of a new volume and its options.
#[derive(Clone, Debug)]
pub enum FormatOptions {
    /// A LUKS1 volume.
    Luks1(luks1::Options),
    /// A LUKS2 volume.
    Luks2(Box<luks2::Options>),
}

impl FormatOptions {
    /// Begins to format `disks`. [`PendingFormat`] says what must follow.
    ///
    /// # Errors
    /// See [`luks1::begin`] and [`luks2::begin`].
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

    /// Returns the length in bytes of a detached header, for a volume key of `key_len` bytes.
    pub fn header_len(&self, key_len: usize) -> u64 {
        match self {
            Self::Luks1(_) => luks1::header_len(key_len),
            Self::Luks2(options) => options.layout.header_len(),
        }
    }

    /// Fails if `disks` are too small for this volume with a key of `key_len` bytes. Reads and writes nothing.
    ///
    /// # Errors
    /// [`LuksError::TooSmall`], and [`LuksError::Impossible`] if the options contradict each other.
    pub fn check_room<'d>(&self, disks: impl Into<Disks<'d>>, key_len: usize) -> Result<(), LuksError> {
        let disks = disks.into();
        let (offset, sector_size) = match self {
            Self::Luks1(options) => (luks1::data_offset(options, key_len, disks.is_detached())?, SectorSize::B512),
            Self::Luks2(options) => (luks2::data_offset(options, key_len, &disks)?, options.sector_size),
        };
        let (needed, available) = (luks1::header_len(key_len), disks.header().len());
        if matches!(self, Self::Luks1(_)) && needed > available {
            return Err(LuksError::TooSmall { needed, available });
        }
        format::segment_from(&disks, offset, sector_size).map(drop)
    }

    /// Returns `LUKS1` or `LUKS2`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Luks1(_) => "LUKS1",
            Self::Luks2(_) => "LUKS2",
        }
    }

    /// Returns the UUID of the new volume.
    pub fn uuid(&self) -> Uuid {
        match self {
            Self::Luks1(options) => options.uuid,
            Self::Luks2(options) => options.uuid,
        }
    }
}

/// Makes a new AES-XTS key of [`VolumeKey::AES_256`] or [`VolumeKey::AES_128`] bytes.
///
/// # Errors
/// [`LuksError::Random`] if `random` fails.
pub fn new_volume_key(len: usize, random: Random<'_>) -> Result<VolumeKey, LuksError> {
    let mut bytes = vec![0; len];
    random(&mut bytes).map_err(LuksError::Random)?;
    Ok(VolumeKey::new(bytes)?)
}
