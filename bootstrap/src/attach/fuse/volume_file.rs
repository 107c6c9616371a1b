//! The FUSE filesystem, which has one file: the volume's plaintext.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use engine::buffer::AlignedBuffer;
use engine::volume::{Volume, VolumeError};
use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use nbd_server::failures::FailureLog;
use nbd_server::statistics::{Blame, Operation, Statistics};
use rustix::fs::FallocateFlags;

use crate::attach::signal::{Ended, EndedSender};

/// The file's name in the mount.
pub(super) const FILE_NAME: &str = "volume";

const FILE: INodeNo = INodeNo(2);

/// The maximum number of bytes in one write: 256 pages. The kernel sends no more, unless a sysctl raises this limit.
const MAX_WRITE: u32 = 1 << 20;

/// The maximum number of requests in flight before the kernel makes the loop driver wait. It is twice the length of the loop
/// driver's queue.
const MAX_BACKGROUND: u16 = 256;

/// How long the kernel may cache attributes. A long time is safe, because the file's attributes never change.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

thread_local! {
    /// Each serving thread's buffer. It is kept from request to request, because a server of a filesystem should not
    /// allocate while the kernel is short of memory.
    static BLOCK: RefCell<AlignedBuffer> = RefCell::new(AlignedBuffer::zeroed(MAX_WRITE as usize));
}

/// Counts how often the file is open. When it is no longer open, the loop device is gone.
#[derive(Debug)]
pub(super) struct OpenFiles {
    count: AtomicUsize,
    ended: EndedSender,
}

impl OpenFiles {
    pub(super) fn new(ended: EndedSender) -> Self {
        Self { count: AtomicUsize::new(0), ended }
    }

    /// Signals the end if the file is not open.
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

/// A directory with one file of mode 0600, which is the volume.
pub(super) struct VolumeFile {
    volume: Arc<Volume>,
    read_only: bool,
    open_files: Arc<OpenFiles>,
    made: SystemTime,
    /// The volume's name in the log.
    called: String,
    failures: FailureLog,
    statistics: Arc<Statistics>,
}

impl VolumeFile {
    pub(super) fn new(
        volume: Arc<Volume>,
        read_only: bool,
        open_files: Arc<OpenFiles>,
        called: &str,
        statistics: Arc<Statistics>,
    ) -> Self {
        let (made, called, failures) = (SystemTime::now(), called.to_owned(), FailureLog::default());
        Self { volume, read_only, open_files, made, called, failures, statistics }
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
        let len = data.len() as u64;
        self.counted(Operation::Read, len, || {
            self.volume.read(offset, data).map_err(|error| self.failed("a read", Some((offset, len)), &error))
        })
    }

    fn write_at(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let len = data.len() as u64;
        self.counted(Operation::Write, len, || {
            self.writable()?;
            self.volume.write(offset, data).map_err(|error| self.failed("a write", Some((offset, len)), &error))
        })
    }

    /// Handles fallocate(2). The file's size never changes.
    ///
    /// The loop driver punches a hole both to discard a range and to zero a range. The request does not say which of the two is
    /// meant, so a hole must read as zeros. Discarded space of an encrypted volume does not read as zeros, so such a volume
    /// answers "unsupported". The kernel then discards nothing, and zeroes a range by writing zeros.
    fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        self.counted(Operation::WriteZeroes, len, || {
            self.writable()?;
            let may_discard = match mode - FallocateFlags::KEEP_SIZE {
                FallocateFlags::PUNCH_HOLE if !self.volume.is_encrypted() => true,
                FallocateFlags::ZERO_RANGE => false,
                _ => return Err(Errno::EOPNOTSUPP),
            };
            let zeroed = self.volume.write_zeroes(offset, len, may_discard);
            zeroed.map_err(|error| self.failed("a write of zeros", Some((offset, len)), &error))
        })
    }

    fn sync(&self) -> Result<(), Errno> {
        self.counted(Operation::Flush, 0, || self.volume.flush().map_err(|error| self.failed("a flush", None, &error)))
    }

    /// Carries out a request of the kernel, counts it and measures it. `len` is the number of bytes that it concerns.
    fn counted(&self, operation: Operation, len: u64, work: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let begun = Instant::now();
        let done = without_panic(work);
        let now = Instant::now();
        self.statistics.latency().add(operation.into(), now - begun);
        match &done {
            Ok(()) => self.statistics.succeeded(operation, len),
            Err(errno) => {
                let (error, blame) = kind(errno);
                self.statistics.has_failed(operation, error, blame, now);
            }
        }
        done
    }

    /// Logs an error of the disk, and returns the error for the kernel. `range` is offset and length.
    fn failed(&self, operation: &'static str, range: Option<(u64, u64)>, error: &VolumeError) -> Errno {
        if let VolumeError::Store(error) = error {
            let place = range.map(|(offset, len)| format!(" of {len} bytes at offset {offset}")).unwrap_or_default();
            self.failures.log(&self.called, operation, &place, error, Instant::now());
        }
        errno(error)
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }
}

/// Runs a request of the kernel, and turns a panic into an I/O error. Otherwise a panic would end one of the threads that
/// serve the file, and ended threads are not replaced.
fn without_panic(work: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Errno::EIO))
}

impl Filesystem for VolumeFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without this flag, the loop driver's requests are answered one after another. Every kernel since 3.13 has it.
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
        // The loop device on this file has a page cache already.
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
        // A read stops at the end of the file. Bytes after it are not an error.
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
            // The data is copied once. The copy is aligned for direct I/O and is encrypted in place.
            block.resize(data.len());
            block.copy_from_slice(data);
            match self.write_at(offset, block) {
                Ok(()) => reply.written(written),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // The kernel sends this at every close(2). A close does not promise that the data is on the disk.
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.sync() {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
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

/// Returns what a failed request is counted as: the error's name, and what is to blame. The kernel sends no request beyond the
/// file's end, so the disk is to blame for each lack of space.
fn kind(errno: &Errno) -> (&'static str, Blame) {
    use rustix::io::Errno as Number;
    match Number::from_raw_os_error(i32::from(*errno)) {
        Number::ROFS => ("EROFS", Blame::Client),
        Number::OPNOTSUPP => ("EOPNOTSUPP", Blame::Client),
        Number::NOSPC | Number::DQUOT | Number::FBIG => ("ENOSPC", Blame::Disk),
        Number::NOMEM => ("ENOMEM", Blame::Disk),
        _ => ("EIO", Blame::Disk),
    }
}

/// Turns a volume's error into one for the kernel. No other code does this.
fn errno(error: &VolumeError) -> Errno {
    match error {
        // The error for a file that cannot grow.
        VolumeError::OutOfRange { .. } => Errno::ENOSPC,
        VolumeError::ReadOnly => Errno::EROFS,
        VolumeError::Store(error) => error.raw_os_error().map_or(Errno::EIO, Errno::from_i32),
    }
}

#[cfg(test)]
mod tests {
    use engine::key::VolumeKey;
    use engine::layout::Segment;
    use engine::sector::{Lba512, SectorSize};
    use engine::store::{FaultyStore, MemoryStore};
    use nbd_server::statistics::latency::Class;

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
        let open_files = Arc::new(OpenFiles::new(ended_signal().0));
        VolumeFile::new(Arc::new(volume), read_only, open_files, "a test", Arc::default())
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
    fn the_file_never_grows_nor_changes_if_read_only() {
        let small = file(encrypted(), false);
        assert_eq!(allocate(&small, FallocateFlags::empty()), Err(i32::from(Errno::EOPNOTSUPP)));
        assert_eq!(i32::from(small.write_at(LEN as u64, &mut [0]).unwrap_err()), i32::from(Errno::ENOSPC));
        let fixed = file(encrypted(), true);
        assert_eq!(i32::from(fixed.write_at(0, &mut [0]).unwrap_err()), i32::from(Errno::EROFS));
        assert_eq!(allocate(&fixed, FallocateFlags::ZERO_RANGE), Err(i32::from(Errno::EROFS)));
    }

    #[test]
    fn requests_are_counted_and_measured() {
        let file = file(encrypted(), false);
        file.write_at(0, &mut [1; 4096]).unwrap();
        file.read_at(0, &mut [0; 512]).unwrap();
        file.sync().unwrap();
        allocate(&file, PUNCH).unwrap_err();
        let counters = file.statistics.snapshot();
        assert_eq!((counters.requests, counters.errors), (4, 1));
        assert_eq!((counters.bytes_read, counters.bytes_written), (512, 4096));
        let failed: Vec<_> = file.statistics.failed().iter().map(|failed| (failed.error, failed.blame)).collect();
        assert_eq!(failed, [("EOPNOTSUPP", Blame::Client)]);
        let measured = Class::ALL.map(|class| file.statistics.latency().times(class).requests());
        assert_eq!(measured, [1, 1, 1, 1]);
    }

    #[test]
    fn the_last_close_is_reported_only_while_armed() {
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

    #[test]
    fn a_panic_is_answered_as_an_error_of_the_disk() {
        let disk = FaultyStore::new(MemoryStore::zeroed(LEN), |_| panic!("on purpose"));
        let file = file(Volume::plaintext(Arc::new(disk), SectorSize::B512).unwrap(), false);
        let errors = [
            file.read_at(4096, &mut [0; 512]),
            file.write_at(4096, &mut [0; 512]),
            file.allocate(4096, 8192, FallocateFlags::ZERO_RANGE.bits().cast_signed()),
            file.sync(),
        ];
        assert!(errors.into_iter().all(|result| i32::from(result.unwrap_err()) == i32::from(Errno::EIO)));
    }

    /// A log for the test to read.
    #[derive(Clone, Default)]
    struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_first_failure_of_each_kind_is_in_the_log() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let disk = FaultyStore::new(MemoryStore::zeroed(LEN), |_| Some(io::ErrorKind::Other));
        let file = file(Volume::plaintext(Arc::new(disk), SectorSize::B512).unwrap(), false);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..5 {
                file.read_at(4096, &mut [0; 512]).unwrap_err();
            }
            file.write_at(4096, &mut [0; 512]).unwrap_err();
            file.sync().unwrap_err();
            // This is an error of the kernel's request, not of the disk, so it is not logged.
            file.read_at(LEN as u64, &mut [0; 512]).unwrap_err();
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(log.lines().count(), 3, "{log}");
        let places = ["a read of 512 bytes at offset 4096 failed", "a write of 512 bytes", "a test: a flush failed"];
        assert!(places.iter().all(|place| log.contains(place)), "{log}");
    }
}
