//! A volume: a stretch of a disk, seen through its cipher. Any offset and length can be read and written.

mod in_flight;
mod region_lock;

use std::io;
use std::sync::Arc;

use crate::buffer::AlignedBuffer;
use crate::key::VolumeKey;
use crate::layout::Linear;
use crate::luks::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::signature::ReadAt;
use crate::store::{Allocation, BlockStore, Medium};
use crate::xts::Xts;
pub use in_flight::{Place, Writing};
use region_lock::RegionLock;

/// Bytes of encrypted zeros that one write of [`Volume::write_zeroes`] carries.
const ZERO_CHUNK: usize = 1 << 20;
/// Bytes that go through the cipher together where the disk is memory: what is still in the CPU's cache from the one
/// step when the next one comes to it.
const CACHED_CHUNK: usize = 128 * 1024;
/// Bytes in whole blocks that a read of anything else is cut out of at a time: it takes no more memory than this, however
/// long it is.
const DETOUR: usize = 1 << 20;

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
    regions: Arc<RegionLock>,
}

impl Volume {
    /// The encrypted volume that `segment` of `store` holds.
    ///
    /// # Errors
    /// [`GeometryError`] when the segment does not fit the disk.
    pub fn encrypted(store: Arc<dyn BlockStore>, segment: Segment, key: &VolumeKey) -> Result<Self, GeometryError> {
        Self::with_cipher(store, segment, Xts::new(key))
    }

    /// The same, with a cipher whose CPU path the caller chose.
    ///
    /// # Errors
    /// [`GeometryError`] when the segment does not fit the disk.
    pub fn with_cipher(store: Arc<dyn BlockStore>, segment: Segment, cipher: Xts) -> Result<Self, GeometryError> {
        Self::new(store, segment, Some(cipher))
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
        Ok(Self { store, layout, cipher, sector_size, iv_start, block, regions: Arc::new(RegionLock::new()) })
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
            if self.decrypt_from_its_place(offset, place, data) {
                return Ok(());
            }
            let mut done = 0;
            for chunk in data.chunks_mut(self.chunk()) {
                self.store.read_at(chunk, place + done)?;
                self.decrypt(offset + done, chunk);
                done += chunk.len() as u64;
            }
            return Ok(());
        }
        let most = self.chunk().min(DETOUR) as u64;
        let mut at = self.block_floor(offset);
        let end = self.block_ceil(offset + data.len() as u64);
        let mut skip = span(offset - at)?;
        let mut blocks = AlignedBuffer::zeroed(span((end - at).min(most))?);
        let mut rest = data;
        while at < end {
            blocks.resize(span((end - at).min(most))?);
            self.store.read_at(&mut blocks, self.layout.offset + at)?;
            self.decrypt(at, &mut blocks);
            let (piece, more) = rest.split_at_mut(rest.len().min(blocks.len() - skip));
            piece.copy_from_slice(&blocks[skip..skip + piece.len()]);
            at += blocks.len() as u64;
            (rest, skip) = (more, 0);
        }
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
            let mut at = first_whole;
            let whole = if self.encrypt_to_its_place(first_whole, whole) { &mut [] } else { whole };
            for chunk in whole.chunks_mut(self.chunk()) {
                self.encrypt(at, chunk);
                self.store.write_at(chunk, self.layout.offset + at)?;
                at += chunk.len() as u64;
            }
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

    /// What the disk keeps from `offset`, which is before the end, on. Blocks that it keeps in part count as kept. A hole
    /// reads as zeros on a plaintext volume; an encrypted one shows what zeros decrypt to.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn allocation(&self, offset: u64) -> Result<Allocation, VolumeError> {
        let place = self.locate(offset, 1)?;
        let told = self.store.allocation(place)?;
        let end = told.end.saturating_sub(self.layout.offset).min(self.len());
        let whole = self.block_floor(end);
        if told.is_hole && whole > offset {
            return Ok(Allocation { end: whole, is_hole: true });
        }
        Ok(Allocation { end: self.block_ceil(end.max(offset + 1)), is_hole: false })
    }

    /// Says that the range will be read soon.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn will_read(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        let place = self.locate(offset, len)?;
        Ok(self.store.will_read(place, len)?)
    }

    /// Makes the range read as zeros. `may_discard` allows to give the space back where it then reads as zeros, which
    /// it does on a plaintext volume alone.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn write_zeroes(&self, offset: u64, len: u64, may_discard: bool) -> Result<(), VolumeError> {
        self.write_zeroes_while(offset, len, may_discard, &|| true)
    }

    /// The same, which on a large volume can take hours: asks before each mebibyte whether to `go_on`.
    ///
    /// # Errors
    /// [`VolumeError`]; of kind `Interrupted` when it was not to go on.
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
        let mut zeros = AlignedBuffer::zeroed(span(len.min(ZERO_CHUNK as u64))?);
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

    /// Makes the range read as zeros if that takes less than writing them, and tells whether it did; else nothing is
    /// changed. Under a cipher it never does: there, zeros must be written encrypted.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn write_zeroes_fast(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        self.writable()?;
        self.locate(offset, len)?;
        self.punch(offset, len)
    }

    /// Gives back the space of a plaintext volume's whole blocks, which then read as zeros; whether that could be done.
    fn punch(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        if self.is_encrypted() || !self.is_aligned(offset, len) || len == 0 {
            return Ok(false);
        }
        let _held = self.regions.share(offset, offset + len);
        match self.store.discard(self.layout.offset + offset, len) {
            Err(error) if is_unsupported(&error) => Ok(false),
            result => Ok(result.map(|()| true)?),
        }
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

    /// Decrypts whole blocks from where they lie into `data`, if they lie in memory: no copy comes before the cipher.
    fn decrypt_from_its_place(&self, offset: u64, place: u64, data: &mut [u8]) -> bool {
        let Some(cipher) = &self.cipher else { return false };
        self.store.show(place, data.len(), &mut |at, bytes| {
            let lba = self.lba(offset + at as u64);
            cipher.decrypt_to(self.sector_size, lba, bytes, &mut data[at..at + bytes.len()]);
        })
    }

    /// Encrypts whole blocks to where they are to lie, if they lie in memory: no copy comes after the cipher.
    fn encrypt_to_its_place(&self, offset: u64, data: &[u8]) -> bool {
        let Some(cipher) = &self.cipher else { return false };
        self.store.fill(self.layout.offset + offset, data.len(), &mut |at, bytes| {
            let lba = self.lba(offset + at as u64);
            cipher.encrypt_to(self.sector_size, lba, &data[at..at + bytes.len()], bytes);
        })
    }

    /// How many bytes are read or written with one call: all of them, where calls are dear.
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
            cipher.encrypt(self.sector_size, self.lba(offset), data);
        }
    }

    fn decrypt(&self, offset: u64, data: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(self.sector_size, self.lba(offset), data);
        }
    }

    /// Where the cipher counts the sector at `offset`.
    fn lba(&self, offset: u64) -> Lba512 {
        self.iv_start.advanced_by(offset / LBA_UNIT)
    }
}

/// Its plaintext can be probed for what it holds.
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

/// A length within one request as an index; a request that this machine cannot address has no buffer either.
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
    fn a_long_read_of_no_whole_blocks_is_made_in_pieces() {
        let len = 3 * DETOUR + DETOUR / 2;
        let store = FaultyStore::new(MemoryStore::zeroed(len), |operation| match operation {
            Operation::Read(_, len) if len > DETOUR as u64 => Some(io::ErrorKind::OutOfMemory),
            _ => None,
        });
        let segment = Segment { offset: 0, len: len as u64, sector_size: SectorSize::B4096, iv_start: Lba512(0) };
        let volume = Volume::encrypted(Arc::new(store), segment, &key()).unwrap();
        let data: Vec<u8> = (0..len).map(|at| (at % 251).to_le_bytes()[0]).collect();
        volume.write(0, &mut data.clone()).unwrap();
        for (at, end) in [(1, len - 1), (0, len - 1), (4095, len), (777, 777 + DETOUR), (DETOUR - 1, 2 * DETOUR + 1)] {
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
        let place = (0..=end).prop_flat_map(move |at| (Just(at), 0..=usize::try_from((end - at).min(20_000)).unwrap()));
        prop_oneof![
            place.clone().prop_map(|(at, len)| Step::Read(at, len)),
            (place.clone(), any::<u8>()).prop_map(|((at, len), fill)| Step::Write(at, len, fill)),
            place.prop_map(|(at, len)| Step::Zero(at, len)),
            Just(Step::Flush),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_volume_answers_as_a_plain_array_of_bytes_does(
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
    fn writers_of_one_sector_at_once_lose_nothing_of_each_other() {
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
                        // Every other one writes whole blocks beside the sector that the rest share pieces of.
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
    fn a_whole_block_write_is_never_undone_by_a_neighbours_read_modify_write() {
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
            // In either order, the bytes that only the whole-block write covers are its own.
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
    fn a_disk_error_is_the_callers_and_a_range_past_the_end_never_reaches_the_disk() {
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
    fn a_segment_that_does_not_fit_its_disk_is_no_volume() {
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

    /// Reads, writes, holes and zeros on a disk that is mapped, beside the same bytes without a mapping.
    #[test]
    fn a_mapped_disk_is_like_any_other() {
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
