//! A block device or a regular file.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Advice, AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::mapping::{BusErrorsCaught, MappedBytes, MappedBytesMut, Mapping};
use super::{Allocation, BlockStore, FlushLatch, Medium};
use crate::buffer::{AlignedBuffer, DIRECT_ALIGNMENT, has_room};
use crate::text::bytes;

/// The smallest block size of any disk, in bytes.
const SMALLEST_BLOCK: usize = 512;

/// Filesystems whose files lie in memory: `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
const RESIDENT: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58f6];

/// Filesystems that may share blocks between files, and write shared blocks only as a whole: `XFS_SUPER_MAGIC`, and
/// `OVERLAYFS_SUPER_MAGIC`, because an overlay may lie on XFS (linux/magic.h).
const SHARING: [rustix::fs::FsWord; 2] = [0x5846_5342, 0x794c_7630];

/// The maximum number of bytes that one call of `will_read` brings into the page cache. Reading further ahead would
/// displace other pages from the cache.
const READ_AHEAD: u64 = 64 << 20;

/// The largest size of the bounce buffer. It is used for data whose address direct I/O does not accept.
const BOUNCE: usize = 1 << 20;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only for reading. Every write fails.
    ReadOnly,
    /// For reading and writing. A block device is opened exclusively: opening it fails with `ResourceBusy` if it is in use.
    ReadWrite,
}

/// Whether the kernel's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// `O_DIRECT` if the filesystem allows it, otherwise the page cache. A server below a filesystem needs this: the filesystem
    /// caches already, and a second cache can deadlock with it if memory is short.
    Direct,
    /// The page cache.
    PageCache,
}

/// A block device or a regular file of fixed size.
pub struct FileStore {
    file: File,
    /// Used in log messages.
    path: PathBuf,
    len: u64,
    end: End,
    alignment: usize,
    /// See [`Medium::File`].
    writes_through: bool,
    read_only: bool,
    resident: bool,
    mapping: Option<Mapping>,
    latch: FlushLatch,
}

/// Where a regular file ends. The file can be cut short while it is open. A write beyond its end would then make it
/// longer again. The hole before that write would read as zeros, which decrypt to noise.
///
/// Nothing prevents this completely, because Linux has no write that keeps a file's size. Therefore the size is checked
/// before each write. (The io_uring session checks the size once for all requests that arrive together, which costs almost
/// nothing.) If the file is cut between the check and the write, the next check usually notices this. The exception is a
/// write that ended exactly at the old end, because the file then has its old size again. A cut that was found is never
/// forgotten: if the file grows again, its old contents are still lost.
struct End {
    /// The smallest size that was seen.
    seen: AtomicU64,
    /// Whether the size can shrink. A block device's size changes only at its driver's command, and the driver then refuses
    /// requests past the end.
    can_shrink: bool,
}

/// The error for a range of a file that became shorter while it was open.
#[derive(Debug, thiserror::Error)]
#[error("{} was cut short to {} while in use: the data beyond is lost", path.display(), bytes(*end))]
struct CutShort {
    path: PathBuf,
    end: u64,
}

impl FileStore {
    /// Opens `path`.
    ///
    /// # Errors
    /// `InvalidInput` if `path` is neither a block device nor a regular file, otherwise the error of the system.
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
                // The filesystem does not support direct I/O.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => (open(flags)?, false),
                Err(error) => return Err(error),
            },
        };
        let len = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let (alignment, writes_through) = match (direct, kind.is_block_device()) {
            (false, _) => (1, false),
            (true, true) => (rustix::fs::ioctl_blksszget(&file)? as usize, true),
            (true, false) => direct_alignment(&file, len)?,
        };
        // Direct I/O cannot access a last piece that is shorter than a block.
        if len % alignment as u64 != 0 {
            // A block device is open exclusively, so this file would keep the device from being opened again.
            drop(file);
            return Self::open(path, access, Caching::PageCache);
        }
        let resident = kind.is_file() && RESIDENT.contains(&rustix::fs::fstatfs(&file)?.f_type);
        Ok(Self {
            file,
            path: path.to_owned(),
            len,
            end: End { seen: AtomicU64::new(len), can_shrink: kind.is_file() },
            alignment,
            writes_through,
            read_only: access == Access::ReadOnly,
            resident,
            mapping: None,
            latch: FlushLatch::new(path.display().to_string()),
        })
    }

    /// Maps the file if it lies in memory, so that its bytes are encrypted and decrypted in place. Any other file, and a file
    /// that cannot be mapped, stays as it is.
    #[must_use]
    pub fn mapped(self, caught: BusErrorsCaught) -> Self {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        if !self.resident || self.is_empty() || has_room(len).is_err() {
            return self;
        }
        let mapping = Mapping::new(&self.file, self.len, !self.read_only, caught).ok();
        Self { mapping, ..self }
    }

    /// Turns direct I/O off. The open file stays the same, with its locks.
    ///
    /// # Errors
    /// The error of fcntl(2).
    pub fn into_buffered(self) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&self.file)?;
        rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT)?;
        Ok(Self { alignment: 1, writes_through: false, ..self })
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn is_reachable(&self, data: &[u8]) -> bool {
        self.alignment == 1 || data.as_ptr().addr().is_multiple_of(self.alignment)
    }

    /// Reads all of `data`. If the read reaches the end of the file, checks whether the file was cut short.
    fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                self.check_end();
                return self.check_within(offset, data.len() as u64).err().unwrap_or(error);
            }
            error
        })
    }
}

/// Returns the alignment for direct I/O on a regular file of `len` bytes, and whether direct I/O on it bypasses the page cache.
///
/// The filesystem states the alignment in statx(2) (`STATX_DIOALIGN`, Linux 6.1). The filesystem states it only if direct I/O
/// bypasses the page cache: ext4 states no alignment for a file with `data=journal`, and btrfs states none for any file. If the
/// filesystem states none, this function returns an alignment that all filesystems accept.
fn direct_alignment(file: &File, len: u64) -> io::Result<(usize, bool)> {
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let alignment = told.stx_dio_offset_align.max(told.stx_dio_mem_align) as usize;
    let is_told = told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && alignment.is_power_of_two();
    let filesystem = rustix::fs::fstatfs(file)?;
    let block = SHARING.contains(&filesystem.f_type).then(|| usize::try_from(filesystem.f_bsize).unwrap_or(usize::MAX));
    Ok(choose_alignment(is_told.then_some(alignment), block, len))
}

/// Chooses what [`direct_alignment`] returns, from the stated alignment and from the size of the blocks that XFS writes only as a
/// whole.
///
/// A file on XFS may share its blocks with another file at any time (`cp --reflink`). XFS then buffers a direct write
/// of less than a block, without waiting for the write-back.
fn choose_alignment(told: Option<usize>, block: Option<usize>, len: u64) -> (usize, bool) {
    let Some(told) = told else { return (DIRECT_ALIGNMENT, false) };
    let told = told.clamp(SMALLEST_BLOCK, DIRECT_ALIGNMENT);
    match block.filter(|block| *block > told) {
        None => (told, true),
        Some(block) if block <= DIRECT_ALIGNMENT && len.is_multiple_of(block as u64) => (block, true),
        Some(_) => (told, false),
    }
}

impl BlockStore for FileStore {
    fn len(&self) -> u64 {
        self.len
    }

    fn alignment(&self) -> usize {
        self.alignment
    }

    fn buffered(&self) -> io::Result<Option<Arc<dyn BlockStore>>> {
        let store = Self {
            // A duplicate shares the flags and the locks of the file.
            file: self.file.try_clone()?,
            path: self.path.clone(),
            len: self.len,
            end: End { seen: AtomicU64::new(self.end.seen.load(Ordering::Relaxed)), ..self.end },
            alignment: self.alignment,
            writes_through: self.writes_through,
            read_only: self.read_only,
            resident: self.resident,
            mapping: None,
            latch: FlushLatch::new(self.path.display().to_string()),
        };
        let store = store.into_buffered()?;
        Ok(Some(Arc::new(store)))
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn medium(&self) -> Medium<'_> {
        Medium::File {
            file: &self.file,
            direct: self.alignment > 1,
            writes_through: self.writes_through,
            resident: self.resident,
            latch: &self.latch,
        }
    }

    fn check_end(&self) {
        if !self.end.can_shrink {
            return;
        }
        // If the system cannot tell, the request itself will report an error.
        let Ok(status) = rustix::fs::fstat(&self.file) else { return };
        let end = u64::try_from(status.st_size).unwrap_or(0);
        if end < self.len && self.end.seen.fetch_min(end, Ordering::Relaxed) == self.len {
            tracing::error!(
                "{} was cut short from {} to {} while in use. The data beyond is lost: reads and writes there fail until \
                 the volume is opened again. Stop the volume, and restore the file from a backup",
                self.path.display(),
                bytes(self.len),
                bytes(end)
            );
        }
    }

    fn check_within(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.end.seen.load(Ordering::Relaxed);
        // For ranges past the original length, the disk itself returns an error.
        if end < self.len && offset.saturating_add(len) > end {
            return Err(io::Error::other(CutShort { path: self.path.clone(), end }));
        }
        Ok(())
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_within(offset, data.len() as u64)?;
        if self.is_reachable(data) {
            return self.read_exact_at(data, offset);
        }
        let mut bounce = AlignedBuffer::try_zeroed(data.len().min(BOUNCE))?;
        for (piece, at) in data.chunks_mut(BOUNCE).zip((offset..).step_by(BOUNCE)) {
            bounce.resize(piece.len());
            self.read_exact_at(&mut bounce, at)?;
            piece.copy_from_slice(&bounce);
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check_end();
        self.check_within(offset, data.len() as u64)?;
        if self.is_reachable(data) {
            self.file.write_all_at(data, offset)?;
        } else {
            let mut bounce = AlignedBuffer::try_zeroed(data.len().min(BOUNCE))?;
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

    fn show(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytes<'_>)) -> bool {
        let Some(mapping) = &self.mapping else { return false };
        self.check_within(offset, len as u64).is_ok() && mapping.show(&self.file, offset, len, each)
    }

    fn fill(&self, offset: u64, len: usize, each: &mut dyn FnMut(usize, MappedBytesMut<'_>)) -> bool {
        let Some(mapping) = self.mapping.as_ref().filter(|_| !self.read_only) else { return false };
        self.check_within(offset, len as u64).is_ok() && mapping.fill(&self.file, offset, len, each)
    }

    fn flush(&self) -> io::Result<()> {
        self.latch.flush(|| self.file.sync_data())
    }

    fn flush_failure(&self) -> Option<String> {
        self.latch.failure().map(str::to_owned)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.check_end();
        self.check_within(offset, len)?;
        // Block devices accept this, too. The kernel refuses if the range would not read as zeros afterwards.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, offset, len)?;
        if let Some(mapping) = &self.mapping {
            mapping.punched(offset, len);
        }
        Ok(())
    }

    fn discards_quickly(&self) -> bool {
        // A regular file is discarded quickly, because it only loses extents. Only regular files can shrink.
        self.end.can_shrink
    }

    fn allocation(&self, offset: u64) -> io::Result<Allocation> {
        self.check_end();
        self.check_within(offset, 1)?;
        let kept = |end| Ok(Allocation { end, is_hole: false });
        // This moves the file's own position, which nothing uses.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Allocation { end: data.min(self.len), is_hole: true }),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => kept(hole.min(self.len)),
                // A hole was punched since the first call, or the file was cut short.
                Ok(_) | Err(Errno::NXIO) => kept(offset + 1),
                Err(error) => Err(error.into()),
            },
            // There is no data from here to the end.
            Err(Errno::NXIO) => Ok(Allocation { end: self.len, is_hole: true }),
            // Block devices and some filesystems do not know holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => kept(self.len),
            Err(error) => Err(error.into()),
        }
    }

    fn will_read(&self, offset: u64, len: u64) -> io::Result<()> {
        // Direct I/O bypasses the page cache, so nothing would read the pages that are brought there.
        let Some(len) = NonZeroU64::new(len.min(READ_AHEAD)).filter(|_| self.alignment == 1) else { return Ok(()) };
        Ok(rustix::fs::fadvise(&self.file, offset, Some(len), Advice::WillNeed)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaller_writes_than_blocks_on_xfs_count_as_buffered() {
        let mib = 1 << 20;
        assert_eq!(choose_alignment(None, None, mib), (4096, false));
        assert_eq!(choose_alignment(Some(512), None, mib), (512, true));
        assert_eq!(choose_alignment(Some(4096), None, mib), (4096, true));
        assert_eq!(choose_alignment(Some(512), Some(4096), mib), (4096, true));
        assert_eq!(choose_alignment(Some(512), Some(512), mib), (512, true));
        assert_eq!(choose_alignment(Some(512), Some(1024), mib + 1024), (1024, true));
        // The file's end could not be written directly.
        assert_eq!(choose_alignment(Some(512), Some(4096), mib + 512), (512, false));
        // No buffer has such a large alignment.
        assert_eq!(choose_alignment(Some(512), Some(65536), mib), (512, false));
    }

    fn file_of(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn discarding_in_a_regular_file_is_quick() {
        let file = file_of(1 << 20);
        assert!(FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap().discards_quickly());
    }

    #[test]
    fn written_bytes_are_read_with_and_without_the_page_cache() {
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = file_of(4 << 20);
            let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            // The buffer is one byte off any alignment. The store must not pass it on to direct I/O.
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
    fn a_sparse_file_tells_its_holes() {
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
    fn a_file_cut_short_is_not_extended_again() {
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = file_of(1 << 20);
            let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            store.write_at(&[1; 4096], (1 << 20) - 4096).unwrap();
            file.as_file().set_len(512 << 10).unwrap();
            let error = store.write_at(&[1; 4096], (1 << 20) - 4096).unwrap_err();
            assert!(error.to_string().contains("was cut short to 524288 bytes"), "{error}");
            assert!(store.read_at(&mut [0; 4096], (1 << 20) - 4096).is_err());
            assert!(store.discard((1 << 20) - 4096, 4096).is_err() && store.allocation(600 << 10).is_err());
            // A write that ends before the new end succeeds.
            store.write_at(&[1; 4096], 0).unwrap();
            assert!(store.write_at(&[1; 8192], (512 << 10) - 4096).is_err());
            assert_eq!(file.as_file().metadata().unwrap().len(), 512 << 10);
        }
    }

    #[test]
    fn a_buffered_store_is_the_same_file_at_any_offset() {
        let file = file_of(1 << 20);
        let direct = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
        direct.write_at(&[7; 4096], 0).unwrap();
        let buffered = direct.buffered().unwrap().unwrap();
        assert_eq!((buffered.alignment(), buffered.len()), (1, 1 << 20));
        buffered.write_at(b"at any offset", 777).unwrap();
        buffered.flush().unwrap();
        let mut back = [0; 15];
        buffered.read_at(&mut back, 776).unwrap();
        assert_eq!(&back, b"\x07at any offset\x07");
        let flags = rustix::fs::fcntl_getfl(direct.file()).unwrap();
        assert!(!flags.contains(OFlags::DIRECT));
    }

    #[test]
    fn a_directory_is_not_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        let error = FileStore::open(dir.path(), Access::ReadOnly, Caching::Direct).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_with_a_partial_last_block_is_read_completely() {
        let file = file_of(4096 + 512);
        let store = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
        store.write_at(&[3; 512], 4096).unwrap();
        let mut back = [0; 512];
        store.read_at(&mut back, 4096).unwrap();
        assert_eq!(back, [3; 512]);
    }
}
