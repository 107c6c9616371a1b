//! Page-aligned memory for direct I/O (`O_DIRECT`). A buffer is allocated once and reused.

use std::io;
use std::sync::OnceLock;

use memmap2::MmapMut;
use rustix::process::{Resource, getrlimit};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The alignment, in bytes, that every disk and filesystem accepts for direct I/O.
pub const DIRECT_ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; DIRECT_ALIGNMENT]);

/// A buffer of at least this many bytes is a memory mapping of its own (mmap(2)). Its pages take no memory until something
/// is written to them, so a payload that a client announces but never sends costs nothing. When the buffer is dropped, its
/// memory goes back to the kernel.
const LARGE: usize = 64 << 10;

/// A zero-filled byte buffer that starts on a 4096-byte boundary.
pub struct AlignedBuffer {
    memory: Memory,
    len: usize,
}

enum Memory {
    Pages(Vec<Page>),
    Mapped(MmapMut),
}

/// The number of bytes of address space that [`has_room`] keeps free for the rest of the program. The rest allocates
/// without a check, and aborts if no address space is left (`RLIMIT_AS`, `ulimit -v`).
const RESERVE: usize = 16 << 20;

/// Checks that this process may take `len` bytes more and still has a reserve for the rest of the program.
///
/// # Errors
/// `OutOfMemory` if the limits of the process do not allow this. The error's text names these limits.
pub fn has_room(len: usize) -> io::Result<()> {
    match len.checked_add(RESERVE).map(MmapMut::map_anon) {
        Some(Ok(_)) => Ok(()),
        _ => Err(no_room(len)),
    }
}

/// Returns whether the process's address space may be limited. The limits are read once and the answer is kept. If it is
/// `false`, buffers are allocated without a call of [`has_room`], because its mmap(2) and munmap(2) would cost more than
/// the buffer itself.
///
/// Without such a limit, an allocation fails only if the kernel has no memory at all, or if the process has
/// `vm.max_map_count` mappings. mmap(2) itself reports both.
fn space_is_limited() -> bool {
    static LIMITED: OnceLock<bool> = OnceLock::new();
    *LIMITED.get_or_init(|| {
        let is_finite = |resource| getrlimit(resource).current.is_some();
        // If this file holds 2, the kernel limits the address space of all processes together. If the file cannot be read,
        // it may hold 2.
        let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
        let is_counted = overcommit.map_or(true, |told| told.trim() == "2");
        is_finite(Resource::As) || is_finite(Resource::Data) || is_counted
    })
}

fn no_room(len: usize) -> io::Error {
    let kib = len.div_ceil(1024);
    let text = format!(
        "this process may not take {kib} KiB more memory: see its limits on address space and data (`ulimit -v`, \
         `ulimit -d`) and vm.max_map_count"
    );
    io::Error::new(io::ErrorKind::OutOfMemory, text)
}

impl AlignedBuffer {
    /// Returns a buffer of `len` zero bytes. The memory of a small buffer comes from the C library, which may keep it after
    /// the buffer is dropped.
    ///
    /// # Errors
    /// `OutOfMemory` if the process may not take the memory. The text names the limits.
    pub fn try_zeroed(len: usize) -> io::Result<Self> {
        if len >= LARGE {
            return Self::try_mapped(len);
        }
        let mut pages = Vec::new();
        let count = len.div_ceil(DIRECT_ALIGNMENT);
        pages.try_reserve_exact(count).map_err(|_| no_room(len))?;
        pages.resize_with(count, Page::new_zeroed);
        Ok(Self { memory: Memory::Pages(pages), len })
    }

    /// Returns a buffer of `len` zero bytes whose memory goes back to the kernel when it is dropped, however small it is. The C
    /// library would keep the memory of thousands of small buffers.
    ///
    /// # Errors
    /// `OutOfMemory` if the process may not take the memory. The text names the limits.
    pub fn try_mapped(len: usize) -> io::Result<Self> {
        if space_is_limited() {
            has_room(len)?;
        }
        let mapped = MmapMut::map_anon(len.max(1).next_multiple_of(DIRECT_ALIGNMENT)).map_err(|_| no_room(len))?;
        Ok(Self { memory: Memory::Mapped(mapped), len })
    }

    /// Returns a buffer of `len` zero bytes.
    ///
    /// # Panics
    /// Panics or aborts the process if there is no memory. [`AlignedBuffer::try_zeroed`] returns an error instead.
    pub fn zeroed(len: usize) -> Self {
        let mapped = if len < LARGE { None } else { MmapMut::map_anon(len.next_multiple_of(DIRECT_ALIGNMENT)).ok() };
        let memory = mapped
            .map_or_else(|| Memory::Pages(vec![Page::new_zeroed(); len.div_ceil(DIRECT_ALIGNMENT)]), Memory::Mapped);
        Self { memory, len }
    }

    /// Sets the length. Bytes beyond the old length keep the old contents of the memory. This allocates only if `len`
    /// exceeds the largest length that the buffer ever had.
    pub fn resize(&mut self, len: usize) {
        if len > self.memory.bytes().len() {
            let mut larger = Self::zeroed(len);
            larger[..self.len].copy_from_slice(self);
            *self = larger;
        }
        self.len = len;
    }
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Pages(pages) => pages.as_bytes(),
            Self::Mapped(bytes) => bytes,
        }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.memory {
            Memory::Pages(pages) => pages.as_mut_bytes(),
            Memory::Mapped(bytes) => bytes,
        };
        &mut bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_on_a_page_and_keeps_its_length() {
        for len in [0, 1, 511, 4096, 4097, 1 << 20] {
            let buffer = AlignedBuffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % DIRECT_ALIGNMENT, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_refused_buffer_is_an_error_that_names_the_limits() {
        let error = AlignedBuffer::try_mapped(usize::MAX / 4).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
        assert!(error.to_string().contains("`ulimit -v`"), "{error}");
        assert!(AlignedBuffer::try_zeroed(usize::MAX / 4).is_err() && has_room(usize::MAX).is_err());
        for len in [0, 1, 4096, LARGE] {
            let (small, mapped) = (AlignedBuffer::try_zeroed(len).unwrap(), AlignedBuffer::try_mapped(len).unwrap());
            assert!(small.len() == len && mapped.len() == len && small[..] == mapped[..]);
        }
    }

    #[test]
    fn contents_stay_when_a_buffer_grows() {
        let mut buffer = AlignedBuffer::zeroed(100);
        buffer.fill(7);
        for len in [5000, LARGE, 3 * LARGE, 10, LARGE] {
            buffer.resize(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer[..len.min(100)], [7; 100][..len.min(100)]);
        }
    }

    #[test]
    fn a_large_buffer_takes_no_memory_before_it_is_used() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let mut buffer = AlignedBuffer::zeroed(1 << 30);
        buffer[1 << 29] = 1;
        assert!(resident() < before + (512 << 20));
    }
}
