//! A volume: a segment of a disk, seen through its cipher. It can be read and written at any offset and length.

mod in_flight;
mod region_lock;

use std::io;
use std::sync::Arc;

use crate::buffer::AlignedBuffer;
use crate::key::VolumeKey;
use crate::layout::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::store::{Allocation, BlockStore, Medium, ReadAt};
use crate::text::bytes;
use crate::xts::Xts;
pub use in_flight::{Ciphertext, DiskRange, Encrypting, Writing};
use region_lock::RegionLock;

/// Bytes of encrypted zeros in one write of [`Volume::write_zeroes`].
const ZERO_CHUNK: usize = 1 << 20;
/// Bytes that go through the cipher together if the disk is memory. They then stay in the CPU's cache from one step to
/// the next.
const CACHED_CHUNK: usize = 128 * 1024;
/// Bytes of whole blocks that an unaligned read takes from the disk at a time. A longer read takes no more memory than this.
const UNALIGNED_CHUNK: usize = 1 << 20;

/// Why a volume did not do what was asked.
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
    /// A write to a volume that is open read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// The error of the disk.
    #[error(transparent)]
    Store(#[from] io::Error),
}

/// Why a store and a segment do not form a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The segment reaches past the end of the disk.
    #[error("the volume's data ends at byte {needed} of the disk, which has only {}", bytes(*available))]
    DiskTooSmall {
        /// The byte after the last byte of the segment.
        needed: u64,
        /// The disk's length in bytes.
        available: u64,
    },
    /// The segment has no sector of data.
    #[error("the volume has no room for data")]
    Empty,
    /// The offset or the length of the segment is not a multiple of the block size.
    #[error("the volume's data, {len} bytes at byte {offset}, is not aligned to {block}-byte blocks")]
    Misaligned {
        /// The offset of the segment in bytes from the start of the disk.
        offset: u64,
        /// The segment's length in bytes.
        len: u64,
        /// The block size in bytes.
        block: u64,
    },
}

/// A segment of a disk, seen in plaintext.
///
/// # Concurrency contract
/// Any number of threads may call all methods at once. Requests that overlap in time and in bytes take effect in some order,
/// block by block. A write that covers only a part of a block never disturbs what another request puts into the rest of it.
///
/// # Durability contract
/// What was written before a [`Volume::flush`] began is on stable storage when the flush returns `Ok`. After a flush has
/// failed, no flush returns `Ok` until the disk is reopened.
pub struct Volume {
    store: Arc<dyn BlockStore>,
    segment: Segment,
    cipher: Option<Xts>,
    block: u64,
    regions: Arc<RegionLock>,
}

impl Volume {
    /// Returns the encrypted volume in the given segment of `store`.
    ///
    /// # Errors
    /// [`GeometryError`] if the segment does not fit the disk.
    pub fn encrypted(store: Arc<dyn BlockStore>, segment: Segment, key: &VolumeKey) -> Result<Self, GeometryError> {
        Self::with_cipher(store, segment, Xts::new(key))
    }

    /// Does what [`Volume::encrypted`] does, with a cipher whose CPU path the caller has chosen.
    ///
    /// # Errors
    /// [`GeometryError`] if the segment does not fit the disk.
    pub fn with_cipher(store: Arc<dyn BlockStore>, segment: Segment, cipher: Xts) -> Result<Self, GeometryError> {
        Self::new(store, segment, Some(cipher))
    }

    /// Returns a plaintext volume that is the whole of `store`, in blocks of `sector_size`.
    ///
    /// # Errors
    /// [`GeometryError`] if the disk is empty or its length is not a multiple of the block size.
    pub fn plaintext(store: Arc<dyn BlockStore>, sector_size: SectorSize) -> Result<Self, GeometryError> {
        let segment = Segment { offset: 0, len: store.len(), sector_size, iv_start: Lba512(0) };
        Self::new(store, segment, None)
    }

    fn new(store: Arc<dyn BlockStore>, segment: Segment, cipher: Option<Xts>) -> Result<Self, GeometryError> {
        let Segment { offset, len, sector_size, .. } = segment;
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
        Ok(Self { store, segment, cipher, block, regions: Arc::new(RegionLock::new()) })
    }

    /// Returns the length of the volume in bytes.
    pub fn len(&self) -> u64 {
        self.segment.len
    }

    /// Returns `false`: a volume has at least one sector.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the encryption unit.
    pub fn sector_size(&self) -> SectorSize {
        self.segment.sector_size
    }

    /// Returns the block size in bytes: the sector size, or the store's alignment if that is larger. A request whose offset and
    /// length are multiples of it is written without a read first.
    pub fn block_size(&self) -> u64 {
        self.block
    }

    /// Returns whether every write fails.
    pub fn is_read_only(&self) -> bool {
        self.store.is_read_only()
    }

    /// Returns whether the disk holds ciphertext.
    pub fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// Returns the disk below the volume.
    pub fn store(&self) -> &Arc<dyn BlockStore> {
        &self.store
    }

    /// Reads the plaintext at `offset` into `data`.
    ///
    /// # Errors
    /// [`VolumeError`] if the range reaches past the end of the volume or the disk fails. The contents of `data` are then
    /// unspecified.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        self.check_end_if_mapped();
        self.read_after_check(offset, data)
    }

    /// Does what [`Volume::read`] does, for a caller that has called [`Volume::check_end`] after it received the request. So a
    /// caller with many requests can check once for all of them.
    ///
    /// # Errors
    /// As [`Volume::read`].
    pub fn read_after_check(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        let disk_offset = self.locate(offset, data.len() as u64)?;
        if self.is_aligned(offset, data.len() as u64) {
            if self.decrypt_from_mapping(offset, disk_offset, data) {
                return Ok(());
            }
            let mut done = 0;
            for chunk in data.chunks_mut(self.chunk()) {
                self.store.read_at(chunk, disk_offset + done)?;
                self.decrypt(offset + done, chunk);
                done += chunk.len() as u64;
            }
            return Ok(());
        }
        let most = self.chunk().min(UNALIGNED_CHUNK) as u64;
        let mut at = self.block_floor(offset);
        let end = self.block_ceil(offset + data.len() as u64);
        let mut skip = span(offset - at)?;
        let mut blocks = AlignedBuffer::try_zeroed(span((end - at).min(most))?)?;
        let mut rest = data;
        while at < end {
            blocks.resize(span((end - at).min(most))?);
            self.store.read_at(&mut blocks, self.segment.offset + at)?;
            self.decrypt(at, &mut blocks);
            let (piece, more) = rest.split_at_mut(rest.len().min(blocks.len() - skip));
            piece.copy_from_slice(&blocks[skip..skip + piece.len()]);
            at += blocks.len() as u64;
            (rest, skip) = (more, 0);
        }
        Ok(())
    }

    /// Writes the plaintext `data` at `offset`. The buffer is encrypted in place: afterwards its contents are unspecified.
    ///
    /// # Errors
    /// [`VolumeError`] if the volume is read-only, the range reaches past its end or the disk fails. Each sector of the range
    /// then holds either old or new data, as after an error of the disk.
    pub fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        self.check_end_if_mapped();
        self.write_after_check(offset, data)
    }

    /// Does what [`Volume::write`] does, for a caller that has called [`Volume::check_end`] after it received the request.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn write_after_check(&self, offset: u64, data: &mut [u8]) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, data.len() as u64)?;
        let end = offset + data.len() as u64;
        let first_whole = self.block_ceil(offset);
        let last_whole = self.block_floor(end);
        if first_whole >= last_whole {
            // The range holds no whole block, only parts of at most two blocks.
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
            let mut at = first_whole;
            let whole = if self.encrypt_into_mapping(first_whole, whole) { &mut [] } else { whole };
            for chunk in whole.chunks_mut(self.chunk()) {
                self.encrypt_sectors(at, chunk);
                self.store.write_at(chunk, self.segment.offset + at)?;
                at += chunk.len() as u64;
            }
        }
        self.write_part(last_whole, tail)
    }

    /// Checks whether the disk is still as long as it was: see [`BlockStore::check_end`].
    pub fn check_end(&self) {
        self.store.check_end();
    }

    /// Calls [`Volume::check_end`] if the disk is mapped memory. Any other store checks its end itself: before each write,
    /// and after a read that reached the end of the file.
    fn check_end_if_mapped(&self) {
        if self.store.is_mapped() {
            self.store.check_end();
        }
    }

    /// Waits until everything that was written before is on stable storage.
    ///
    /// # Errors
    /// [`VolumeError::Store`] if the disk could not flush. Nothing written since the last successful flush is then guaranteed.
    /// If the disk is a file or a block device, every later flush fails, too: see [`FlushLatch`](crate::store::FlushLatch).
    pub fn flush(&self) -> Result<(), VolumeError> {
        if self.is_read_only() {
            return Ok(());
        }
        Ok(self.store.flush()?)
    }

    /// Discards the whole blocks in the range: their space goes back to the disk. Their contents are then unspecified. An
    /// encrypted volume usually shows what zeros decrypt to, as dm-crypt does. A disk that cannot discard stays as it is.
    ///
    /// # Errors
    /// [`VolumeError`] if the volume is read-only, the range reaches past its end or the disk fails.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        let start = self.block_ceil(offset);
        let end = self.block_floor(offset + len);
        if start >= end {
            return Ok(());
        }
        let _held = self.regions.share(start, end);
        match self.store.discard(self.segment.offset + start, end - start) {
            // A discard is a hint, which this disk cannot use.
            Err(error) if is_unsupported(&error) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Returns whether the disk has allocated the bytes from `offset` on, and up to where. A block that is allocated in part
    /// counts as allocated. A hole reads as zeros on a plaintext volume. On an encrypted volume it reads as what zeros decrypt
    /// to.
    ///
    /// # Errors
    /// [`VolumeError`] if `offset` is not before the end of the volume, or if the disk fails.
    pub fn allocation(&self, offset: u64) -> Result<Allocation, VolumeError> {
        let disk_offset = self.locate(offset, 1)?;
        let allocation = self.store.allocation(disk_offset)?;
        let end = allocation.end.saturating_sub(self.segment.offset).min(self.len());
        let whole = self.block_floor(end);
        if allocation.is_hole && whole > offset {
            return Ok(Allocation { end: whole, is_hole: true });
        }
        Ok(Allocation { end: self.block_ceil(end.max(offset + 1)), is_hole: false })
    }

    /// Tells the disk that the range will be read soon.
    ///
    /// # Errors
    /// [`VolumeError`] if the range reaches past the end of the volume or the disk fails.
    pub fn will_read(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        let disk_offset = self.locate(offset, len)?;
        Ok(self.store.will_read(disk_offset, len)?)
    }

    /// Makes the range read as zeros. With `may_discard`, the space of the range may be discarded if the range then
    /// reads as zeros. Only a plaintext volume can do this.
    ///
    /// # Errors
    /// [`VolumeError`] if the volume is read-only, the range reaches past its end or the disk fails.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_discard: bool) -> Result<(), VolumeError> {
        self.write_zeroes_while(offset, len, may_discard, &|| true)
    }

    /// Does what [`Volume::write_zeroes`] does, which can take hours on a large volume. Calls `go_on` before each mebibyte and
    /// stops if it returns `false`.
    ///
    /// # Errors
    /// As [`Volume::write_zeroes`]; [`VolumeError::Store`] of kind `Interrupted` if `go_on` returned `false`.
    pub fn write_zeroes_while(
        &self,
        offset: u64,
        len: u64,
        may_discard: bool,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        let end = offset + len;
        if may_discard && self.punch(offset, len)? {
            return Ok(());
        }
        let mut zeros = AlignedBuffer::try_zeroed(span(len.min(ZERO_CHUNK as u64))?)?;
        let mut at = offset;
        while at < end {
            if !go_on() {
                return Err(VolumeError::Store(io::ErrorKind::Interrupted.into()));
            }
            let chunk = span((end - at).min(ZERO_CHUNK as u64))?;
            zeros[..chunk].fill(0);
            self.write(at, &mut zeros[..chunk])?;
            at += chunk as u64;
        }
        Ok(())
    }

    /// Makes the range read as zeros if there is a faster way than writing zeros. Returns `false` if there is none;
    /// nothing has then changed. An encrypted volume never has a faster way, because its zeros must be written
    /// encrypted.
    ///
    /// # Errors
    /// [`VolumeError`] if the volume is read-only, the range reaches past its end or the disk fails.
    pub fn write_zeroes_fast(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        self.punch(offset, len)
    }

    /// Discards the whole blocks of a plaintext volume, which then read as zeros. Returns whether the disk could do it.
    fn punch(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        if self.is_encrypted() || !self.is_aligned(offset, len) || len == 0 {
            return Ok(false);
        }
        let _held = self.regions.share(offset, offset + len);
        match self.store.discard(self.segment.offset + offset, len) {
            Err(error) if is_unsupported(&error) => Ok(false),
            result => Ok(result.map(|()| true)?),
        }
    }

    /// Writes a piece that lies within one block. This reads the block, copies the piece into it and writes it back, while no
    /// one else writes to the block.
    fn write_part(&self, offset: u64, piece: &[u8]) -> Result<(), VolumeError> {
        if piece.is_empty() {
            return Ok(());
        }
        let start = self.block_floor(offset);
        let mut block = AlignedBuffer::try_zeroed(span(self.block)?)?;
        let disk_offset = self.segment.offset + start;
        let _held = self.regions.exclude(start);
        self.store.read_at(&mut block, disk_offset)?;
        self.decrypt(start, &mut block);
        let skip = span(offset - start)?;
        block[skip..skip + piece.len()].copy_from_slice(piece);
        self.encrypt_sectors(start, &mut block);
        Ok(self.store.write_at(&block, disk_offset)?)
    }

    /// Decrypts whole blocks from mapped memory into `data`, without a copy before the cipher. Returns `false` if that is not
    /// possible.
    fn decrypt_from_mapping(&self, offset: u64, disk_offset: u64, data: &mut [u8]) -> bool {
        let Some(cipher) = &self.cipher else { return false };
        self.store.show(disk_offset, data.len(), &mut |at, bytes| {
            let lba = self.lba(offset + at as u64);
            let plaintext = &mut data[at..at + bytes.len()];
            bytes.decrypt_to(cipher, self.segment.sector_size, lba, plaintext);
        })
    }

    /// Encrypts whole blocks into mapped memory, without a copy after the cipher. Returns `false` if that is not possible.
    fn encrypt_into_mapping(&self, offset: u64, data: &[u8]) -> bool {
        let Some(cipher) = &self.cipher else { return false };
        self.store.fill(self.segment.offset + offset, data.len(), &mut |at, bytes| {
            let lba = self.lba(offset + at as u64);
            let plaintext = &data[at..at + bytes.len()];
            bytes.encrypt_from(cipher, self.segment.sector_size, lba, plaintext);
        })
    }

    /// Returns the maximum number of bytes that one call reads or writes. There is no maximum, unless the disk is memory,
    /// where calls are cheap.
    fn chunk(&self) -> usize {
        match self.store.medium() {
            Medium::Memory | Medium::File { resident: true, .. } => CACHED_CHUNK,
            _ => usize::MAX,
        }
    }

    fn writable(&self) -> Result<(), VolumeError> {
        if self.is_read_only() { Err(VolumeError::ReadOnly) } else { Ok(()) }
    }

    fn locate(&self, offset: u64, len: u64) -> Result<u64, VolumeError> {
        self.segment.locate(offset, len).ok_or(VolumeError::OutOfRange { offset, len, end: self.segment.len })
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.block)
    }

    fn block_floor(&self, offset: u64) -> u64 {
        offset - offset % self.block
    }

    fn block_ceil(&self, offset: u64) -> u64 {
        // This does not overflow, because the end of a volume is a block boundary.
        offset.next_multiple_of(self.block)
    }

    fn encrypt_sectors(&self, offset: u64, data: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.encrypt(self.segment.sector_size, self.lba(offset), data);
        }
    }

    /// Decrypts the ciphertext of whole sectors at `offset`, for a caller that has read it from the disk itself.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(self.segment.sector_size, self.lba(offset), data);
        }
    }

    /// Returns the IV of the sector at `offset`.
    fn lba(&self, offset: u64) -> Lba512 {
        self.segment.iv_start.advanced_by(offset / LBA_UNIT)
    }
}

/// A volume's plaintext can be searched for signatures.
impl ReadAt for Volume {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(offset, data).map_err(|error| match error {
            VolumeError::Store(error) => error,
            error @ VolumeError::OutOfRange { .. } => io::Error::new(io::ErrorKind::UnexpectedEof, error),
            error @ VolumeError::ReadOnly => io::Error::new(io::ErrorKind::ReadOnlyFilesystem, error),
        })
    }
}

/// Converts a length within one request to an index. If it does not fit, this machine has no room for the buffer either.
fn span(len: u64) -> Result<usize, VolumeError> {
    usize::try_from(len).map_err(|_| VolumeError::Store(io::ErrorKind::OutOfMemory.into()))
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use std::sync::Barrier;

    use proptest::prelude::*;

    use super::*;
    use crate::store::{FaultyStore, MemoryStore, Operation};

    const DISK: usize = 64 * 1024;
    const OFFSET: u64 = 8192;

    /// Memory that takes only aligned requests, as a disk opened for direct I/O does.
    struct Strict(MemoryStore, usize);

    impl BlockStore for Strict {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn alignment(&self) -> usize {
            self.1
        }
        fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            assert!(offset.is_multiple_of(self.1 as u64) && data.len().is_multiple_of(self.1));
            self.0.read_at(data, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            assert!(offset.is_multiple_of(self.1 as u64) && data.len().is_multiple_of(self.1));
            self.0.write_at(data, offset)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            assert!((offset | len).is_multiple_of(self.1 as u64));
            self.0.discard(offset, len)
        }
    }

    fn key() -> VolumeKey {
        VolumeKey::new((0..64).collect()).unwrap()
    }

    fn segment(sector_size: SectorSize) -> Segment {
        Segment { offset: OFFSET, len: DISK as u64 - OFFSET, sector_size, iv_start: Lba512(0) }
    }

    #[test]
    fn a_long_unaligned_read_is_split_into_pieces() {
        let len = 3 * UNALIGNED_CHUNK + UNALIGNED_CHUNK / 2;
        let store = FaultyStore::new(MemoryStore::zeroed(len), |operation| match operation {
            Operation::Read(_, len) if len > UNALIGNED_CHUNK as u64 => Some(io::ErrorKind::OutOfMemory),
            _ => None,
        });
        let segment = Segment { offset: 0, len: len as u64, sector_size: SectorSize::B4096, iv_start: Lba512(0) };
        let volume = Volume::encrypted(Arc::new(store), segment, &key()).unwrap();
        let data: Vec<u8> = (0..len).map(|at| (at % 251).to_le_bytes()[0]).collect();
        volume.write(0, &mut data.clone()).unwrap();
        for (at, end) in [
            (1, len - 1),
            (0, len - 1),
            (4095, len),
            (777, 777 + UNALIGNED_CHUNK),
            (UNALIGNED_CHUNK - 1, 2 * UNALIGNED_CHUNK + 1),
        ] {
            let mut back = vec![0; end - at];
            volume.read(at as u64, &mut back).unwrap();
            assert!(back == data[at..end], "{at} to {end}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Read(u64, usize),
        Write(u64, usize, u8),
        Zero(u64, usize),
        Flush,
    }

    fn step() -> impl Strategy<Value = Step> {
        let end = DISK as u64 - OFFSET;
        let range = (0..=end).prop_flat_map(move |at| (Just(at), 0..=usize::try_from((end - at).min(20_000)).unwrap()));
        prop_oneof![
            range.clone().prop_map(|(at, len)| Step::Read(at, len)),
            (range.clone(), any::<u8>()).prop_map(|((at, len), fill)| Step::Write(at, len, fill)),
            range.prop_map(|(at, len)| Step::Zero(at, len)),
            Just(Step::Flush),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_volume_behaves_like_an_array_of_bytes(
            steps in prop::collection::vec(step(), 1..40),
            size in prop::sample::select(SectorSize::ALL.to_vec()),
            alignment in prop::sample::select(vec![1usize, 512, 4096]),
            encrypted: bool,
        ) {
            let store = Arc::new(Strict(MemoryStore::zeroed(DISK), alignment));
            let cipher = encrypted.then(|| Xts::new(&key()));
            let volume = Volume::new(store, segment(size), cipher).unwrap();
            let mut model = vec![0; DISK - OFFSET as usize];
            volume.write_zeroes(0, volume.len(), true).unwrap();
            for step in steps {
                match step {
                    Step::Read(at, len) => {
                        let mut data = vec![0; len];
                        volume.read(at, &mut data).unwrap();
                        prop_assert_eq!(&data[..], &model[at as usize..][..len]);
                    }
                    Step::Write(at, len, fill) => {
                        let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add(i as u8)).collect();
                        model[at as usize..][..len].copy_from_slice(&data);
                        volume.write(at, &mut data.clone()).unwrap();
                    }
                    Step::Zero(at, len) => {
                        model[at as usize..][..len].fill(0);
                        volume.write_zeroes(at, len as u64, true).unwrap();
                    }
                    Step::Flush => volume.flush().unwrap(),
                }
            }
            let mut all = vec![0; model.len()];
            volume.read(0, &mut all).unwrap();
            prop_assert!(all == model);
        }
    }

    #[test]
    fn concurrent_writers_of_one_sector_keep_each_others_bytes() {
        let volume =
            Volume::encrypted(Arc::new(MemoryStore::zeroed(DISK)), segment(SectorSize::B4096), &key()).unwrap();
        let writers = 8;
        let start = Barrier::new(writers);
        std::thread::scope(|scope| {
            for writer in 0..writers {
                let (volume, start) = (&volume, &start);
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..200 {
                        // Odd writers write whole blocks beside the sector. Even writers share the sector, and each
                        // writes its own piece.
                        if writer % 2 == 0 {
                            volume.write(writer as u64 * 100, &mut [writer as u8 + 1; 100]).unwrap();
                        } else {
                            volume.write(4096 * writer as u64, &mut [writer as u8 + 1; 4096]).unwrap();
                        }
                    }
                });
            }
        });
        let mut all = vec![0; 4096 * 8];
        volume.read(0, &mut all).unwrap();
        for writer in 0..writers {
            let (at, len) = if writer % 2 == 0 { (writer * 100, 100) } else { (4096 * writer, 4096) };
            assert!(all[at..at + len].iter().all(|b| *b == writer as u8 + 1), "writer {writer}");
        }
    }

    #[test]
    fn a_read_modify_write_never_undoes_a_whole_block_write() {
        let volume =
            Volume::encrypted(Arc::new(MemoryStore::zeroed(DISK)), segment(SectorSize::B4096), &key()).unwrap();
        for round in 0..200u8 {
            volume.write(0, &mut [0; 4096]).unwrap();
            let start = Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    volume.write(0, &mut [1; 4096]).unwrap();
                });
                start.wait();
                volume.write(10, &mut [2; 10]).unwrap();
            });
            let mut block = [0; 4096];
            volume.read(0, &mut block).unwrap();
            // In either order, the bytes that only the whole-block write covers keep its value.
            assert!(block[..10].iter().chain(&block[20..]).all(|b| *b == 1), "round {round}");
        }
    }

    #[test]
    fn nothing_of_the_plaintext_reaches_the_disk() {
        let store = Arc::new(MemoryStore::zeroed(DISK));
        let volume = Volume::encrypted(store.clone(), segment(SectorSize::B512), &key()).unwrap();
        let text = b"the quick brown fox jumps over the lazy dog";
        volume.write(1000, &mut text.to_vec()).unwrap();
        assert!(!store.snapshot().windows(16).any(|window| window == &text[..16]));
        assert!(store.snapshot()[..OFFSET as usize].iter().all(|b| *b == 0), "the header's room is untouched");
    }

    #[test]
    fn discarding_keeps_the_blocks_that_are_covered_in_part() {
        let volume = Volume::encrypted(Arc::new(MemoryStore::zeroed(DISK)), segment(SectorSize::B512), &key()).unwrap();
        volume.write(0, &mut [7; 4096]).unwrap();
        volume.discard(100, 1000).unwrap();
        let mut data = [0; 4096];
        volume.read(0, &mut data).unwrap();
        assert!(data[..512].iter().all(|b| *b == 7) && data[1024..].iter().all(|b| *b == 7));
        assert!(data[512..1024].iter().any(|b| *b != 7), "the whole block in it is gone");
    }

    #[test]
    fn disk_errors_are_returned_and_no_write_passes_the_end() {
        let store = FaultyStore::new(MemoryStore::zeroed(DISK), |operation| match operation {
            Operation::Read(..) => Some(io::ErrorKind::TimedOut),
            Operation::Write(..) => panic!("out of range, yet written"),
            _ => None,
        });
        let volume = Volume::encrypted(Arc::new(store), segment(SectorSize::B512), &key()).unwrap();
        let error = volume.read(0, &mut [0; 512]).unwrap_err();
        assert!(matches!(error, VolumeError::Store(error) if error.kind() == io::ErrorKind::TimedOut));
        let end = volume.len();
        assert!(matches!(volume.write(end - 1, &mut [0; 2]), Err(VolumeError::OutOfRange { .. })));
        assert!(matches!(volume.write_zeroes(u64::MAX, 1, false), Err(VolumeError::OutOfRange { .. })));
    }

    #[test]
    fn a_segment_that_does_not_fit_its_disk_is_refused() {
        let open = |segment| Volume::encrypted(Arc::new(MemoryStore::zeroed(DISK)), segment, &key()).err();
        let whole = segment(SectorSize::B4096);
        assert_eq!(
            open(Segment { len: whole.len + 4096, ..whole }),
            Some(GeometryError::DiskTooSmall { needed: DISK as u64 + 4096, available: DISK as u64 })
        );
        assert_eq!(open(Segment { len: 0, ..whole }), Some(GeometryError::Empty));
        assert!(matches!(open(Segment { offset: 512, len: 4096, ..whole }), Some(GeometryError::Misaligned { .. })));
        assert!(matches!(open(Segment { offset: u64::MAX, ..whole }), Some(GeometryError::DiskTooSmall { .. })));
    }

    /// Reads, writes, discards and zeros on a mapped disk, compared with the same disk without a mapping.
    #[test]
    fn a_mapped_disk_behaves_like_any_other() {
        use crate::store::{Access, BusErrorsCaught, Caching, FileStore};
        const LEN: u64 = 4 << 20;
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(OFFSET + LEN).unwrap();
        let open = || FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
        let key = VolumeKey::new((0..64).collect()).unwrap();
        for sector_size in [SectorSize::B512, SectorSize::B4096] {
            let segment = Segment { offset: OFFSET, len: LEN, sector_size, iv_start: Lba512(7) };
            let volume = |store| Volume::encrypted(Arc::new(store), segment, &key).unwrap();
            let store = open().mapped(BusErrorsCaught::new().unwrap());
            assert!(store.is_mapped());
            let (mapped, other) = (volume(store), volume(open()));
            let mut seed = 1u64;
            let mut random = |below: u64| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed % below
            };
            for step in 0..400 {
                let unit = [1, 512, 4096, 65536][random(4) as usize];
                let offset = random(LEN / unit) * unit;
                let len = (1 + random(8)) * unit * if step % 20 == 0 { 16 } else { 1 };
                let len = len.min(LEN - offset);
                match random(8) {
                    0 => mapped.discard(offset, len).unwrap(),
                    1 => mapped.write_zeroes(offset, len, true).unwrap(),
                    2..5 => {
                        let data: Vec<u8> = (0..len).map(|at| (at * 7 + step) as u8).collect();
                        mapped.write(offset, &mut data.clone()).unwrap();
                        let mut back = vec![0; len as usize];
                        other.read(offset, &mut back).unwrap();
                        assert!(back == data, "written at {offset}, {len} bytes, step {step}");
                    }
                    _ => {
                        let (mut one, mut two) = (vec![1; len as usize], vec![2; len as usize]);
                        mapped.read(offset, &mut one).unwrap();
                        other.read(offset, &mut two).unwrap();
                        assert!(one == two, "read at {offset}, {len} bytes, step {step}");
                    }
                }
            }
        }
    }
}
