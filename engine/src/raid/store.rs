//! An array's disks as one disk.

use std::io;
use std::sync::Arc;

use super::superblock::Superblock;
use super::{Array, ArrayError, Found, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET};
use crate::layout::{Piece, Striped};
use crate::store::{Allocation, BlockStore, MappedBytes, MappedBytesMut, Medium, read_unaligned, write_unaligned};

/// Chunks that [`StripedStore::allocation`] looks at in one call at most: 32 GiB of the usual size.
const LOOKED_AT: usize = 65536;
/// The largest sector of an encrypted volume. If the data starts at a multiple of it, no sector is cut by what the members do in
/// pieces.
const SECTOR: u64 = 4096;

/// Reads what a disk says about the array that it belongs to.
///
/// # Errors
/// The error of the disk.
pub fn read_member(disk: &dyn BlockStore) -> io::Result<Found> {
    let mut bytes = [0; SUPERBLOCK_LEN];
    if disk.len() >= SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64 {
        read_unaligned(disk, &mut bytes, SUPERBLOCK_OFFSET)?;
    }
    Ok(Found { disk_len: disk.len(), alignment: disk.alignment() as u64, superblock: Superblock::parse(&bytes) })
}

/// Writes a member's superblock. It is durable after the next flush of the disk.
///
/// # Errors
/// The error of the disk.
pub fn write_member(disk: &dyn BlockStore, superblock: &Superblock) -> io::Result<()> {
    write_unaligned(disk, &superblock.to_bytes(), SUPERBLOCK_OFFSET)
}

/// The data of an array. A request that covers several chunks goes to the members one after the other.
pub struct StripedStore {
    map: Striped,
    /// The members in the order of their roles.
    members: Vec<Arc<dyn BlockStore>>,
    /// Every member is mapped, and no sector is cut by the pieces in which members are shown.
    is_mapped: bool,
}

/// Why disks cannot be opened as an array.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A disk could not be read.
    #[error("its md superblock could not be read")]
    Read {
        /// The disk's place in the list.
        disk: usize,
        /// The error of the disk.
        source: io::Error,
    },
    /// The disks do not form one array.
    #[error(transparent)]
    Array(#[from] ArrayError),
}

impl StripedStore {
    /// Opens the array that the disks form, in whatever order they are given.
    ///
    /// # Errors
    /// [`OpenError`] says which disk cannot be read or does not fit, or what is missing.
    pub fn open(disks: &[Arc<dyn BlockStore>]) -> Result<(Array, Self), OpenError> {
        let mut found = Vec::with_capacity(disks.len());
        for (disk, store) in disks.iter().enumerate() {
            found.push(read_member(&**store).map_err(|source| OpenError::Read { disk, source })?);
        }
        let array = Array::assemble(&found)?;
        let members = array.disks.iter().filter_map(|disk| disks.get(*disk).map(Arc::clone)).collect();
        let store = Self::over(array.map.clone(), members);
        Ok((array, store))
    }

    pub(super) fn over(map: Striped, members: Vec<Arc<dyn BlockStore>>) -> Self {
        let keeps_sectors = map.members().iter().all(|member| member.offset.is_multiple_of(SECTOR));
        let is_mapped = keeps_sectors && members.iter().all(|member| member.is_mapped());
        Self { map, members, is_mapped }
    }

    /// Returns the map of the array.
    pub fn map(&self) -> &Striped {
        &self.map
    }

    /// Returns the members in the order of their roles.
    pub fn members(&self) -> &[Arc<dyn BlockStore>] {
        &self.members
    }

    /// Calls `each` with each piece of the range, its member, and where the piece starts within the range.
    fn for_pieces(
        &self,
        offset: u64,
        len: usize,
        mut each: impl FnMut(&dyn BlockStore, Piece, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        self.is_within(offset, len as u64)?;
        let mut done = 0;
        for piece in self.map.pieces(offset, len as u64) {
            each(&*self.members[piece.member], piece, done)?;
            done += span(piece)?;
        }
        Ok(())
    }

    /// Calls `each` with what the range covers of each member.
    fn for_extents(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&dyn BlockStore, Piece) -> io::Result<()>,
    ) -> io::Result<()> {
        self.is_within(offset, len)?;
        self.map.extents(offset, len).into_iter().try_for_each(|extent| each(&*self.members[extent.member], extent))
    }

    fn is_within(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len).is_some_and(|end| end <= self.map.len()) {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl BlockStore for StripedStore {
    fn len(&self) -> u64 {
        self.map.len()
    }

    fn alignment(&self) -> usize {
        self.members.iter().map(|member| member.alignment()).max().unwrap_or(1)
    }

    fn buffered(&self) -> io::Result<Option<Arc<dyn BlockStore>>> {
        // A member without a page cache must be known before another member leaves direct I/O.
        if !self.members.iter().all(|member| matches!(member.medium(), Medium::File { .. })) {
            return Ok(None);
        }
        let members: io::Result<Option<Vec<_>>> = self.members.iter().map(|member| member.buffered()).collect();
        Ok(members?.map(|members| Arc::new(Self::over(self.map.clone(), members)) as Arc<dyn BlockStore>))
    }

    fn is_read_only(&self) -> bool {
        self.members.iter().any(|member| member.is_read_only())
    }

    fn medium(&self) -> Medium<'_> {
        let is_memory = |member: &Arc<dyn BlockStore>| {
            matches!(member.medium(), Medium::Memory | Medium::File { resident: true, .. })
        };
        if self.members.iter().all(is_memory) { Medium::Memory } else { Medium::Other }
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.for_pieces(offset, data.len(), |member, piece, at| {
            member.read_at(&mut data[at..at + span(piece)?], piece.offset)
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.for_pieces(offset, data.len(), |member, piece, at| {
            member.write_at(&data[at..at + span(piece)?], piece.offset)
        })
    }

    fn check_end(&self) {
        self.members.iter().for_each(|member| member.check_end());
    }

    fn check_within(&self, offset: u64, len: u64) -> io::Result<()> {
        self.for_extents(offset, len, |member, extent| member.check_within(extent.offset, extent.len))
    }

    fn is_mapped(&self) -> bool {
        self.is_mapped
    }

    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytes<'_>)) -> bool {
        if !self.is_mapped {
            return false;
        }
        let shown = self.for_pieces(offset, len, |member, piece, at| {
            match member.show(piece.offset, span(piece)?, &mut |within, bytes| each(at + within, bytes)) {
                true => Ok(()),
                false => Err(io::ErrorKind::Unsupported.into()),
            }
        });
        shown.is_ok()
    }

    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytesMut<'_>)) -> bool {
        if !self.is_mapped {
            return false;
        }
        let filled = self.for_pieces(offset, len, |member, piece, at| {
            match member.fill(piece.offset, span(piece)?, &mut |within, bytes| each(at + within, bytes)) {
                true => Ok(()),
                false => Err(io::ErrorKind::Unsupported.into()),
            }
        });
        filled.is_ok()
    }

    /// Flushes every member, even if one of them fails.
    fn flush(&self) -> io::Result<()> {
        let outcomes: Vec<io::Result<()>> = self.members.iter().map(|member| member.flush()).collect();
        outcomes.into_iter().collect()
    }

    fn flush_failure(&self) -> Option<String> {
        self.members.iter().find_map(|member| member.flush_failure())
    }

    /// Discards the range on every member, even if one of them cannot.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut outcome = Ok(());
        self.for_extents(offset, len, |member, extent| {
            let discarded = member.discard(extent.offset, extent.len);
            let is_worse = discarded.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Unsupported);
            if discarded.is_err() && (is_worse || outcome.is_ok()) {
                outcome = discarded;
            }
            Ok(())
        })?;
        outcome
    }

    fn discards_quickly(&self) -> bool {
        self.members.iter().all(|member| member.discards_quickly())
    }

    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        // What each member said last. A member is asked again only after the end of its range.
        let mut last: Vec<Option<Allocation>> = vec![None; self.members.len()];
        let mut found: Option<Allocation> = None;
        for piece in self.map.pieces(offset, u64::MAX).take(LOOKED_AT) {
            let here = match last[piece.member].filter(|last| last.end > piece.offset) {
                Some(here) => here,
                None => match (self.members[piece.member].allocation(piece.offset), found) {
                    (Ok(here), _) => here,
                    // What was found before the error is right.
                    (Err(_), Some(found)) => return Ok(found),
                    (Err(error), None) => return Err(error),
                },
            };
            last[piece.member] = Some(here);
            let len = here.end.saturating_sub(piece.offset).min(piece.len);
            let end = found.map_or(offset, |found| found.end) + len;
            match found {
                Some(found) if found.is_hole != here.is_hole => return Ok(found),
                _ => found = Some(Allocation { end, is_hole: here.is_hole }),
            }
            if len < piece.len {
                break;
            }
        }
        found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        self.for_extents(offset, len, |member, extent| member.will_read(extent.offset, extent.len))
    }
}

/// Returns the length of a piece as an index.
fn span(piece: Piece) -> io::Result<usize> {
    usize::try_from(piece.len).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::raid::NewArray;
    use crate::store::{FaultyStore, MemoryStore, Operation};

    const CHUNK: u64 = 4096;
    const DATA: u64 = 1 << 20;

    /// Makes an array of disks with room for these numbers of chunks, and opens it.
    fn array(chunks: &[u64]) -> (StripedStore, Vec<Arc<MemoryStore>>) {
        let disks: Vec<_> =
            chunks.iter().map(|count| Arc::new(MemoryStore::zeroed((DATA + count * CHUNK) as usize))).collect();
        let shared: Vec<Arc<dyn BlockStore>> = disks.iter().map(|disk| Arc::clone(disk) as _).collect();
        (made(&shared), disks)
    }

    fn made(disks: &[Arc<dyn BlockStore>]) -> StripedStore {
        let members = disks.iter().zip(1..).map(|(disk, n)| (disk.len(), Uuid::from_u128(n))).collect();
        let new = NewArray { uuid: Uuid::from_u128(9), name: "host:it".into(), now: 1, chunk: CHUNK, members };
        for (disk, superblock) in disks.iter().zip(new.superblocks().unwrap()) {
            write_member(&**disk, &superblock).unwrap();
        }
        StripedStore::open(disks).unwrap().1
    }

    #[test]
    fn every_member_is_flushed_even_if_one_fails() {
        let flushes = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let disk = |fails: bool| {
            let flushes = Arc::clone(&flushes);
            let store = FaultyStore::new(MemoryStore::zeroed((DATA + 4 * CHUNK) as usize), move |operation| {
                if operation != Operation::Flush {
                    return None;
                }
                flushes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                fails.then_some(io::ErrorKind::StorageFull)
            });
            Arc::new(store) as Arc<dyn BlockStore>
        };
        let store = made(&[disk(true), disk(false), disk(true)]);
        assert_eq!(store.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(flushes.load(std::sync::atomic::Ordering::Relaxed), 3);
    }

    #[test]
    fn every_member_is_discarded_even_if_one_cannot() {
        let disk = |kind: Option<io::ErrorKind>| {
            let memory = MemoryStore::from(vec![7; (DATA + 4 * CHUNK) as usize]);
            let store = FaultyStore::new(memory, move |operation| match operation {
                Operation::Discard(..) => kind,
                _ => None,
            });
            Arc::new(store)
        };
        let kinds = [Some(io::ErrorKind::Unsupported), None, Some(io::ErrorKind::StorageFull), None];
        let disks = kinds.map(disk);
        let shared = disks.clone().map(|disk| disk as Arc<dyn BlockStore>);
        let store = made(&shared);
        assert_eq!(store.discard(0, store.len()).unwrap_err().kind(), io::ErrorKind::StorageFull);
        let kept = disks.map(|disk| disk.inner().snapshot()[DATA as usize..].contains(&7));
        assert_eq!(kept, [true, false, true, false]);
        let store = made(&shared[..2]);
        assert_eq!(store.discard(0, store.len()).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    /// A member in which the first half of the data is a hole. It counts how often it is asked.
    struct HalfHole(MemoryStore, std::sync::atomic::AtomicU32);

    impl BlockStore for HalfHole {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_at(data, offset)
        }
        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_at(data, offset)
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn allocation(&self, offset: u64) -> io::Result<Allocation> {
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let half = DATA + (self.len() - DATA) / 2;
            match offset < half {
                true => Ok(Allocation { end: half, is_hole: true }),
                false => Ok(Allocation { end: self.len(), is_hole: false }),
            }
        }
    }

    #[test]
    fn holes_are_joined_over_chunks_and_each_member_is_asked_once() {
        let disk = || Arc::new(HalfHole(MemoryStore::zeroed((DATA + 64 * CHUNK) as usize), 0.into()));
        let disks = [disk(), disk()];
        let store = made(&disks.clone().map(|disk| disk as Arc<dyn BlockStore>));
        assert_eq!(store.allocation(5).unwrap(), Allocation { end: 64 * CHUNK, is_hole: true });
        assert_eq!(store.allocation(64 * CHUNK).unwrap(), Allocation { end: 128 * CHUNK, is_hole: false });
        let asked: u32 = disks.iter().map(|disk| disk.1.load(std::sync::atomic::Ordering::Relaxed)).sum();
        assert!(asked <= 5, "{asked}");
    }

    #[test]
    fn a_mapped_array_is_read_and_written_in_place_if_no_sector_is_cut() {
        use crate::key::VolumeKey;
        use crate::layout::Segment;
        use crate::sector::{Lba512, SectorSize};
        use crate::store::{Access, BusErrorsCaught, Caching, FileStore};
        use crate::volume::Volume;

        for shift in [0, 512] {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let disks: Vec<Arc<dyn BlockStore>> = (0..3)
                .map(|n| {
                    let path = folder.path().join(n.to_string());
                    std::fs::File::create(&path).unwrap().set_len(DATA + (3 << 20)).unwrap();
                    let proof = BusErrorsCaught::new().unwrap();
                    let store = FileStore::open(&path, Access::ReadWrite, Caching::PageCache).unwrap();
                    Arc::new(store.mapped(proof)) as Arc<dyn BlockStore>
                })
                .collect();
            made(&disks);
            for disk in &disks {
                let mut superblock = read_member(&**disk).unwrap().superblock.unwrap();
                (superblock.chunk, superblock.data_offset) = (512 << 10, DATA + shift);
                superblock.data_len -= shift;
                write_member(&**disk, &superblock).unwrap();
            }
            let store = Arc::new(StripedStore::open(&disks).unwrap().1);
            assert_eq!(store.is_mapped(), shift == 0);
            let segment = Segment { offset: 0, len: store.len(), sector_size: SectorSize::B4096, iv_start: Lba512(0) };
            let key = VolumeKey::new((0..64).collect()).unwrap();
            let volume = Volume::encrypted(Arc::clone(&store) as _, segment, &key).unwrap();
            let plaintext: Vec<u8> = (0..store.len() / 8).flat_map(u64::to_le_bytes).collect();
            volume.write(0, &mut plaintext.clone()).unwrap();
            let mut read = vec![0; plaintext.len()];
            volume.read(0, &mut read).unwrap();
            assert!(read == plaintext);
            store.read_at(&mut read, 0).unwrap();
            assert!(read != plaintext);
        }
    }

    #[test]
    fn a_small_disk_has_no_superblock() {
        let found = read_member(&MemoryStore::zeroed(8191)).unwrap();
        assert_eq!(found.superblock, Err(crate::raid::SuperblockError::Absent));
    }

    #[test]
    fn nothing_reaches_past_the_end() {
        let (store, _) = array(&[2, 3]);
        assert_eq!(store.len(), 5 * CHUNK);
        for (offset, len) in [(5 * CHUNK, 1), (4 * CHUNK, CHUNK + 1), (u64::MAX, 2)] {
            assert_eq!(
                store.read_at(&mut vec![0; len as usize], offset).unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof
            );
            assert_eq!(
                store.write_at(&vec![0; len as usize], offset).unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof
            );
            assert!(store.discard(offset, len).is_err() && store.check_within(offset, len).is_err());
        }
        store.allocation(5 * CHUNK).unwrap_err();
    }

    proptest! {
        /// What is written is read, and it lies where the map says: the members' data, put together, is the array.
        #[test]
        fn the_array_is_a_disk(
            chunks in prop::collection::vec(2u64..7, 1..5),
            writes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let (store, disks) = array(&chunks);
            let mut model = vec![0; store.len() as usize];
            for (from, to, byte) in writes {
                let (a, b) = (from.index(model.len() + 1), to.index(model.len() + 1));
                let range = a.min(b)..a.max(b);
                if byte % 5 == 0 {
                    store.discard(range.start as u64, range.len() as u64).unwrap();
                    model[range].fill(0);
                } else {
                    store.write_at(&vec![byte; range.len()], range.start as u64).unwrap();
                    model[range].fill(byte);
                }
            }
            let mut read = vec![1; model.len()];
            store.read_at(&mut read, 0).unwrap();
            prop_assert!(read == model);
            let snapshots: Vec<Vec<u8>> = disks.iter().map(|disk| disk.snapshot()).collect();
            let mut at = 0;
            for piece in store.map().pieces(0, u64::MAX) {
                let on_member = piece.offset as usize..(piece.offset + piece.len) as usize;
                prop_assert!(snapshots[piece.member][on_member.clone()] == model[at..at + on_member.len()]);
                at += on_member.len();
            }
            prop_assert_eq!(store.allocation(0).unwrap(), Allocation { end: store.len(), is_hole: false });
        }
    }
}
