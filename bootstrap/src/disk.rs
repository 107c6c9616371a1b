//! The disk that holds the ciphertext: found, made where it is a file, and opened for this process alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::store::{Access, Caching, FileStore};
use rustix::fs::FlockOperation;

use crate::mounts;

/// How long udev may look at a block device.
const UDEV_PATIENCE: Duration = Duration::from_secs(5);
/// How long cryptsetup may be at work on a header.
const CRYPTSETUP_PATIENCE: Duration = Duration::from_secs(5);
/// Where cryptsetup keeps its locks on block devices' headers (`DEFAULT_LUKS2_LOCK_PATH`).
const HEADER_LOCKS: &str = "/run/cryptsetup";

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is nothing of the name.
    #[error("{} does not exist: check the name, or make it (for a file: `size = \"2G\"` under [volume], or `nbdcrypt format --size`)", .0.display())]
    Missing(PathBuf),
    /// cryptsetup's lock on a header cannot be taken.
    #[error(
        "the lock that cryptsetup takes on the header, {}, is not to be had ({source}){}",
        lock.display(),
        if lock.starts_with(HEADER_LOCKS) { ": is there a writable /run?" } else { "" }
    )]
    NoLock {
        /// Its file.
        lock: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else has it.
    #[error("{} is in use: {by}", path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
        /// Who has it and what to do.
        by: String,
    },
    /// A directory, a socket, a character device.
    #[error("{} is neither a block device nor a regular file", .0.display())]
    WrongKind(PathBuf),
    /// A new file was asked for, where there is something.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// Permission is missing.
    #[error("{}: permission denied; run as root, or as the owner of the file", .0.display())]
    Denied(PathBuf),
    /// Anything else that the system said.
    #[error("{}: {source}", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Opens `path`, for this process alone where it is to be written: a block device exclusively, a file under a lock.
///
/// # Errors
/// [`DiskError`].
pub fn open(path: &Path, access: Access, caching: Caching) -> Result<FileStore, DiskError> {
    let metadata = std::fs::metadata(path).map_err(|error| translate(path, error))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::WrongKind(path.to_owned()));
    }
    if kind.is_file()
        && access == Access::ReadWrite
        && let Some(device) = loop_device_on(path)
    {
        let by = format!("the loop device {device} is on it (losetup -d {device})");
        return Err(DiskError::InUse { path: path.to_owned(), by });
    }
    let store = FileStore::open(path, access, caching).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => DiskError::InUse { path: path.to_owned(), by: user_of(metadata.rdev()) },
        _ => translate(path, error),
    })?;
    let claim = || match kind.is_file() {
        true => claim_file(&store, access),
        false => claim_block_device(&store, access),
    };
    // udev holds a lock on a block device for a moment whenever something about it has changed.
    let patience = if kind.is_block_device() { UDEV_PATIENCE } else { Duration::ZERO };
    match in_time(patience, claim) {
        Ok(()) => Ok(store),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(DiskError::InUse {
            path: path.to_owned(),
            by: "another process holds a lock on it, such as another nbdcrypt (see `nbdcrypt status`), or qemu"
                .to_owned(),
        }),
        Err(error) => Err(translate(path, error)),
    }
}

/// A lock that stands in nobody's way but of who takes such ones: other nbdcrypts, and qemu. cryptsetup's, which is of
/// another kind, is for the moment in which it looks at a header.
fn claim_file(store: &FileStore, access: Access) -> io::Result<()> {
    let kind = match access {
        Access::ReadOnly => nix::libc::F_RDLCK,
        Access::ReadWrite => nix::libc::F_WRLCK,
    };
    // Of the whole file, however long it is.
    let lock = nix::libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match nix::fcntl::fcntl(store.file(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(nix::errno::Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => Err(error.into()),
    }
}

fn claim_block_device(store: &FileStore, access: Access) -> io::Result<()> {
    let lock = match access {
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    Ok(rustix::fs::flock(store.file(), lock)?)
}

/// Tries until it works, something is wrong, or so much time has passed.
fn in_time(patience: Duration, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// cryptsetup changes nothing in a header while this lives. (LUKS1 headers it changes without a lock.)
pub struct HeaderLock(File);

impl Drop for HeaderLock {
    fn drop(&mut self) {
        // Of a file it is the disk's own, which stays open.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Opens `path` to change its header: as [`open`] does, and with the lock that cryptsetup takes to change one: flock(2) on the
/// file itself, or for a block device on `/run/cryptsetup/L_MAJOR:MINOR`.
///
/// # Errors
/// [`DiskError`].
pub fn open_header(path: &Path) -> Result<(FileStore, HeaderLock), DiskError> {
    let store = open(path, Access::ReadWrite, Caching::PageCache)?;
    let lock = lock_header(path, store.file())?;
    Ok((store, lock))
}

/// Takes the lock of [`open_header`] on the file of a disk that [`open`] opened. `path` is for people.
///
/// # Errors
/// [`DiskError::InUse`] where cryptsetup does not let go of it, [`DiskError::NoLock`].
pub fn lock_header(path: &Path, disk: &File) -> Result<HeaderLock, DiskError> {
    lock_as(path, disk, FlockOperation::NonBlockingLockExclusive)
}

/// Opens `path` to read its header with the key material, of which no checksum tells whether it was changed meanwhile: under
/// the lock that cryptsetup takes to read one, and while the volume is up, too.
///
/// # Errors
/// [`DiskError`].
pub fn open_header_to_read(path: &Path) -> Result<(FileStore, HeaderLock), DiskError> {
    let store = FileStore::open(path, Access::ReadOnly, Caching::PageCache).map_err(|error| translate(path, error))?;
    let lock = lock_as(path, store.file(), FlockOperation::NonBlockingLockShared)?;
    Ok((store, lock))
}

fn lock_as(path: &Path, disk: &File, operation: FlockOperation) -> Result<HeaderLock, DiskError> {
    // Of the file that is open, whatever has its name by now.
    let metadata = disk.metadata().map_err(|error| translate(path, error))?;
    let (locked, lock) = match metadata.file_type().is_file() {
        true => (disk.try_clone().and_then(|file| locked(file, operation)), path.to_owned()),
        false => {
            let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
            let lock = Path::new(HEADER_LOCKS).join(format!("L_{major}:{minor}"));
            (make_header_locks().and_then(|()| lock_by_name(&lock, operation)), lock)
        }
    };
    locked.map(HeaderLock).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => DiskError::InUse {
            path: path.to_owned(),
            by: format!(
                "cryptsetup or another nbdcrypt is at work on its header, and was for {} seconds (the lock is {}): try again",
                CRYPTSETUP_PATIENCE.as_secs(),
                lock.display()
            ),
        },
        _ => DiskError::NoLock { lock, source: error },
    })
}

/// The folder of cryptsetup's locks, made as cryptsetup makes it.
fn make_header_locks() -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(HEADER_LOCKS) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn locked(file: File, operation: FlockOperation) -> io::Result<File> {
    in_time(CRYPTSETUP_PATIENCE, || Ok(rustix::fs::flock(&file, operation)?))?;
    Ok(file)
}

fn lock_by_name(path: &Path, operation: FlockOperation) -> io::Result<File> {
    let nofollow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(nofollow);
        let file = locked(options.open(path)?, operation)?;
        // cryptsetup removes the file of a lock that nobody holds: then the lock is on one that nobody else finds.
        let now = std::fs::metadata(path).ok().map(|now| (now.dev(), now.ino()));
        let ours = file.metadata()?;
        if now == Some((ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
}

/// Makes a sparse file of `size` bytes that its owner alone may read.
///
/// # Errors
/// [`DiskError`]; no file is left then.
pub fn make_file(path: &Path, size: u64) -> Result<(), DiskError> {
    let file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DiskError::Exists(path.to_owned()),
            _ => DiskError::Io { path: path.to_owned(), source: error },
        })?;
    file.set_len(size).and_then(|()| file.sync_all()).map_err(|source| {
        // It is ours, and empty.
        let _ = std::fs::remove_file(path);
        DiskError::Io { path: path.to_owned(), source }
    })
}

fn translate(path: &Path, error: io::Error) -> DiskError {
    match error.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path.to_owned()),
        io::ErrorKind::PermissionDenied => DiskError::Denied(path.to_owned()),
        _ => DiskError::Io { path: path.to_owned(), source: error },
    }
}

/// The loop device that has the file at `path` behind it.
fn loop_device_on(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    std::fs::read_dir("/sys/block").ok()?.filter_map(Result::ok).find_map(|entry| {
        let behind = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        (Path::new(behind.trim_end_matches('\n')) == path)
            .then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}

/// Who has the block device of this number open exclusively, as far as the kernel tells.
fn user_of(device: u64) -> String {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    if let Some(mount) = mounts::list().unwrap_or_default().into_iter().find(|mount| mount.device_number == number) {
        let at = mount.mountpoint.display();
        return format!("its {} filesystem is mounted on {at} (umount {at})", mount.filesystem);
    }
    let holders = PathBuf::from(format!("/sys/dev/block/{number}/holders"));
    let mut names = std::fs::read_dir(holders).into_iter().flatten().filter_map(Result::ok);
    match names.next() {
        Some(holder) => format!("the device {} is built on it", holder.file_name().to_string_lossy()),
        None => "the kernel or another program has it: a partition of it is mounted, it is swap, or part of a RAID \
                 (see lsblk)"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_sparse_private_and_never_replaces_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secretfs");
        make_file(&path, 1 << 30).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (1 << 30, 0o600));
        assert!(metadata.blocks() * 512 < 1 << 20);
        assert!(matches!(make_file(&path, 1), Err(DiskError::Exists(_))));
    }

    #[test]
    fn a_file_is_opened_for_writing_once_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secretfs");
        make_file(&path, 1 << 20).unwrap();
        let first = open(&path, Access::ReadWrite, Caching::PageCache).unwrap();
        assert!(matches!(open(&path, Access::ReadWrite, Caching::PageCache), Err(DiskError::InUse { .. })));
        assert!(matches!(open(&path, Access::ReadOnly, Caching::PageCache), Err(DiskError::InUse { .. })));
        drop(first);
        let _reader = open(&path, Access::ReadOnly, Caching::PageCache).unwrap();
        open(&path, Access::ReadOnly, Caching::PageCache).unwrap();
    }

    #[test]
    fn a_header_s_lock_is_on_the_file_that_is_open_and_ends_with_its_guard() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("disk"), folder.path().join("other"));
        make_file(&path, 1 << 20).unwrap();
        make_file(&other, 1 << 20).unwrap();
        let disk = open(&path, Access::ReadWrite, Caching::PageCache).unwrap();
        let cryptsetups = File::open(&path).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let lock = lock_header(&path, disk.file()).unwrap();
        assert!(cryptsetups.try_lock_shared().is_err());
        drop(lock);
        cryptsetups.try_lock_shared().unwrap();
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path| open(path, Access::ReadOnly, Caching::PageCache).err().unwrap();
        assert!(matches!(open(folder.path()), DiskError::WrongKind(_)));
        assert!(matches!(open(&folder.path().join("none")), DiskError::Missing(_)));
        assert!(matches!(open(Path::new("/dev/null")), DiskError::WrongKind(_)));
    }
}
