//! Requests whose disk I/O somebody else carries out: an io_uring, whose completion comes later.
//!
//! The volume says which bytes of the disk belong to a request and does the cipher's part, before a write and after a
//! read; between the two, the caller moves the bytes. That is for requests on whole blocks alone, which need no more
//! than one read or write each; the others go through [`Volume::read`] and [`Volume::write`].

use super::region_lock::Shared;
use super::{Volume, VolumeError};

/// Where a request's bytes lie on the disk, all in one stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The first byte, counted from the disk's start; a multiple of the store's alignment.
    pub offset: u64,
    /// How many bytes; a multiple of the store's alignment.
    pub len: u64,
}

/// A write that is under way: keep it until the disk has answered. Meanwhile nobody reads, modifies and writes back what
/// lies around it.
#[must_use = "the write is protected only as long as this lives"]
pub struct Writing {
    _regions: Shared,
}

impl Volume {
    /// Where on the disk the request's bytes lie, or `None` if it does not cover whole blocks.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`].
    pub fn place(&self, offset: u64, len: u64) -> Result<Option<Place>, VolumeError> {
        let place = self.locate(offset, len)?;
        Ok((self.is_aligned(offset, len) && len > 0).then_some(Place { offset: place, len }))
    }

    /// Turns what was read from [`Volume::place`] of `offset` into plaintext. `data` begins there and has whole sectors.
    pub fn after_read(&self, offset: u64, data: &mut [u8]) {
        self.decrypt(offset, data);
    }

    /// Turns plaintext into what is to be written to [`Volume::place`] of `offset`. `data` has whole sectors, which may be
    /// a part of the request's: a payload can be encrypted while the rest of it arrives.
    pub fn before_write(&self, offset: u64, data: &mut [u8]) {
        self.encrypt(offset, data);
    }

    /// Whether [`Volume::write`] encrypts whole blocks to where they are to lie: then to encrypt a payload before is a
    /// detour.
    pub fn encrypts_to_its_place(&self) -> bool {
        self.is_encrypted() && self.store.is_mapped()
    }

    /// Protects a write to whole blocks that the caller is about to begin. `None` if somebody is at work there who must
    /// be waited for: then [`Volume::write_encrypted`] does the waiting.
    ///
    /// # Errors
    /// [`VolumeError::ReadOnly`].
    pub fn begin_write(&self, offset: u64, len: u64) -> Result<Option<Writing>, VolumeError> {
        self.writable()?;
        Ok(self.regions.try_share(offset, offset + len).map(|regions| Writing { _regions: regions }))
    }

    /// Writes what [`Volume::before_write`] made to whole blocks at `offset`. Blocks.
    ///
    /// # Errors
    /// [`VolumeError`]; what the range holds is then either old or new, sector by sector, as after a disk's own error.
    pub fn write_encrypted(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.writable()?;
        let place = self.locate(offset, data.len() as u64)?;
        let _held = self.regions.share(offset, offset + data.len() as u64);
        Ok(self.store.write_at(data, place)?)
    }
}
