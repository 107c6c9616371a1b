//! A volume: a stretch of a disk, seen through its cipher. Any offset and length can be read and written.

mod region_lock;

use std::io;
use std::sync::Arc;

use crate::buffer::AlignedBuffer;
use crate::key::VolumeKey;
use crate::layout::Linear;
use crate::luks::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::store::BlockStore;
use crate::xts::Xts;
use region_lock::RegionLock;

/// Bytes of encrypted zeros that one write of [`Volume::write_zeroes`] carries.
const ZERO_CHUNK: usize = 1 << 20;

/// Why a volume did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Some of the range lies past the volume's end.
    #[error("{len} bytes at {offset} reach past the volume's end at {end}")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// The volume's length in bytes.
        end: u64,
    },
    /// A write to a volume that is open for reading alone.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// What the disk said.
    #[error(transparent)]
    Store(#[from] io::Error),
}

/// Why a store and a segment make no volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The segment reaches past the end of the disk.
    #[error("the volume's data ends at byte {needed} of the disk, which has only {available}")]
    DiskTooSmall {
        /// The byte after the segment's last one.
        needed: u64,
        /// The disk's length in bytes.
        available: u64,
    },
    /// There is no whole sector of data.
    #[error("the volume has no room for data")]
    Empty,
    /// The offset or length of the segment is no multiple of its block size.
    #[error("the volume's data, {len} bytes at byte {offset}, does not lie on {block}-byte blocks")]
    Misaligned {
        /// Bytes from the disk's start.
        offset: u64,
        /// The segment's length in bytes.
        len: u64,
        /// The block size in bytes.
        block: u64,
    },
}

/// A disk's segment, seen in plaintext.
///
/// # Concurrency contract
/// All methods may be called from any number of threads at once. Requests that overlap in time and in bytes take effect
/// in some order, block by block; a write that covers part of a block only never disturbs what another puts into
/// the rest of it.
///
/// # Durability contract
/// What was written before a [`Volume::flush`] began is on stable storage when it returns `Ok`.
pub struct Volume {
    store: Arc<dyn BlockStore>,
    layout: Linear,
    cipher: Option<Xts>,
    sector_size: SectorSize,
    iv_start: Lba512,
    block: u64,
    regions: RegionLock,
}

impl Volume {
    /// The encrypted volume that `segment` of `store` holds.
    ///
    /// # Errors
    /// [`GeometryError`] when the segment does not fit the disk.
    pub fn encrypted(store: Arc<dyn BlockStore>, segment: Segment, key: &VolumeKey) -> Result<Self, GeometryError> {
        Self::new(store, segment, Some(Xts::new(key)))
    }

    /// The whole of `store`, as it is, in blocks of `sector_size`.
    ///
    /// # Errors
    /// [`GeometryError`] when the disk's length is no multiple of the sector size.
    pub fn plaintext(store: Arc<dyn BlockStore>, sector_size: SectorSize) -> Result<Self, GeometryError> {
        let segment = Segment { offset: 0, len: store.len(), sector_size, iv_start: Lba512(0) };
        Self::new(store, segment, None)
    }

    fn new(store: Arc<dyn BlockStore>, segment: Segment, cipher: Option<Xts>) -> Result<Self, GeometryError> {
        let Segment { offset, len, sector_size, iv_start } = segment;
        let needed = offset.saturating_add(len);
        if needed > store.len() {
            return Err(GeometryError::DiskTooSmall { needed, available: store.len() });
        }
        if len == 0 {
            return Err(GeometryError::Empty);
        }
        let block = sector_size.bytes_u64().max(store.alignment() as u64);
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(GeometryError::Misaligned { offset, len, block });
        }
        let layout = Linear { offset, len };
        Ok(Self { store, layout, cipher, sector_size, iv_start, block, regions: RegionLock::new() })
    }

    /// The volume's length in bytes.
    pub fn len(&self) -> u64 {
        self.layout.len
    }

    /// Never: a volume has at least one sector.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The encryption unit.
    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    /// Requests whose offset and length are multiples of so many bytes are served without reading first. It is the
    /// sector size, or the disk's logical block size where that is larger.
    pub fn block_size(&self) -> u64 {
        self.block
    }

    /// Whether every write fails.
    pub fn is_read_only(&self) -> bool {
        self.store.is_read_only()
    }

    /// Whether the disk holds ciphertext.
    pub fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// The disk beneath.
    pub fn store(&self) -> &Arc<dyn BlockStore> {
        &self.store
    }

    /// Fills `data` with the plaintext at `offset`.
    ///
    /// # Errors
    /// [`VolumeError`]; `data` then holds nothing of meaning.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        let place = self.locate(offset, data.len() as u64)?;
        if self.is_aligned(offset, data.len() as u64) {
            self.store.read_at(data, place)?;
            self.decrypt(offset, data);
            return Ok(());
        }
        let start = self.block_floor(offset);
        let end = self.block_ceil(offset + data.len() as u64);
        let mut blocks = AlignedBuffer::zeroed(span(end - start)?);
        self.store.read_at(&mut blocks, self.layout.offset + start)?;
        self.decrypt(start, &mut blocks);
        let skip = span(offset - start)?;
        data.copy_from_slice(&blocks[skip..skip + data.len()]);
        Ok(())
    }

    /// Writes the plaintext `data` at `offset`. It is encrypted where it stands: afterwards the buffer holds ciphertext,
    /// or nothing of meaning.
    ///
    /// # Errors
    /// [`VolumeError`]; what the range holds is then either old or new, sector by sector, as after a disk's own error.
    pub fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, data.len() as u64)?;
        let end = offset + data.len() as u64;
        let first_whole = self.block_ceil(offset);
        let last_whole = self.block_floor(end);
        if first_whole >= last_whole {
            // No whole block in it: at most two pieces of blocks.
            let cut = first_whole.clamp(offset, end);
            let (head, tail) = data.split_at_mut(span(cut - offset)?);
            self.write_part(offset, head)?;
            return self.write_part(cut, tail);
        }
        let (head, rest) = data.split_at_mut(span(first_whole - offset)?);
        let (whole, tail) = rest.split_at_mut(span(last_whole - first_whole)?);
        self.write_part(offset, head)?;
        {
            let _held = self.regions.share(first_whole, last_whole);
            self.encrypt(first_whole, whole);
            self.store.write_at(whole, self.layout.offset + first_whole)?;
        }
        self.write_part(last_whole, tail)
    }

    /// Returns when all that was written before is on stable storage.
    ///
    /// # Errors
    /// [`VolumeError::Store`]; then nothing since the last successful flush is promised.
    pub fn flush(&self) -> Result<(), VolumeError> {
        if self.is_read_only() {
            return Ok(());
        }
        Ok(self.store.flush()?)
    }

    /// Gives the space of the whole blocks in the range back to the disk. They then read as anything: an encrypted
    /// volume shows what zeros decrypt to, as dm-crypt's does. A disk that cannot discard is left as it is.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        let start = self.block_ceil(offset);
        let end = self.block_floor(offset + len);
        if start >= end {
            return Ok(());
        }
        let _held = self.regions.share(start, end);
        match self.store.discard(self.layout.offset + start, end - start) {
            // A hint that the disk has no use for.
            Err(error) if is_unsupported(&error) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Whether [`Volume::write_zeroes`] can be faster than writing: never under a cipher, where zeros must be written
    /// encrypted.
    pub fn zeroes_fast(&self) -> bool {
        !self.is_encrypted()
    }

    /// Makes the range read as zeros. `may_discard` allows to give the space back where it then reads as zeros, which
    /// it does on a plaintext volume alone.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn write_zeroes(&self, offset: u64, len: u64, may_discard: bool) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        let end = offset + len;
        if may_discard && !self.is_encrypted() && self.is_aligned(offset, len) && len > 0 {
            let _held = self.regions.share(offset, end);
            match self.store.discard(self.layout.offset + offset, len) {
                Err(error) if is_unsupported(&error) => {}
                result => return Ok(result?),
            }
        }
        let mut zeros = AlignedBuffer::zeroed(span(len.min(ZERO_CHUNK as u64))?);
        let mut at = offset;
        while at < end {
            let chunk = span((end - at).min(ZERO_CHUNK as u64))?;
            zeros[..chunk].fill(0);
            self.write(at, &mut zeros[..chunk])?;
            at += chunk as u64;
        }
        Ok(())
    }

    /// Writes a piece that lies within one block: reads the block, lays the piece into it, and writes it back while
    /// nobody else writes there.
    fn write_part(&self, offset: u64, piece: &[u8]) -> Result<(), VolumeError> {
        if piece.is_empty() {
            return Ok(());
        }
        let start = self.block_floor(offset);
        let mut block = AlignedBuffer::zeroed(span(self.block)?);
        let place = self.layout.offset + start;
        let _held = self.regions.exclude(start);
        self.store.read_at(&mut block, place)?;
        self.decrypt(start, &mut block);
        let skip = span(offset - start)?;
        block[skip..skip + piece.len()].copy_from_slice(piece);
        self.encrypt(start, &mut block);
        Ok(self.store.write_at(&block, place)?)
    }

    fn writable(&self) -> Result<(), VolumeError> {
        if self.is_read_only() { Err(VolumeError::ReadOnly) } else { Ok(()) }
    }

    fn locate(&self, offset: u64, len: u64) -> Result<u64, VolumeError> {
        self.layout.locate(offset, len).ok_or(VolumeError::OutOfRange { offset, len, end: self.layout.len })
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.block)
    }

    fn block_floor(&self, offset: u64) -> u64 {
        offset - offset % self.block
    }

    fn block_ceil(&self, offset: u64) -> u64 {
        // No overflow: the end of a volume is a block boundary.
        offset.next_multiple_of(self.block)
    }

    fn encrypt(&self, offset: u64, data: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.encrypt(self.sector_size, self.iv_start.advanced_by(offset / LBA_UNIT), data);
        }
    }

    fn decrypt(&self, offset: u64, data: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(self.sector_size, self.iv_start.advanced_by(offset / LBA_UNIT), data);
        }
    }
}

/// A length within one request as an index; a request that this machine cannot address has no buffer either.
fn span(len: u64) -> Result<usize, VolumeError> {
    usize::try_from(len).map_err(|_| VolumeError::Store(io::ErrorKind::OutOfMemory.into()))
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}
