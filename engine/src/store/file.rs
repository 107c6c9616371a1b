//! A block device or a regular file.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Advice, AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::mapping::{BusErrorsCaught, Mapping};
use super::{Allocation, BlockStore, Medium};
use crate::buffer::{AlignedBuffer, DIRECT_ALIGNMENT};

/// No disk has smaller blocks, in bytes.
const SMALLEST_BLOCK: usize = 512;

/// Filesystems whose files are memory: `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
const RESIDENT: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58f6];

/// Bytes that one announcement of a read brings into the page cache, at most: reading further ahead than this would drive
/// out what others have there.
const READ_AHEAD: u64 = 64 << 20;

/// Bytes that direct I/O cannot reach where they are go by way of a buffer of this size, or a smaller one.
const BOUNCE: usize = 1 << 20;

/// What the file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone: every write fails.
    ReadOnly,
    /// Reading and writing. A block device is opened exclusively: `ResourceBusy` when something else holds it.
    ReadWrite,
}

/// Whether the kernel's page cache stands between the store and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// `O_DIRECT` where the filesystem allows it, else the page cache. What a server under a filesystem needs: the
    /// filesystem above caches already, and a second cache can deadlock with it when memory is short.
    Direct,
    /// The page cache.
    PageCache,
}

/// A block device or a regular file of fixed size.
pub struct FileStore {
    file: File,
    len: u64,
    alignment: usize,
    read_only: bool,
    resident: bool,
    mapping: Option<Mapping>,
}

impl FileStore {
    /// Opens `path`.
    ///
    /// # Errors
    /// `InvalidInput` when it is neither a block device nor a regular file, else what the system said.
    pub fn open(path: &Path, access: Access, caching: Caching) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a block device nor a regular file"));
        }
        let mut flags = OFlags::CLOEXEC;
        if kind.is_block_device() && access == Access::ReadWrite {
            flags |= OFlags::EXCL;
        }
        let open = |flags: OFlags| {
            OpenOptions::new()
                .read(true)
                .write(access == Access::ReadWrite)
                .custom_flags(flags.bits().cast_signed())
                .open(path)
        };
        let (file, direct) = match caching {
            Caching::PageCache => (open(flags)?, false),
            Caching::Direct => match open(flags | OFlags::DIRECT) {
                Ok(file) => (file, true),
                // The filesystem has no direct I/O.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => (open(flags)?, false),
                Err(error) => return Err(error),
            },
        };
        let len = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let alignment = match (direct, kind.is_block_device()) {
            (false, _) => 1,
            (true, true) => rustix::fs::ioctl_blksszget(&file)? as usize,
            (true, false) => direct_alignment(&file)?,
        };
        // Direct I/O cannot reach a last piece that is shorter than a block.
        if len % alignment as u64 != 0 {
            return Self::open(path, access, Caching::PageCache);
        }
        let resident = kind.is_file() && RESIDENT.contains(&rustix::fs::fstatfs(&file)?.f_type);
        Ok(Self { file, len, alignment, read_only: access == Access::ReadOnly, resident, mapping: None })
    }

    /// Maps a file that lies in memory, so that its bytes are encrypted and decrypted where they lie. Any other file, and one
    /// that cannot be mapped, stays as it is.
    #[must_use]
    pub fn mapped(self, caught: BusErrorsCaught) -> Self {
        if !self.resident || self.is_empty() {
            return self;
        }
        let mapping = Mapping::new(&self.file, self.len, !self.read_only, caught).ok();
        Self { mapping, ..self }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn is_reachable(&self, data: &[u8]) -> bool {
        self.alignment == 1 || data.as_ptr().addr().is_multiple_of(self.alignment)
    }
}

/// The alignment that direct I/O on a regular file needs, as the filesystem tells it (statx(2), `STATX_DIOALIGN`, Linux
/// 6.1); one that all accept where it doesn't.
fn direct_alignment(file: &File) -> io::Result<usize> {
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let alignment = told.stx_dio_offset_align.max(told.stx_dio_mem_align) as usize;
    let is_told = told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && alignment.is_power_of_two();
    Ok(if is_told { alignment.clamp(SMALLEST_BLOCK, DIRECT_ALIGNMENT) } else { DIRECT_ALIGNMENT })
}

impl BlockStore for FileStore {
    fn len(&self) -> u64 {
        self.len
    }

    fn alignment(&self) -> usize {
        self.alignment
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn medium(&self) -> Medium<'_> {
        Medium::File { file: &self.file, direct: self.alignment > 1, resident: self.resident }
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        if self.is_reachable(data) {
            return self.file.read_exact_at(data, offset);
        }
        let mut bounce = AlignedBuffer::zeroed(data.len().min(BOUNCE));
        for (piece, at) in data.chunks_mut(BOUNCE).zip((offset..).step_by(BOUNCE)) {
            bounce.resize(piece.len());
            self.file.read_exact_at(&mut bounce, at)?;
            piece.copy_from_slice(&bounce);
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if self.is_reachable(data) {
            self.file.write_all_at(data, offset)?;
        } else {
            let mut bounce = AlignedBuffer::zeroed(data.len().min(BOUNCE));
            for (piece, at) in data.chunks(BOUNCE).zip((offset..).step_by(BOUNCE)) {
                bounce.resize(piece.len());
                bounce.copy_from_slice(piece);
                self.file.write_all_at(&bounce, at)?;
            }
        }
        if let Some(mapping) = &self.mapping {
            mapping.written(offset, data.len());
        }
        Ok(())
    }

    fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, &[u8])) -> bool {
        self.mapping.as_ref().is_some_and(|mapping| mapping.show(&self.file, offset, len, each))
    }

    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, &mut [u8])) -> bool {
        !self.read_only && self.mapping.as_ref().is_some_and(|mapping| mapping.fill(&self.file, offset, len, each))
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        // Block devices take it too: the kernel unmaps such that the range reads back as zeros, or refuses.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, len)?;
        if let Some(mapping) = &self.mapping {
            mapping.punched(offset, len);
        }
        Ok(())
    }

    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        let kept = |end| Ok(Allocation { end, is_hole: false });
        // The file's own position moves with it, which nobody uses.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Allocation { end: data.min(self.len), is_hole: true }),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => kept(hole.min(self.len)),
                // It was punched in between, or the file was cut short.
                Ok(_) | Err(Errno::NXIO) => kept(offset + 1),
                Err(error) => Err(error.into()),
            },
            // No data from here to the end.
            Err(Errno::NXIO) => Ok(Allocation { end: self.len, is_hole: true }),
            // A block device knows no holes, nor do some filesystems.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => kept(self.len),
            Err(error) => Err(error.into()),
        }
    }

    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        // Direct I/O goes past the page cache: what were brought there, nobody would read.
        let Some(len) = NonZeroU64::new(len.min(READ_AHEAD)).filter(|_| self.alignment == 1) else { return Ok(()) };
        Ok(rustix::fs::fadvise(&self.file, offset, Some(len), Advice::WillNeed)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read_with_and_without_the_page_cache() {
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = file_of(4 << 20);
            let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            // One byte off any alignment: the store must not pass such a buffer on to direct I/O.
            for len in [0, 8192, BOUNCE, 2 * BOUNCE + 4096] {
                let mut source = AlignedBuffer::zeroed(len + 1);
                source.iter_mut().zip(0..).for_each(|(byte, at): (_, u32)| *byte = (at % 251).to_le_bytes()[0]);
                store.write_at(&source[1..], 4096).unwrap();
                store.flush().unwrap();
                let mut back = AlignedBuffer::zeroed(len + 1);
                store.read_at(&mut back[1..], 4096).unwrap();
                assert!(back[1..] == source[1..], "{len}");
            }
        }
    }

    #[test]
    fn a_discarded_range_of_a_file_reads_as_zeros() {
        let file = file_of(1 << 20);
        let store = FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap();
        store.write_at(&[1; 65536], 0).unwrap();
        store.discard(4096, 8192).unwrap();
        let mut back = [9; 16384];
        store.read_at(&mut back, 0).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 1) && back[4096..12288].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_sparse_file_tells_its_holes_and_a_full_one_has_none() {
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = file_of(1 << 20);
            let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            assert_eq!(store.allocation(4096).unwrap(), Allocation { end: 1 << 20, is_hole: true });
            store.write_at(&[1; 128 << 10], 256 << 10).unwrap();
            assert_eq!(store.allocation(0).unwrap(), Allocation { end: 256 << 10, is_hole: true });
            assert_eq!(store.allocation(300 << 10).unwrap(), Allocation { end: 384 << 10, is_hole: false });
            store.discard(320 << 10, 64 << 10).unwrap();
            assert_eq!(store.allocation(256 << 10).unwrap(), Allocation { end: 320 << 10, is_hole: false });
            assert_eq!(store.allocation(320 << 10).unwrap(), Allocation { end: 1 << 20, is_hole: true });
            store.will_read(0, u64::MAX).unwrap();
        }
    }

    #[test]
    fn a_directory_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let error = FileStore::open(dir.path(), Access::ReadOnly, Caching::Direct).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_whose_end_is_no_block_boundary_is_read_to_its_last_byte() {
        let file = file_of(4096 + 512);
        let store = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
        store.write_at(&[3; 512], 4096).unwrap();
        let mut back = [0; 512];
        store.read_at(&mut back, 4096).unwrap();
        assert_eq!(back, [3; 512]);
    }
}
