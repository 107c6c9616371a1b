//! A file that lies in memory anyway (tmpfs), mapped into this process. The cipher reads and writes ciphertext directly
//! in the mapping, which saves the kernel's copy.
//!
//! Only allocated pages of the file are accessed in this way. Reading a hole would allocate the hole. Writing to a hole fails if
//! the filesystem is full. A system call reports this failure, but a mapping does not. So each [`Region`] is checked for holes
//! before it is used, and a region with holes is read and written with system calls.
//!
//! This module contains `unsafe` code. It hands out mapped memory as [`MappedBytes`] and [`MappedBytesMut`], which only the
//! cipher can consume, and never as a slice.
//!
//! # Other writers
//! The locks of the regions keep the threads of this process apart. But another process may write to the file at the
//! same time, and so may this process with a system call. The bytes then change while they are read: each byte that is
//! read is either the old or the new byte, as with a system call. Only the cipher's loads and stores of whole vectors
//! access those bytes, and no decision depends on them.
#![allow(unsafe_code, reason = "mapped memory; the module documentation names the invariants")]

mod bus_error;
mod bytes;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

pub use bus_error::BusErrorsCaught;
use bus_error::Watch;
pub use bytes::{MappedBytes, MappedBytesMut};

/// Bytes of the file that share a lock and are checked for holes together.
const REGION: usize = 1 << 20;
/// Bytes of a page.
const PAGE: usize = 4096;
/// A region with holes is checked again after this many bytes were written to it.
const WORTH_A_LOOK: usize = 256 << 10;
/// The number of regions that are prepared before the first request. Together they have 2 GiB, and preparing them takes
/// about 0.3 s. Each of the other regions is prepared when it is first used.
const AT_ONCE: usize = 2048;

/// The bytes of a file, in the memory of this process.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    regions: Box<[RwLock<Region>]>,
    /// How often space was given back to the filesystem.
    punched: AtomicU64,
    watch: Watch,
}

/// What is known about the holes of a region.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Region {
    Unknown,
    /// The region has no hole.
    Whole,
    /// The region has no hole, and its pages are in the page table.
    Ready,
    /// The region had a hole when it was checked. This many bytes were written to it since then.
    Holey(usize),
}

// SAFETY: the memory belongs only to the mapping and is reached only under the locks of the regions.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file on tmpfs, for reading or for reading and writing.
    ///
    /// # Errors
    /// The error of mmap(2); `OutOfMemory` if too many files are mapped.
    pub(super) fn new(file: &File, len: u64, writable: bool, caught: BusErrorsCaught) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address that the kernel chooses does not touch memory in use.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let start = base.as_ptr().expose_provenance();
        let Some(watch) = Watch::new(caught, start..start + len) else {
            // SAFETY: this is the mapping made above, and nothing else refers to it.
            unsafe { rustix::mm::munmap(base.as_ptr().cast(), len)? };
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        // Ciphertext may be swapped out, even in a process that has locked all its other memory.
        // SAFETY: this does not change the contents of memory.
        let _ = unsafe { rustix::mm::munlock(base.as_ptr().cast(), len) };
        let regions = (0..len.div_ceil(REGION)).map(|_| RwLock::new(Region::Unknown)).collect();
        let mapping = Self { base, len, regions, punched: AtomicU64::new(0), watch };
        for index in 0..mapping.regions.len().min(AT_ONCE) {
            mapping.get_ready(file, index);
        }
        Ok(mapping)
    }

    /// Passes the bytes of the range to `each` piece by piece, with the offset of each piece in the range. Returns `false` if
    /// not all bytes could be shown or the shown bytes are not valid. The caller must then read the range with system calls.
    pub(super) fn show(
        &self,
        file: &File,
        offset: u64,
        len: usize,
        each: &mut dyn FnMut(usize, MappedBytes<'_>),
    ) -> bool {
        self.over(offset, len, |index, range, at| {
            let Some(_held) = self.whole(file, index, |region| region.read().unwrap_or_else(PoisonError::into_inner))
            else {
                return false;
            };
            // SAFETY: the range lies within the mapping (`over`). A thread of this process that writes to it has the
            // region's lock exclusively, and this thread holds the lock until `each` has consumed the bytes.
            each(at, unsafe { MappedBytes::new(self, range) });
            true
        })
    }

    /// Calls `each` to fill the bytes of the range piece by piece. Returns `false` if some bytes could not be filled, or if the
    /// file has lost these bytes. The caller must then write the range with system calls.
    pub(super) fn fill(
        &self,
        file: &File,
        offset: u64,
        len: usize,
        each: &mut dyn FnMut(usize, MappedBytesMut<'_>),
    ) -> bool {
        self.over(offset, len, |index, range, at| {
            let Some(_held) = self.whole(file, index, |region| region.write().unwrap_or_else(PoisonError::into_inner))
            else {
                return false;
            };
            // SAFETY: the range lies within the mapping (`over`), and this thread holds the region's lock exclusively.
            each(at, unsafe { MappedBytesMut::new(self, range) });
            true
        })
    }

    /// Notes that a system call wrote `len` bytes at `offset`, which may have filled a hole.
    pub(super) fn written(&self, offset: u64, len: usize) {
        let Some(range) = self.range(offset, len) else { return };
        for region in &self.regions[range.start / REGION..range.end.div_ceil(REGION)] {
            let known = *region.read().unwrap_or_else(PoisonError::into_inner);
            if !matches!(known, Region::Holey(_)) {
                continue;
            }
            let mut region = region.write().unwrap_or_else(PoisonError::into_inner);
            if let Region::Holey(written) = *region {
                let written = written + len.min(REGION);
                *region = if written < WORTH_A_LOOK { Region::Holey(written) } else { Region::Unknown };
            }
        }
    }

    /// Notes that a discard made a hole in the range.
    pub(super) fn punched(&self, offset: u64, len: u64) {
        // The counter changes first. Otherwise a thread that checked for holes before this hole was made could later
        // mark the region as whole.
        self.punched.fetch_add(1, Ordering::SeqCst);
        let Some(range) = usize::try_from(len).ok().and_then(|len| self.range(offset, len)) else { return };
        for region in &self.regions[range.start / REGION..range.end.div_ceil(REGION)] {
            *region.write().unwrap_or_else(PoisonError::into_inner) = Region::Unknown;
        }
    }

    /// Calls `each` for every region of the range, with the region's index, the range of the mapping, and the offset in the
    /// range.
    fn over(&self, offset: u64, len: usize, mut each: impl FnMut(usize, Range<usize>, usize) -> bool) -> bool {
        let Some(range) = self.range(offset, len) else { return false };
        if self.watch.has_faulted() {
            return false;
        }
        let mut at = range.start;
        while at < range.end {
            let index = at / REGION;
            let end = range.end.min((index + 1) * REGION);
            if !each(index, at..end, at - range.start) {
                return false;
            }
            at = end;
        }
        !self.watch.has_faulted()
    }

    /// Locks the region and returns the guard. Returns `None` if the region has a hole.
    fn whole<'s, G: std::ops::Deref<Target = Region>>(
        &'s self,
        file: &File,
        index: usize,
        lock: impl Fn(&'s RwLock<Region>) -> G,
    ) -> Option<G> {
        let held = lock(&self.regions[index]);
        let known = *held;
        match known {
            Region::Ready => return Some(held),
            Region::Holey(_) => return None,
            Region::Whole | Region::Unknown => drop(held),
        }
        self.get_ready(file, index);
        Some(lock(&self.regions[index])).filter(|held| **held == Region::Ready)
    }

    /// Checks a region for holes. If the region has none, makes the kernel enter all its pages into the page table,
    /// with one call instead of a page fault for each page.
    fn get_ready(&self, file: &File, index: usize) {
        if *self.regions[index].read().unwrap_or_else(PoisonError::into_inner) == Region::Unknown {
            self.look(file, index);
        }
        let mut region = self.regions[index].write().unwrap_or_else(PoisonError::into_inner);
        if *region != Region::Whole {
            return;
        }
        let start = index * REGION;
        // This enters the pages into the page table as if they were read. The kernel does this for sixteen pages at a time,
        // and on tmpfs the entries are writable.
        let advice = Advice::LinuxPopulateRead;
        // Linux before 5.14 lacks this call. If the file has lost a page meanwhile, this is noticed when the page is
        // accessed.
        // SAFETY: the range lies within the mapping, and its contents do not change.
        let _ =
            unsafe { rustix::mm::madvise(self.base.as_ptr().add(start).cast(), REGION.min(self.len - start), advice) };
        *region = Region::Ready;
    }

    /// Finds out whether the region has a hole, and how many regions after it have none. The kernel searches for a hole
    /// page by page from the given offset on. One search therefore sets the state of all regions up to the first hole.
    fn look(&self, file: &File, index: usize) {
        let before = self.punched.load(Ordering::SeqCst);
        let start = index * REGION;
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(start as u64)) {
            Ok(hole) => usize::try_from(hole).unwrap_or(usize::MAX),
            Err(Errno::NXIO) => start,
            // ramfs does not support this call. Its files have no hole that a read could allocate.
            Err(_) => self.len,
        };
        for (index, region) in self.regions.iter().enumerate().skip(index) {
            let end = self.len.min((index + 1) * REGION);
            let is_whole = end <= hole;
            let mut region = region.write().unwrap_or_else(PoisonError::into_inner);
            if self.punched.load(Ordering::SeqCst) != before {
                return;
            }
            if *region == Region::Unknown {
                *region = if is_whole { Region::Whole } else { Region::Holey(0) };
            }
            if !is_whole {
                return;
            }
        }
    }

    /// Returns the range of the mapping, or `None` if it reaches past the end.
    fn range(&self, offset: u64, len: usize) -> Option<Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.len).then_some(start..end)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The kernel may give the addresses to another mapping at once.
        self.watch.end();
        // SAFETY: no slice of the mapping is left, because no slice outlives the call that it was passed to.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const LEN: u64 = 5 << 20;

    /// Returns a file in memory that starts with these bytes, followed by a hole, and its mapping.
    fn mapped(bytes: &[u8]) -> (File, Mapping) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file.set_len(LEN).unwrap();
        let mapping = Mapping::new(&file, LEN, true, BusErrorsCaught::new().unwrap()).unwrap();
        (file, mapping)
    }

    fn sparse() -> (File, Mapping) {
        mapped(&[])
    }

    fn full() -> (File, Mapping) {
        mapped(&(0..LEN).map(|at| (at % 251) as u8).collect::<Vec<u8>>())
    }

    fn shown(file: &File, mapping: &Mapping, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut all = vec![0; len];
        let is_shown = mapping.show(file, offset, len, &mut |at, bytes| {
            let len = bytes.len();
            bytes.copy_to(&mut all[at..at + len]);
        });
        is_shown.then_some(all)
    }

    fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        file.read_exact_at(&mut all, offset).unwrap();
        all
    }

    #[test]
    fn a_mapping_reads_and_writes_the_bytes_of_the_file() {
        let (file, mapping) = full();
        for (offset, len) in
            [(0, 1), (512, 4096), ((1 << 20) - 512, 1024), (100, 3 << 20), (LEN - 1, 1), (0, LEN as usize)]
        {
            assert_eq!(shown(&file, &mapping, offset, len).unwrap(), read(&file, offset, len), "{offset} {len}");
            let filled = mapping.fill(&file, offset, len, &mut |at, bytes| {
                let pattern: Vec<u8> = (at..at + bytes.len()).map(|at| (at % 253) as u8).collect();
                bytes.copy_from(&pattern);
            });
            assert!(filled);
            assert!(read(&file, offset, len).iter().enumerate().all(|(at, byte)| *byte == (at % 253) as u8));
        }
        assert!(shown(&file, &mapping, LEN, 1).is_none() && shown(&file, &mapping, u64::MAX, 2).is_none());
    }

    #[test]
    fn a_hole_is_not_filled_by_looking_at_it() {
        let (file, mapping) = sparse();
        assert!(shown(&file, &mapping, 0, LEN as usize).is_none());
        assert!(!mapping.fill(&file, 4096, 4096, &mut |_, _| panic!("a hole must not be filled")));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        // A region has no hole any more once all of it is written.
        file.write_all_at(&[1; REGION], REGION as u64).unwrap();
        mapping.written(REGION as u64, REGION);
        assert_eq!(shown(&file, &mapping, REGION as u64, REGION).unwrap(), [1; REGION]);
        assert!(shown(&file, &mapping, REGION as u64 - 1, 2).is_none());
        assert_eq!(file.metadata().unwrap().blocks() * 512, REGION as u64);
    }

    #[test]
    fn discarded_space_is_no_longer_shown() {
        let (file, mapping) = full();
        assert!(shown(&file, &mapping, 0, LEN as usize).is_some());
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 1 << 20, 8192).unwrap();
        mapping.punched(1 << 20, 8192);
        assert!(shown(&file, &mapping, 1 << 20, 512).is_none());
        assert!(shown(&file, &mapping, 2 << 20, 512).is_some());
    }

    #[test]
    fn a_file_that_is_cut_short_loses_only_its_mapping() {
        let (file, mapping) = full();
        let (other, others) = full();
        assert!(shown(&file, &mapping, 4 << 20, 4096).is_some());
        file.set_len(1 << 20).unwrap();
        assert!(shown(&file, &mapping, 4 << 20, 4096).is_none());
        assert!(!mapping.fill(&file, 3 << 20, 4096, &mut |_, bytes| bytes.copy_from(&[1; 4096])));
        assert!(shown(&file, &mapping, 0, 4096).is_none(), "the mapping must not be trusted again");
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(shown(&other, &others, 4 << 20, 4096).is_some());
    }

    #[test]
    fn dropped_mappings_free_their_watches() {
        for _ in 0..200 {
            let _ = sparse();
        }
    }
}
