//! Where ciphertext rests: the only input and output of the engine, blocking and positioned.

mod faulty;
mod file;
mod mapping;
mod memory;
mod unaligned;

use std::io;

pub use faulty::{FaultyStore, Operation};
pub use file::{Access, Caching, FileStore};
pub use mapping::BusErrorsCaught;
pub use memory::MemoryStore;
pub use unaligned::{read_unaligned, write_unaligned, write_zeros};

/// What a store's bytes lie on, for callers that could move them without the store.
#[derive(Clone, Copy, Debug)]
pub enum Medium<'a> {
    /// This process's memory: calls return at once.
    Memory,
    /// An open file whose offsets are the store's.
    File {
        /// The file.
        file: &'a std::fs::File,
        /// It is open for direct I/O: the page cache is passed by.
        direct: bool,
        /// The filesystem lies in memory (tmpfs): calls return at once.
        resident: bool,
    },
    /// Something that only the store itself can reach, and that may take its time.
    Other,
}

/// How far from some offset on a disk keeps its bytes in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The first byte after the stretch; past the offset that was asked about.
    pub end: u64,
    /// Nothing is kept there, and it reads as zeros.
    pub is_hole: bool,
}

/// A disk, or something that answers like one. Calls may come from many threads at once; what overlapping calls see of
/// each other is the caller's affair.
pub trait BlockStore: Send + Sync {
    /// The size in bytes, fixed for the store's life.
    fn len(&self) -> u64;

    /// Whether the store has no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Offsets and lengths handed to the store are multiples of this many bytes (a power of two): 1 where any will do,
    /// the logical block size for direct I/O. Buffers may lie anywhere in memory.
    fn alignment(&self) -> usize {
        1
    }

    /// Whether every write fails.
    fn is_read_only(&self) -> bool {
        false
    }

    /// What the bytes lie on.
    fn medium(&self) -> Medium<'_> {
        Medium::Other
    }

    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// What the disk said; `UnexpectedEof` past its end.
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`. It is durable only after [`BlockStore::flush`].
    ///
    /// # Errors
    /// What the disk said; nothing is promised then of the bytes in the range.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Whether [`BlockStore::show`] and [`BlockStore::fill`] are worth a try.
    fn is_mapped(&self) -> bool {
        false
    }

    /// Shows the range's bytes where they lie, piece by piece, and tells `each` where in the range a piece begins. Pieces
    /// end at multiples of 1 MiB of the disk, and at the end. Whoever gets `false` reads the range, of which anything or
    /// nothing may have been shown.
    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, &[u8])) -> bool {
        let _ = (offset, len, each);
        false
    }

    /// Has `each` fill the range's bytes where they lie, in pieces as [`BlockStore::show`] has them. Whoever gets `false`
    /// writes the range, of which anything or nothing may have been filled.
    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, &mut [u8])) -> bool {
        let _ = (offset, len, each);
        false
    }

    /// Returns when every write that was answered before the call is on stable storage.
    ///
    /// # Errors
    /// What the disk said; then nothing since the last successful flush is promised.
    fn flush(&self) -> io::Result<()>;

    /// Gives the space back; the range then reads as zeros or as before, and stays writable.
    ///
    /// # Errors
    /// `Unsupported` where there is no such thing, else what the disk said.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// What is kept from `offset`, which is before the end, on. All of it, where the disk cannot tell.
    ///
    /// # Errors
    /// What the disk said.
    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        let _ = offset;
        Ok(Allocation { end: self.len(), is_hole: false })
    }

    /// Says that the range will be read soon. Only a cache has a use for it.
    ///
    /// # Errors
    /// What the disk said.
    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }
}
