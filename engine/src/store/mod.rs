//! Where ciphertext is stored. This is the only input and output of the engine. Calls block, and every read or write takes
//! an offset.

mod faulty;
mod file;
mod latch;
mod mapping;
mod memory;
mod unaligned;

use std::io;
use std::sync::Arc;

pub use faulty::{FaultyStore, Operation};
pub use file::{Access, Caching, FileStore};
pub use latch::FlushLatch;
pub use mapping::{BusErrorsCaught, MappedBytes, MappedBytesMut};
pub use memory::MemoryStore;
pub use unaligned::{read_unaligned, write_unaligned, write_zeros};

/// What holds a store's bytes, for callers that can read and write them without the store.
#[derive(Clone, Copy, Debug)]
pub enum Medium<'a> {
    /// Memory: of this process, or files in memory that only the store can reach. Calls return at once.
    Memory,
    /// An open file whose offsets are the store's.
    File {
        /// The file.
        file: &'a std::fs::File,
        /// The file is open for direct I/O, which does not bypass the page cache on every filesystem.
        direct: bool,
        /// The disk has the data when a write returns, because the write bypasses the page cache. This is never set without
        /// `direct`. A caller may sync the file itself only if this is set.
        writes_through: bool,
        /// The filesystem lies in memory (tmpfs). Calls return at once.
        resident: bool,
        /// A caller that syncs the file without [`BlockStore::flush`] checks the latch first, and passes the outcome to it.
        latch: &'a FlushLatch,
    },
    /// Something that only the store can reach. Calls may take time.
    Other,
}

/// Whether the disk has allocated the bytes from some offset on, and where this range ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The end of the range. Its bytes are either all allocated or all not allocated. The end lies after the requested
    /// offset.
    pub end: u64,
    /// Nothing is allocated, and the range reads as zeros.
    pub is_hole: bool,
}

/// A disk, or anything that behaves like one. Many threads may call it at once. The store does not define what overlapping
/// calls see of each other. A caller that needs an order must enforce it.
pub trait BlockStore: Send + Sync {
    /// Returns the size in bytes, which never changes.
    fn len(&self) -> u64;

    /// Returns whether the store has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the alignment in bytes, a power of two. All offsets and lengths given to the store must be multiples of
    /// it. It is 1 if any offset is allowed. For direct I/O it is the logical block size. Buffers may lie at any
    /// address.
    fn alignment(&self) -> usize {
        1
    }

    /// Returns this store with the page cache instead of direct I/O, so that offsets need no alignment. It uses the same open
    /// file, with its locks. Returns `None` if the store has no page cache. The original store must not be used afterwards.
    ///
    /// # Errors
    /// The error of fcntl(2) or dup(2) if direct I/O cannot be turned off.
    fn buffered(&self) -> io::Result<Option<Arc<dyn BlockStore>>> {
        Ok(None)
    }

    /// Returns whether every write fails.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Returns what holds the bytes.
    fn medium(&self) -> Medium<'_> {
        Medium::Other
    }

    /// Fills `data` from the bytes at `offset`.
    ///
    /// # Errors
    /// The error of the disk if the read fails; `UnexpectedEof` if the range reaches past the end.
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`. It is durable only after [`BlockStore::flush`].
    ///
    /// # Errors
    /// The error of the disk if the write fails. The contents of the range are then unspecified.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Checks whether the store has become shorter since it was opened. This can happen to a file, which another program
    /// can cut short. Reads and writes beyond the new end then fail, even after the file grows again.
    ///
    /// [`BlockStore::write_at`] calls this itself. A caller of [`BlockStore::show`] and [`BlockStore::fill`], or one that
    /// writes the file of a [`Medium::File`], must call this first, and then [`BlockStore::check_within`].
    fn check_end(&self) {}

    /// Checks that the range lies before the smallest end that [`BlockStore::check_end`] has seen.
    ///
    /// # Errors
    /// An error that clients see as `EIO`, if the disk was cut short before the end of the range.
    fn check_within(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// Returns whether [`BlockStore::show`] and [`BlockStore::fill`] may succeed.
    fn is_mapped(&self) -> bool {
        false
    }

    /// Passes the bytes of the range to `each` piece by piece, in place. `each` also gets the offset of the piece within
    /// the range. A piece has at most 1 MiB. It ends at a multiple of 4096 bytes of the disk, or at the end of the range.
    ///
    /// Returns `false` if the range could not be shown completely. The caller must then read it with [`BlockStore::read_at`];
    /// `each` may already have seen parts of it.
    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytes<'_>)) -> bool {
        let _ = (offset, len, each);
        false
    }

    /// Calls `each` to fill the bytes of the range in place, in the same pieces as [`BlockStore::show`].
    ///
    /// Returns `false` if the range could not be filled completely. The caller must then write it with
    /// [`BlockStore::write_at`]; `each` may already have filled parts of it.
    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytesMut<'_>)) -> bool {
        let _ = (offset, len, each);
        false
    }

    /// Waits until every write that returned before this call is on stable storage.
    ///
    /// # Errors
    /// The error of the disk if it could not flush. Nothing written since the last successful flush is then guaranteed. If the
    /// store is a file or a block device, every later flush fails, too, until the store is reopened: see [`FlushLatch`].
    fn flush(&self) -> io::Result<()>;

    /// Returns the error of the first flush that failed since the store was opened, if one has failed and the store remembers it.
    fn flush_failure(&self) -> Option<String> {
        None
    }

    /// Discards the range, so that the disk may reuse its space. The range then reads as zeros or as before, and stays
    /// writable.
    ///
    /// # Errors
    /// `Unsupported` if the disk cannot discard, otherwise the error of the disk.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns whether [`BlockStore::discard`] returns soon, however long the range is. A block device may write zeros for
    /// hours, and no signal interrupts it.
    fn discards_quickly(&self) -> bool {
        true
    }

    /// Returns whether the disk has allocated the bytes that start at `offset`, and where this range ends. `offset` must be
    /// less than the size. If the disk cannot tell, everything counts as allocated.
    ///
    /// # Errors
    /// The error of lseek(2), if the store is a file and the system call fails.
    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        let _ = offset;
        Ok(Allocation { end: self.len(), is_hole: false })
    }

    /// Tells the store that the range will be read soon, so that the page cache can read it in advance. A store without a
    /// cache ignores this.
    ///
    /// # Errors
    /// The error of posix_fadvise(2).
    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }
}

/// Anything that can be read at any offset: a disk, or the plaintext of a volume.
pub trait ReadAt {
    /// Returns the size in bytes.
    fn size(&self) -> u64;

    /// Fills `data` from the bytes at `offset`, which needs no alignment.
    ///
    /// # Errors
    /// The error of the disk if the read fails; `UnexpectedEof` if the range reaches past the end.
    fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for dyn BlockStore + '_ {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        read_unaligned(self, data, offset)
    }
}
