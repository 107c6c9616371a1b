//! The filesystem of one file: the volume's plaintext.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use engine::buffer::AlignedBuffer;
use engine::volume::{Volume, VolumeError};
use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use rustix::fs::FallocateFlags;

use crate::attach::signal::{Ended, EndedSender};

/// What the volume is called in its mount.
pub(super) const FILE_NAME: &str = "volume";

const FILE: INodeNo = INodeNo(2);

/// Bytes of one write: what 256 pages make, the most that the kernel sends unless told otherwise by sysctl.
const MAX_WRITE: u32 = 1 << 20;

/// Requests that the kernel may have under way before it makes the loop driver wait: twice that driver's queue.
const MAX_BACKGROUND: u16 = 256;

/// The kernel may keep what it knows: nothing about the file ever changes.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

thread_local! {
    /// Each serving thread's block of memory, kept from request to request: a server under a filesystem had better not
    /// allocate while the kernel is short of memory.
    static BLOCK: RefCell<AlignedBuffer> = RefCell::new(AlignedBuffer::zeroed(MAX_WRITE as usize));
}

/// How often the file is open. When nobody has it open any more, the loop device is gone.
#[derive(Debug)]
pub(super) struct OpenFiles {
    count: AtomicUsize,
    ended: EndedSender,
}

impl OpenFiles {
    pub(super) fn new(ended: EndedSender) -> Self {
        Self { count: AtomicUsize::new(0), ended }
    }

    /// Tells of it, should nobody have the file open.
    pub(super) fn notice_end(&self) {
        if self.count.load(Ordering::SeqCst) == 0 {
            self.ended.send(Ended::Disconnected);
        }
    }

    fn open(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    fn close(&self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        self.notice_end();
    }
}

/// A directory with one file in it, mode 0600, which is the volume.
pub(super) struct VolumeFile {
    volume: Arc<Volume>,
    read_only: bool,
    open_files: Arc<OpenFiles>,
    made: SystemTime,
}

impl VolumeFile {
    pub(super) fn new(volume: Arc<Volume>, read_only: bool, open_files: Arc<OpenFiles>) -> Self {
        Self { volume, read_only, open_files, made: SystemTime::now() }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o700, 0),
            FILE => (FileType::RegularFile, if self.read_only { 0o400 } else { 0o600 }, self.volume.len()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.volume.read(offset, data).map_err(|error| errno(&error))
    }

    fn write_at(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.writable()?;
        self.volume.write(offset, data).map_err(|error| errno(&error))
    }

    /// fallocate(2) on a file whose size never changes.
    ///
    /// The loop driver asks for a punched hole both to discard and to make a range read as zeros; nothing tells the one
    /// from the other, and a hole must read as zeros. Under a cipher discarded space does not, so there the answer
    /// is "unsupported": the kernel then discards nothing, and zeroes by writing zeros.
    fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        self.writable()?;
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let zeroed = |may_discard| self.volume.write_zeroes(offset, len, may_discard).map_err(|error| errno(&error));
        match mode - FallocateFlags::KEEP_SIZE {
            FallocateFlags::PUNCH_HOLE if !self.volume.is_encrypted() => zeroed(true),
            FallocateFlags::ZERO_RANGE => zeroed(false),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }
}

impl Filesystem for VolumeFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the loop driver's requests are answered one after another. Every kernel since 3.13 has it.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&FOREVER, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        for ((inode, kind, name), next) in entries.into_iter().zip(1u64..) {
            if next > offset && reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::EISDIR);
        }
        if self.read_only && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        self.open_files.open();
        // The page cache stands above the loop device already.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        self.open_files.close();
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // Reading stops at the end of a file, and no byte past it is an error.
        let len = u64::from(size).min(self.volume.len().saturating_sub(offset));
        let Ok(len) = usize::try_from(len) else { return reply.error(Errno::EINVAL) };
        BLOCK.with_borrow_mut(|block| {
            block.resize(len);
            match self.read_at(offset, block) {
                Ok(()) => reply.data(block),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Ok(written) = u32::try_from(data.len()) else { return reply.error(Errno::EINVAL) };
        BLOCK.with_borrow_mut(|block| {
            // One copy: it is encrypted where it stands, and lies there as direct I/O wants it.
            block.resize(data.len());
            block.copy_from_slice(data);
            match self.write_at(offset, block) {
                Ok(()) => reply.written(written),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Said on every close(2), and promises nothing.
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.volume.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match self.allocate(offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }
}

/// The one place where a volume's error becomes the kernel's.
fn errno(error: &VolumeError) -> Errno {
    match error {
        // A file that cannot grow.
        VolumeError::OutOfRange { .. } => Errno::ENOSPC,
        VolumeError::ReadOnly => Errno::EROFS,
        VolumeError::Store(error) => error.raw_os_error().map_or(Errno::EIO, Errno::from_i32),
    }
}

#[cfg(test)]
mod tests {
    use engine::key::VolumeKey;
    use engine::luks::Segment;
    use engine::sector::{Lba512, SectorSize};
    use engine::store::MemoryStore;

    use super::*;
    use crate::attach::signal::ended_signal;

    const LEN: usize = 64 << 10;
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

    fn encrypted() -> Volume {
        let segment = Segment { offset: 0, len: LEN as u64, sector_size: SectorSize::B512, iv_start: Lba512(0) };
        let key = VolumeKey::new((0..64).collect()).unwrap();
        Volume::encrypted(Arc::new(MemoryStore::zeroed(LEN)), segment, &key).unwrap()
    }

    fn plaintext() -> Volume {
        Volume::plaintext(Arc::new(MemoryStore::from(vec![7; LEN])), SectorSize::B512).unwrap()
    }

    fn file(volume: Volume, read_only: bool) -> VolumeFile {
        VolumeFile::new(Arc::new(volume), read_only, Arc::new(OpenFiles::new(ended_signal().0)))
    }

    fn allocate(file: &VolumeFile, mode: FallocateFlags) -> Result<(), i32> {
        file.allocate(4096, 8192, mode.bits().cast_signed()).map_err(i32::from)
    }

    fn read(file: &VolumeFile) -> Vec<u8> {
        let mut data = vec![1; 8192];
        file.read_at(4096, &mut data).unwrap();
        data
    }

    #[test]
    fn a_hole_reads_as_zeros_or_is_refused() {
        let plain = file(plaintext(), false);
        allocate(&plain, PUNCH).unwrap();
        assert!(read(&plain).iter().all(|byte| *byte == 0));

        let cipher = file(encrypted(), false);
        cipher.write_at(4096, &mut [9; 8192]).unwrap();
        assert_eq!(allocate(&cipher, PUNCH), Err(i32::from(Errno::EOPNOTSUPP)));
        assert!(read(&cipher).iter().all(|byte| *byte == 9));
    }

    #[test]
    fn a_zeroed_range_reads_as_zeros_under_a_cipher_too() {
        let cipher = file(encrypted(), false);
        cipher.write_at(4096, &mut [9; 8192]).unwrap();
        allocate(&cipher, FallocateFlags::ZERO_RANGE).unwrap();
        assert!(read(&cipher).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_file_neither_grows_nor_changes_when_it_is_read_only() {
        let small = file(encrypted(), false);
        assert_eq!(allocate(&small, FallocateFlags::empty()), Err(i32::from(Errno::EOPNOTSUPP)));
        assert_eq!(i32::from(small.write_at(LEN as u64, &mut [0]).unwrap_err()), i32::from(Errno::ENOSPC));
        let fixed = file(encrypted(), true);
        assert_eq!(i32::from(fixed.write_at(0, &mut [0]).unwrap_err()), i32::from(Errno::EROFS));
        assert_eq!(allocate(&fixed, FallocateFlags::ZERO_RANGE), Err(i32::from(Errno::EROFS)));
    }

    #[test]
    fn the_last_close_is_an_end_only_when_nobody_asked_for_it() {
        let (sender, signal) = ended_signal();
        let files = OpenFiles::new(sender.clone());
        files.open();
        files.close();
        assert_eq!(signal.get(), None);
        sender.set_armed(true);
        files.open();
        files.open();
        files.close();
        assert_eq!(signal.get(), None);
        files.close();
        assert_eq!(signal.get(), Some(Ended::Disconnected));
    }
}
