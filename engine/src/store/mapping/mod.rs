//! A file that lies in memory anyway (tmpfs), reached without the kernel: the cipher reads ciphertext where it lies and
//! writes it there, and what would have been a copy is part of its own pass.
//!
//! Only what the file has is touched that way. A hole would be filled by reading it, and to fill one by writing may
//! find no room, which a system call reports and a mapping does not. So a [`Region`] is looked at before it is used,
//! and one with holes is left to system calls.
//!
//! This is a room with `unsafe` in it: mapped memory is handed out as slices here.
//!
//! # Others' hands
//! Threads of this process keep off each other by the regions' locks. Another process that writes the file at the same
//! time, or this one by a system call, changes bytes while they are looked at: what is read then is one or the other,
//! byte by byte, as it would be with a system call. Nobody but the cipher's loads and stores of whole vectors looks at
//! those bytes, and no decision depends on them.
#![allow(unsafe_code, reason = "mapped memory; see above for the invariants")]

mod bus_error;

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

/// Bytes of the file that are locked, and looked at for holes, together.
const REGION: usize = 1 << 20;
/// Bytes of a page.
const PAGE: usize = 4096;
/// So many bytes written to a region with holes are worth another look at it.
const WORTH_A_LOOK: usize = 256 << 10;
/// Regions that are made ready before the first request: 2 GiB, some 0.3 s. The others are when they are first used.
const AT_ONCE: usize = 2048;

/// A file's bytes in this process's memory.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    regions: Box<[RwLock<Region>]>,
    /// How often space was given back.
    punched: AtomicU64,
    watch: Watch,
}

/// Has the CPU fetch the first page of what the cipher is about to go through, all of its lines at once: they wait for memory
/// while the first tweak is encrypted, and for each other no longer. What follows the cipher fetches ahead itself.
fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes[..bytes.len().min(PAGE)].chunks(64) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, a hint that faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// What is known of a region.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Region {
    Unknown,
    /// It has no hole.
    Whole,
    /// It has none, and its pages were brought before the CPU.
    Ready,
    /// It had one, so many written bytes ago.
    Holey(usize),
}

// SAFETY: the memory is nobody's but the mapping's, and reached under the regions' locks alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file on tmpfs, to be read, or to be written too.
    ///
    /// # Errors
    /// What the system said; `OutOfMemory` when too many files are mapped.
    pub(super) fn new(file: &File, len: u64, writable: bool, caught: BusErrorsCaught) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no memory that is in use.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let start = base.as_ptr().expose_provenance();
        let Some(watch) = Watch::new(caught, start..start + len) else {
            // SAFETY: it is the mapping made above, and nobody else knows of it.
            unsafe { rustix::mm::munmap(base.as_ptr().cast(), len)? };
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        // Ciphertext may be swapped, even in a process that keeps all else from it.
        // SAFETY: it changes nothing that can be seen in memory.
        let _ = unsafe { rustix::mm::munlock(base.as_ptr().cast(), len) };
        let regions = (0..len.div_ceil(REGION)).map(|_| RwLock::new(Region::Unknown)).collect();
        let mapping = Self { base, len, regions, punched: AtomicU64::new(0), watch };
        for index in 0..mapping.regions.len().min(AT_ONCE) {
            mapping.get_ready(file, index);
        }
        Ok(mapping)
    }

    /// Shows the range's bytes to `each`, piece by piece, with where in the range a piece begins. `false` if they cannot
    /// be shown, or what was shown does not count: then the range is to be read by system calls.
    pub(super) fn show(&self, file: &File, offset: u64, len: usize, each: &mut dyn FnMut(usize, &[u8])) -> bool {
        self.over(offset, len, |index, range, at| {
            let Some(_held) = self.whole(file, index, |region| region.read().unwrap_or_else(PoisonError::into_inner))
            else {
                return false;
            };
            // SAFETY: the range lies within the mapping (`over`), which lives as long as `self`. Who writes to it in this
            // process holds the region's lock alone, and this holds it; of others, see the top. A page that is missing
            // is put there by the handler.
            let bytes = unsafe { std::slice::from_raw_parts(self.base.add(range.start).as_ptr(), range.len()) };
            fetch(bytes);
            each(at, bytes);
            true
        })
    }

    /// Has `each` fill the range's bytes, piece by piece. `false` if they cannot be filled so, or were filled in vain: then
    /// the range is to be written by system calls.
    pub(super) fn fill(&self, file: &File, offset: u64, len: usize, each: &mut dyn FnMut(usize, &mut [u8])) -> bool {
        self.over(offset, len, |index, range, at| {
            let Some(_held) = self.whole(file, index, |region| region.write().unwrap_or_else(PoisonError::into_inner))
            else {
                return false;
            };
            // SAFETY: as in `show`, and this holds the region's lock alone.
            let bytes = unsafe { std::slice::from_raw_parts_mut(self.base.add(range.start).as_ptr(), range.len()) };
            fetch(bytes);
            each(at, bytes);
            true
        })
    }

    /// So many bytes were written at `offset` by a system call: a hole may be filled.
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

    /// Space was given back in the range.
    pub(super) fn punched(&self, offset: u64, len: u64) {
        // First, so that nobody who looked before the hole was there marks a region as whole after this.
        self.punched.fetch_add(1, Ordering::SeqCst);
        let Some(range) = usize::try_from(len).ok().and_then(|len| self.range(offset, len)) else { return };
        for region in &self.regions[range.start / REGION..range.end.div_ceil(REGION)] {
            *region.write().unwrap_or_else(PoisonError::into_inner) = Region::Unknown;
        }
    }

    /// Goes over the regions that the range lies in: their number, what of the mapping it is, and where in the range.
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

    /// The region's lock, if it has no hole.
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

    /// Looks at a region, and if it has no hole, has the kernel enter all its pages into the page table: with one call, and
    /// not with a fault each.
    fn get_ready(&self, file: &File, index: usize) {
        if *self.regions[index].read().unwrap_or_else(PoisonError::into_inner) == Region::Unknown {
            self.look(file, index);
        }
        let mut region = self.regions[index].write().unwrap_or_else(PoisonError::into_inner);
        if *region != Region::Whole {
            return;
        }
        let start = index * REGION;
        // As if they were read: then the kernel enters sixteen at a time, and on tmpfs such that they can be written too.
        let advice = Advice::LinuxPopulateRead;
        // Before Linux 5.14 there is no such thing; what the file has lost meanwhile shows when it is touched.
        // SAFETY: the range lies within the mapping, whose contents stay as they are.
        let _ =
            unsafe { rustix::mm::madvise(self.base.as_ptr().add(start).cast(), REGION.min(self.len - start), advice) };
        *region = Region::Ready;
    }

    /// Finds out whether the region has a hole, and how many behind it have none: the kernel looks page by page from
    /// where it is asked until it finds one, and is not to do that for each region again.
    fn look(&self, file: &File, index: usize) {
        let before = self.punched.load(Ordering::SeqCst);
        let start = index * REGION;
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(start as u64)) {
            Ok(hole) => usize::try_from(hole).unwrap_or(usize::MAX),
            Err(Errno::NXIO) => start,
            // A filesystem in memory that knows no holes (ramfs) has none to be filled by chance.
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

    /// The range within the mapping, if it is.
    fn range(&self, offset: u64, len: usize) -> Option<Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.len).then_some(start..end)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The addresses may be another's at once.
        self.watch.end();
        // SAFETY: nobody has a slice of it any more, since none outlives the call it was handed to.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const LEN: u64 = 5 << 20;

    /// A file in memory with these bytes at its start and a hole behind them, and its mapping.
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
        let is_shown =
            mapping.show(file, offset, len, &mut |at, bytes| all[at..at + bytes.len()].copy_from_slice(bytes));
        is_shown.then_some(all)
    }

    fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
        let mut all = vec![0; len];
        file.read_exact_at(&mut all, offset).unwrap();
        all
    }

    #[test]
    fn what_is_shown_is_what_is_read_and_what_is_filled_is_what_is_written() {
        let (file, mapping) = full();
        for (offset, len) in
            [(0, 1), (512, 4096), ((1 << 20) - 512, 1024), (100, 3 << 20), (LEN - 1, 1), (0, LEN as usize)]
        {
            assert_eq!(shown(&file, &mapping, offset, len).unwrap(), read(&file, offset, len), "{offset} {len}");
            let filled = mapping.fill(&file, offset, len, &mut |at, bytes| {
                for (number, byte) in bytes.iter_mut().enumerate() {
                    *byte = ((at + number) % 253) as u8;
                }
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
        assert!(!mapping.fill(&file, 4096, 4096, &mut |_, _| panic!("nothing is to be filled")));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        // A region is whole once all of it is written.
        file.write_all_at(&[1; REGION], REGION as u64).unwrap();
        mapping.written(REGION as u64, REGION);
        assert_eq!(shown(&file, &mapping, REGION as u64, REGION).unwrap(), [1; REGION]);
        assert!(shown(&file, &mapping, REGION as u64 - 1, 2).is_none());
        assert_eq!(file.metadata().unwrap().blocks() * 512, REGION as u64);
    }

    #[test]
    fn what_is_given_back_is_shown_no_more() {
        let (file, mapping) = full();
        assert!(shown(&file, &mapping, 0, LEN as usize).is_some());
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 1 << 20, 8192).unwrap();
        mapping.punched(1 << 20, 8192);
        assert!(shown(&file, &mapping, 1 << 20, 512).is_none());
        assert!(shown(&file, &mapping, 2 << 20, 512).is_some());
    }

    #[test]
    fn a_file_that_is_cut_short_costs_its_mapping_and_nothing_else() {
        let (file, mapping) = full();
        let (other, others) = full();
        assert!(shown(&file, &mapping, 4 << 20, 4096).is_some());
        file.set_len(1 << 20).unwrap();
        assert!(shown(&file, &mapping, 4 << 20, 4096).is_none());
        assert!(!mapping.fill(&file, 3 << 20, 4096, &mut |_, bytes| bytes.fill(1)));
        assert!(shown(&file, &mapping, 0, 4096).is_none(), "it is not trusted again");
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(shown(&other, &others, 4 << 20, 4096).is_some());
    }

    #[test]
    fn places_are_given_back() {
        for _ in 0..200 {
            let _ = sparse();
        }
    }
}
