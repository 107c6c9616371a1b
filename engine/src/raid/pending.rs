//! Makes an array in steps, so that an incomplete array is never taken for one.
//!
//! ```text
//!   sector 0        anything      marker       marker         zeros
//!   superblock      none          none         superblock     superblock
//!                          begin ──► caller ──► write ──► complete
//! ```
//!
//! Sector 0 of a member is unused in an array. Between `begin` and `complete` it holds the marker of an unfinished format, on
//! every member. During this time the caller may use the array's data: it can make a volume there, and complete the volume
//! between `write` and `complete`. So after a crash, there is an array whose superblocks are all there, perhaps with a volume, or
//! all members have the marker and some have no superblock. In the second case, the array can be made again from the beginning.
//! The markers alone do not show that: after a crash before the end of `complete`, a complete array has them, too.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use super::array::DATA_OFFSET;
use super::store::{OpenError, StripedStore, read_member, write_member};
use super::{Array, ArrayError, Found, NewArray, Role, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET, Superblock, SuperblockError};
use crate::signature::{LUKS_MAGIC, has_marker, put_marker};
use crate::store::{BlockStore, read_unaligned, write_unaligned};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// An array that does not exist on its disks yet.
#[must_use = "an array that is neither completed nor abandoned stays unfinished"]
pub struct PendingArray {
    array: Array,
    members: Vec<Arc<dyn BlockStore>>,
    superblocks: Vec<Superblock>,
}

/// Why an array could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PendingError {
    /// A member no longer has the marker, so another program has written to it.
    #[error("another program has written to it while the array was made")]
    Overwritten {
        /// The member's place in the list of disks.
        disk: usize,
    },
    /// A member failed.
    #[error("{source}")]
    Disk {
        /// The member's place in the list of disks.
        disk: usize,
        /// The member's error.
        source: io::Error,
    },
}

impl PendingError {
    /// Returns the place in the list of the disk that the error is about.
    pub fn disk(&self) -> usize {
        match self {
            Self::Overwritten { disk } | Self::Disk { disk, .. } => *disk,
        }
    }
}

impl PendingArray {
    /// Lays out an array on `disks`, in the order of the roles. Writes nothing.
    ///
    /// # Errors
    /// [`ArrayError`], if the disks do not form an array.
    pub fn new(disks: &[Arc<dyn BlockStore>], new: &NewArray) -> Result<Self, ArrayError> {
        let superblocks = new.superblocks()?;
        let found = |(disk, superblock): (&Arc<dyn BlockStore>, &Superblock)| Found {
            disk_len: disk.len(),
            alignment: disk.alignment() as u64,
            superblock: Ok(superblock.clone()),
        };
        let found: Vec<Found> = disks.iter().zip(&superblocks).map(found).collect();
        let array = Array::assemble(&found)?;
        Ok(Self { array, members: disks.to_vec(), superblocks })
    }

    /// Returns the array.
    pub fn array(&self) -> &Array {
        &self.array
    }

    /// Returns the array's data. It may be written after [`PendingArray::begin`].
    pub fn store(&self) -> StripedStore {
        StripedStore::over(self.array.map.clone(), self.members.clone())
    }

    /// Writes the marker on every member, and removes the superblock of an earlier array. The members must be free: what is on
    /// them is lost from now on.
    ///
    /// # Errors
    /// [`PendingError::Disk`]. Some members then have the marker.
    pub fn begin(&self) -> Result<(), PendingError> {
        let mut marker = [0; SECTOR];
        put_marker(&mut marker);
        self.on_each(|disk, _| write_unaligned(disk, &marker, 0))?;
        self.on_each(|disk, _| disk.flush())?;
        self.on_each(|disk, _| match read_member(disk)?.superblock {
            Err(SuperblockError::Absent) => Ok(()),
            _ => write_unaligned(disk, &[0; SUPERBLOCK_LEN], SUPERBLOCK_OFFSET).and_then(|()| disk.flush()),
        })
    }

    /// Makes everything durable that was written to the array's data, and then writes the superblocks.
    ///
    /// # Errors
    /// [`PendingError::Overwritten`], and then nothing was written. Otherwise [`PendingError::Disk`]; all members then have the
    /// marker.
    pub fn write(&self) -> Result<(), PendingError> {
        self.require_markers()?;
        self.on_each(|disk, _| disk.flush())?;
        self.on_each(write_member)?;
        self.on_each(|disk, _| disk.flush())
    }

    /// Removes the markers. The array is then complete.
    ///
    /// # Errors
    /// [`PendingError::Disk`]. Some members then have the marker, which does no harm in a complete array.
    pub fn complete(&self) -> Result<(), PendingError> {
        remove_markers(&self.members)
    }

    /// Removes what was written to the members outside the array's data. If `is_blank`, the array's data is blank, and the
    /// members are blank afterwards. Otherwise they keep the marker, so that an array can be made on them again.
    ///
    /// # Errors
    /// [`PendingError::Overwritten`], and then nothing was written. Otherwise [`PendingError::Disk`].
    pub fn abandon(&self, is_blank: bool) -> Result<(), PendingError> {
        self.require_markers()?;
        self.on_each(|disk, _| write_unaligned(disk, &[0; SUPERBLOCK_LEN], SUPERBLOCK_OFFSET))?;
        self.on_each(|disk, _| disk.flush())?;
        if is_blank { remove_markers(&self.members) } else { Ok(()) }
    }

    fn require_markers(&self) -> Result<(), PendingError> {
        for (disk, member) in self.members.iter().enumerate() {
            if !has_marker(&**member).map_err(|source| PendingError::Disk { disk, source })? {
                return Err(PendingError::Overwritten { disk });
            }
        }
        Ok(())
    }

    fn on_each(&self, call: impl Fn(&dyn BlockStore, &Superblock) -> io::Result<()>) -> Result<(), PendingError> {
        for (disk, (member, superblock)) in self.members.iter().zip(&self.superblocks).enumerate() {
            call(&**member, superblock).map_err(|source| PendingError::Disk { disk, source })?;
        }
        Ok(())
    }
}

/// Removes the markers that were left on the members of a complete array. Leaves everything else in their first sectors.
///
/// # Errors
/// [`PendingError::Disk`].
pub fn remove_markers(members: &[Arc<dyn BlockStore>]) -> Result<(), PendingError> {
    for (disk, member) in members.iter().enumerate() {
        let removed = has_marker(&**member).and_then(|has_marker| match has_marker {
            true => write_unaligned(&**member, &[0; SECTOR], 0).and_then(|()| member.flush()),
            false => Ok(()),
        });
        removed.map_err(|source| PendingError::Disk { disk, source })?;
    }
    Ok(())
}

/// What several disks are together.
pub enum Together {
    /// A complete array.
    Array(Box<(Array, StripedStore)>),
    /// An array that was begun and not completed. Nothing on the disks is worth keeping.
    Unfinished,
    /// No disk has a superblock.
    NoArray,
}

/// Looks at the superblocks of several disks, given in any order.
///
/// # Errors
/// [`OpenError`] if the disks are neither one array nor without superblocks.
pub fn look(disks: &[Arc<dyn BlockStore>]) -> Result<Together, OpenError> {
    let error = match StripedStore::open(disks) {
        Ok(opened) => return Ok(Together::Array(Box::new(opened))),
        Err(error @ OpenError::Array(_)) => error,
        Err(error) => return Err(error),
    };
    let mut superblocks = Vec::with_capacity(disks.len());
    let mut is_unfinished = true;
    for (disk, store) in disks.iter().enumerate() {
        let failed = |source| OpenError::Read { disk, source };
        let superblock = read_member(&**store).map_err(failed)?.superblock;
        is_unfinished &=
            has_marker(&**store).map_err(failed)? && !holds_volume(&**store, &superblock).map_err(failed)?;
        superblocks.push(superblock);
    }
    let is_absent = |superblock: &Result<_, _>| matches!(superblock, Err(SuperblockError::Absent));
    if superblocks.iter().all(is_absent) {
        return Ok(Together::NoArray);
    }
    match is_unfinished && is_partly_written(&superblocks) {
        true => Ok(Together::Unfinished),
        false => Err(error),
    }
}

/// Returns whether these are the superblocks of an array that was cut off while they were written: some are absent, and the
/// others belong to one array of exactly these disks. If all are there, the array is complete even if its members still have
/// the marker, so a disk that is missing or does not fit is no reason to make the array again.
fn is_partly_written(superblocks: &[Result<Superblock, SuperblockError>]) -> bool {
    let mut there = Vec::with_capacity(superblocks.len());
    for superblock in superblocks {
        match superblock {
            Ok(superblock) => there.push(superblock),
            Err(SuperblockError::Absent) => {}
            Err(_) => return false,
        }
    }
    let is_of_one_array = there.iter().all(|superblock| superblock.array == there[0].array);
    let is_of_these_disks = there.iter().all(|superblock| usize::try_from(superblock.members) == Ok(superblocks.len()));
    let mut roles = HashSet::new();
    let has_distinct_roles =
        there.iter().all(|superblock| matches!(superblock.role(), Role::Active(role) if roles.insert(role)));
    there.len() < superblocks.len() && is_of_one_array && is_of_these_disks && has_distinct_roles
}

/// Returns whether a LUKS volume begins in the disk's data. Its header is written only after all superblocks, so an unfinished
/// array has none.
fn holds_volume(disk: &dyn BlockStore, superblock: &Result<Superblock, SuperblockError>) -> io::Result<bool> {
    let offset = superblock.as_ref().map_or(DATA_OFFSET, |superblock| superblock.data_offset);
    let mut start = [0; LUKS_MAGIC.len()];
    if disk.len().checked_sub(offset).is_some_and(|len| len >= start.len() as u64) {
        read_unaligned(disk, &mut start, offset)?;
    }
    Ok(start == LUKS_MAGIC)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use uuid::Uuid;

    use super::*;
    use crate::store::{FaultyStore, MemoryStore, Operation};

    const CHUNK: u64 = 4096;
    const LEN: usize = DATA_OFFSET as usize + 8 * 4096;

    /// Disks that all fail after some number of writes and flushes.
    struct Disks {
        all: Vec<Arc<dyn BlockStore>>,
        left: Arc<AtomicU32>,
    }

    impl Disks {
        fn new(count: usize) -> Self {
            let left = Arc::new(AtomicU32::new(u32::MAX));
            let disk = || {
                let left = Arc::clone(&left);
                let store = FaultyStore::new(MemoryStore::zeroed(LEN), move |operation| {
                    let changes = matches!(operation, Operation::Write(..) | Operation::Flush);
                    let has_failed = changes
                        && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
                    has_failed.then_some(io::ErrorKind::NotConnected)
                });
                Arc::new(store) as Arc<dyn BlockStore>
            };
            Self { all: (0..count).map(|_| disk()).collect(), left }
        }

        fn fail_after(&self, operations: u32) {
            self.left.store(operations, Ordering::Relaxed);
        }

        fn pending(&self, uuid: u128) -> PendingArray {
            let members = (1..).take(self.all.len()).map(|n| (LEN as u64, Uuid::from_u128(n))).collect();
            let new = NewArray { uuid: Uuid::from_u128(uuid), name: "host:it".into(), now: 1, chunk: CHUNK, members };
            PendingArray::new(&self.all, &new).unwrap()
        }

        fn look(&self) -> Together {
            look(&self.all).unwrap()
        }

        fn has_marker(&self, disk: usize) -> bool {
            has_marker(&*self.all[disk]).unwrap()
        }

        fn bytes(&self, disk: usize) -> Vec<u8> {
            let mut bytes = vec![0; LEN];
            self.all[disk].read_at(&mut bytes, 0).unwrap();
            bytes
        }
    }

    /// Makes an array with a volume on it.
    fn make(pending: &PendingArray) -> Result<(), PendingError> {
        let disk = |source| PendingError::Disk { disk: 0, source };
        pending.begin()?;
        let store = pending.store();
        store.write_at(&[7; 12 << 10], CHUNK).map_err(disk)?;
        pending.write()?;
        store.write_at(&LUKS_MAGIC, 0).and_then(|()| store.flush()).map_err(disk)?;
        pending.complete()
    }

    #[test]
    fn after_a_crash_an_array_is_complete_or_can_be_made_again() {
        let (mut unfinished, mut complete) = (0, 0);
        for crash in 0.. {
            let disks = Disks::new(3);
            disks.fail_after(crash);
            let made = make(&disks.pending(9));
            disks.fail_after(u32::MAX);
            let mut magic = [0; 6];
            match disks.look() {
                Together::Array(opened) => {
                    let (array, store) = *opened;
                    assert_eq!(array.disks, [0, 1, 2]);
                    store.read_at(&mut magic, 0).unwrap();
                    complete += u32::from(magic == LUKS_MAGIC);
                    remove_markers(&disks.all).unwrap();
                }
                Together::Unfinished => {
                    assert!((0..3).all(|disk| disks.has_marker(disk)));
                    unfinished += 1;
                }
                // As long as some member has no marker, nothing else was written.
                Together::NoArray => {
                    let is_blank = |disk: usize| disks.bytes(disk)[SECTOR..].iter().all(|byte| *byte == 0);
                    assert!((0..3).all(|disk| disks.has_marker(disk)) || (0..3).all(is_blank));
                }
            }
            if magic != LUKS_MAGIC {
                make(&disks.pending(10)).unwrap();
                assert!(matches!(disks.look(), Together::Array(opened) if opened.0.uuid == Uuid::from_u128(10)));
            }
            assert!((0..3).all(|disk| !disks.has_marker(disk)));
            if made.is_ok() {
                break;
            }
        }
        assert!(unfinished >= 2 && complete >= 4, "{unfinished} {complete}");
    }

    #[test]
    fn an_abandoned_array_leaves_blank_members() {
        for has_superblocks in [false, true] {
            let disks = Disks::new(2);
            let pending = disks.pending(9);
            pending.begin().unwrap();
            if has_superblocks {
                pending.write().unwrap();
            }
            pending.abandon(true).unwrap();
            assert!((0..2).all(|disk| disks.bytes(disk).iter().all(|byte| *byte == 0)));
        }
    }

    #[test]
    fn an_abandoned_array_with_data_keeps_its_markers() {
        let disks = Disks::new(2);
        let pending = disks.pending(9);
        pending.begin().unwrap();
        pending.write().unwrap();
        pending.abandon(false).unwrap();
        assert!(matches!(disks.look(), Together::NoArray) && disks.has_marker(0) && disks.has_marker(1));
    }

    #[test]
    fn what_another_program_has_written_is_kept() {
        let disks = Disks::new(2);
        let pending = disks.pending(9);
        pending.begin().unwrap();
        disks.all[1].write_at(&[1; 512], 0).unwrap();
        let before = [disks.bytes(0), disks.bytes(1)];
        for refused in [pending.write(), pending.abandon(true)] {
            assert!(matches!(refused, Err(PendingError::Overwritten { disk: 1 })));
        }
        assert_eq!([disks.bytes(0), disks.bytes(1)], before);
    }

    /// A disk of a complete array lost its superblock before the markers were removed.
    #[test]
    fn an_array_with_a_volume_is_never_unfinished() {
        for lost in 0..2 {
            let disks = Disks::new(2);
            let pending = disks.pending(9);
            pending.begin().unwrap();
            pending.write().unwrap();
            disks.all[lost].write_at(&[0; SUPERBLOCK_LEN], SUPERBLOCK_OFFSET).unwrap();
            assert!(matches!(disks.look(), Together::Unfinished));
            pending.store().write_at(&LUKS_MAGIC, 0).unwrap();
            let error = look(&disks.all).err().unwrap();
            assert!(matches!(error, OpenError::Array(ArrayError::NotMember { disk, .. }) if disk == lost), "{error}");
        }
    }

    /// A start was cut off before it removed the markers. Later, a disk is late, or another one is named in its place.
    #[test]
    fn a_complete_array_with_markers_is_never_unfinished() {
        let (disks, others) = (Disks::new(3), Disks::new(2));
        let pending = disks.pending(9);
        pending.begin().unwrap();
        pending.write().unwrap();
        // The header is on no disk of the array (detached), or on the first disk only.
        let [first, second, third] = [0, 1, 2].map(|disk| Arc::clone(&disks.all[disk]));
        let blank = others.pending(10);
        blank.begin().unwrap();
        for some in [
            vec![Arc::clone(&second), Arc::clone(&third)],
            vec![Arc::clone(&second)],
            vec![Arc::clone(&first), Arc::clone(&second), Arc::clone(&second)],
            // This one has the marker, but the array was not made on it.
            vec![Arc::clone(&first), Arc::clone(&others.all[0])],
            vec![Arc::clone(&first), Arc::clone(&first), Arc::clone(&others.all[0])],
        ] {
            assert!(matches!(look(&some), Err(OpenError::Array(_))));
        }
        assert!(matches!(disks.look(), Together::Array(_)));
    }

    #[test]
    fn a_new_array_replaces_an_earlier_one() {
        let disks = Disks::new(2);
        make(&disks.pending(9)).unwrap();
        let pending = disks.pending(10);
        pending.begin().unwrap();
        assert!(matches!(disks.look(), Together::NoArray), "no superblock is left");
        pending.write().unwrap();
        pending.complete().unwrap();
        assert!(matches!(disks.look(), Together::Array(opened) if opened.0.uuid == Uuid::from_u128(10)));
    }

    #[test]
    fn members_of_two_arrays_are_not_unfinished() {
        let (one, other) = (Disks::new(2), Disks::new(2));
        for (disks, uuid) in [(&one, 9), (&other, 10)] {
            let pending = disks.pending(uuid);
            pending.begin().unwrap();
            pending.write().unwrap();
        }
        let mixed = [Arc::clone(&one.all[0]), Arc::clone(&other.all[1])];
        assert!(matches!(look(&mixed), Err(OpenError::Array(ArrayError::Foreign { disk: 1, .. }))));
    }
}
