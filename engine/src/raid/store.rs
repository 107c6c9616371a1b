//! An array's disks as one disk.

use std::io;
use std::sync::Arc;

use super::superblock::Superblock;
use super::{Array, Found, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET};
use crate::layout::{Piece, Striped};
use crate::store::{Allocation, BlockStore, MappedBytes, MappedBytesMut, Medium, read_unaligned, write_unaligned};

/// Chunks that [`StripedStore::allocation`] looks at in one call at most.
const LOOKED_AT: usize = 1024;

/// Reads what a disk says about the array that it belongs to.
///
/// # Errors
/// The error of the disk.
pub fn read_member(disk: &dyn BlockStore) -> io::Result<Found> {
    let mut bytes = [0; SUPERBLOCK_LEN];
    if disk.len() >= SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64 {
        read_unaligned(disk, &mut bytes, SUPERBLOCK_OFFSET)?;
    }
    Ok(Found { disk_len: disk.len(), superblock: Superblock::parse(&bytes) })
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
}

impl StripedStore {
    /// Returns the data of the array whose disks were given to [`Array::assemble`], in the same order.
    ///
    /// # Panics
    /// Panics if there are fewer disks than the array has members.
    pub fn new(array: &Array, disks: &[Arc<dyn BlockStore>]) -> Self {
        Self { map: array.map.clone(), members: array.disks.iter().map(|disk| Arc::clone(&disks[*disk])).collect() }
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
        let mut members = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let Some(member) = member.buffered()? else { return Ok(None) };
            members.push(member);
        }
        Ok(Some(Arc::new(Self { map: self.map.clone(), members })))
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
        self.members.iter().all(|member| member.is_mapped())
    }

    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytes<'_>)) -> bool {
        let shown = self.for_pieces(offset, len, |member, piece, at| {
            match member.show(piece.offset, span(piece)?, &mut |within, bytes| each(at + within, bytes)) {
                true => Ok(()),
                false => Err(io::ErrorKind::Unsupported.into()),
            }
        });
        shown.is_ok()
    }

    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytesMut<'_>)) -> bool {
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

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.for_extents(offset, len, |member, extent| member.discard(extent.offset, extent.len))
    }

    fn discards_quickly(&self) -> bool {
        self.members.iter().all(|member| member.discards_quickly())
    }

    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        let mut found: Option<Allocation> = None;
        for piece in self.map.pieces(offset, u64::MAX).take(LOOKED_AT) {
            let here = self.members[piece.member].allocation(piece.offset)?;
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
        let found: Vec<Found> = disks.iter().map(|disk| read_member(&**disk).unwrap()).collect();
        StripedStore::new(&Array::assemble(&found).unwrap(), disks)
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
            chunks in prop::collection::vec(1u64..6, 1..5),
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
