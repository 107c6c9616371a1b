//! The disk that holds the ciphertext: finds it, makes it if it is a file, and opens it for this process only.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::store::{Access, Caching, FileStore};
use rustix::fs::FlockOperation;

use crate::machine::holders;
use crate::machine::new_file::{self, NewFileError};

/// How long to wait for a disk that is in use. The files of a killed process stay open until the kernel has removed the
/// process. A restart right after `kill -9` therefore finds the disk in use. In addition, udev briefly locks a block device
/// after every change to it.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// The pause between two attempts to take a lock.
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How long to wait for cryptsetup to finish its work on a header.
const CRYPTSETUP_PATIENCE: Duration = Duration::from_secs(5);
/// The folder of cryptsetup's locks on the headers of block devices (`DEFAULT_LUKS2_LOCK_PATH`).
const HEADER_LOCKS: &str = "/run/cryptsetup";

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no file or device with this name.
    #[error("{} does not exist: {}", .0.display(), if .0.starts_with("/dev") {
        "check the name; `lsblk` shows the disks of this machine"
    } else {
        "check the name, or make it (for a file: `size = \"2G\"` under [volume], or `nbdcrypt format --size`)"
    })]
    Missing(PathBuf),
    /// cryptsetup's lock on a header could not be taken.
    #[error(
        "could not take cryptsetup's lock on the header, {} ({source}){}",
        lock.display(),
        if lock.starts_with(HEADER_LOCKS) { ": is there a writable /run?" } else { "" }
    )]
    NoLock {
        /// The file of the lock.
        lock: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Another program uses the disk.
    #[error("{} is in use: {by}", path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
        /// Who uses it, and what to do.
        by: String,
    },
    /// The path is a directory, a socket or a character device.
    #[error("{} is neither a block device nor a regular file", .0.display())]
    WrongKind(PathBuf),
    /// A new file could not be made.
    #[error(transparent)]
    New(#[from] NewFileError),
    /// The operating system does not allow writes to the disk.
    #[error("{} is read-only: {why}", path.display())]
    ReadOnly {
        /// The disk.
        path: PathBuf,
        /// The reason, and how it could be changed.
        why: String,
    },
    /// The file is empty.
    #[error(
        "{at} has 0 bytes. An older nbdcrypt leaves such a file if it is killed while it makes one; so does a program that \
         truncates a file. If nothing of value was in it, remove it (rm {at}): with `size` under [volume], `nbdcrypt \
         up` then makes it again, and so does `nbdcrypt format --size`",
        at = .0.display()
    )]
    Empty(PathBuf),
    /// There is a device node, but no device behind it.
    #[error("{} is a device node with no device behind it (No such device or address): the disk is gone, or its driver is not loaded; `lsblk` shows the disks of this machine", .0.display())]
    NoDevice(PathBuf),
    /// This process lacks the permission.
    #[error("{}: permission denied; {}", path.display(), denied_hint(*is_device))]
    Denied {
        /// The disk.
        path: PathBuf,
        /// Whether it is a block device.
        is_device: bool,
    },
    /// Any other error of the operating system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The disk.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Returns what to do if the permission is missing. Only three things refuse root: an attribute of the file, a security
/// module or, for a device, the rules of a control group.
fn denied_hint(is_device: bool) -> &'static str {
    match (rustix::process::geteuid().is_root(), is_device) {
        (false, _) => "run as root, or as the owner of the file",
        (true, true) => {
            "not even root may open it: the device rules of this control group forbid it, as in a container that was not \
             given the device (docker run --device)"
        }
        (true, false) => "not even root may open it: check `lsattr` and the rules of SELinux or AppArmor",
    }
}

/// Opens `path` for this process only, as [`open`] does. If the operating system does not allow writes, opens it read-only
/// and logs a warning. A volume on a read-only store is read-only itself.
///
/// # Errors
/// [`DiskError`], for the same reasons as [`open`].
pub fn open_as_allowed(path: &Path, caching: Caching) -> Result<FileStore, DiskError> {
    // If the disk was missing, an older nbdcrypt made a file of that name, in a folder such as /dev, whose files are lost at
    // a reboot.
    if path.is_file() && matches!(new_file::check_folder(path), Err(NewFileError::NotStorage { .. })) {
        tracing::warn!(
            "{} is a file in memory, not a disk: it was made because the disk was missing. Its content is lost at the next \
             reboot; save what is needed, remove the file, and look for the disk",
            path.display()
        );
    }
    match open(path, Access::ReadWrite, caching) {
        Err(refused @ (DiskError::ReadOnly { .. } | DiskError::Denied { .. })) => {
            let Ok(store) = open(path, Access::ReadOnly, caching) else { return Err(refused) };
            tracing::warn!("{refused}. So the volume is read-only");
            Ok(store)
        }
        result => result,
    }
}

/// Opens `path`. For writing, makes this process the only user of the disk: a block device is opened exclusively, a file is
/// locked. If another process uses the disk, or a mount in another mount namespace, waits up to three seconds. If the disk is
/// mounted here or another device is built on it, fails at once, because waiting would not help.
///
/// # Errors
/// [`DiskError`], if `path` is missing, not a disk, in use, or may not be opened.
pub fn open(path: &Path, access: Access, caching: Caching) -> Result<FileStore, DiskError> {
    open_within(LOCK_PATIENCE, path, access, caching)
}

fn open_within(patience: Duration, path: &Path, access: Access, caching: Caching) -> Result<FileStore, DiskError> {
    let metadata = std::fs::metadata(path).map_err(|error| translate(path, error))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::WrongKind(path.to_owned()));
    }
    if kind.is_file() && metadata.len() == 0 {
        return Err(DiskError::Empty(path.to_owned()));
    }
    if kind.is_block_device() && access == Access::ReadWrite && is_read_only(metadata.rdev()) {
        return Err(read_only_device(path));
    }
    if kind.is_file() && access == Access::ReadWrite {
        refuse_if_used(path)?;
    }
    let start = Instant::now();
    let store = loop {
        match FileStore::open(path, access, caching) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let user = holders::lasting_user_of(path);
                if user.as_ref().is_some_and(|user| !user.may_end_soon) || start.elapsed() >= patience {
                    let by = user.map_or_else(unknown_user, |user| user.text);
                    return Err(DiskError::InUse { path: path.to_owned(), by });
                }
                std::thread::sleep(LOCK_PAUSE);
            }
            opened => break opened.map_err(|error| translate(path, error))?,
        }
    };
    let claim = || match kind.is_file() {
        true => claim_file(&store, access),
        false => claim_block_device(&store, access),
    };
    match in_time(patience, claim) {
        Ok(()) => Ok(store),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(DiskError::InUse {
            path: path.to_owned(),
            by: holders::opener_of(path).unwrap_or_else(|| {
                "another process has held a lock on it for three seconds, such as nbdcrypt or qemu. This process cannot see \
                 which: run this as root, and outside a container"
                    .to_owned()
            }),
        }),
        Err(error) => Err(translate(path, error)),
    }
}

/// Returns whether both paths lead to the same file or block device.
pub fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        let is_device = found.file_type().is_block_device();
        Some(if is_device { (None, found.rdev()) } else { (Some(found.dev()), found.ino()) })
    };
    identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Locks the file. The lock affects only programs that take such locks: other processes of nbdcrypt, and qemu.
/// cryptsetup's lock on a file is of another kind, and is held only while cryptsetup looks at a header.
fn claim_file(store: &FileStore, access: Access) -> io::Result<()> {
    let kind = match access {
        Access::ReadOnly => nix::libc::F_RDLCK,
        Access::ReadWrite => nix::libc::F_WRLCK,
    };
    // The range covers the whole file, whatever its length.
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

/// Repeats `attempt` until it succeeds, fails with an error other than `WouldBlock`, or `patience` has passed.
fn in_time(patience: Duration, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < patience => {
                std::thread::sleep(LOCK_PAUSE);
            }
            result => return result,
        }
    }
}

/// While this value lives, cryptsetup does not change a LUKS2 header. (To change a LUKS1 header, cryptsetup takes no lock.)
pub struct HeaderLock(File);

impl Drop for HeaderLock {
    fn drop(&mut self) {
        // For a file, `self.0` is a duplicate of the disk's own descriptor. That descriptor stays open and would keep the
        // lock.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Opens `path` with [`open`], and takes the lock that cryptsetup takes before it changes a header. The lock is flock(2) on
/// the file itself or, for a block device, on `/run/cryptsetup/L_MAJOR:MINOR`.
///
/// # Errors
/// [`DiskError`], for the same reasons as [`open`] and [`lock_header`].
pub fn open_header(path: &Path) -> Result<(FileStore, HeaderLock), DiskError> {
    let store = open(path, Access::ReadWrite, Caching::PageCache)?;
    let lock = lock_header(path, store.file())?;
    Ok((store, lock))
}

/// Takes the lock of [`open_header`] on a disk that [`open`] opened. `path` is only for messages.
///
/// # Errors
/// [`DiskError::InUse`] if cryptsetup still holds the lock after five seconds; [`DiskError::NoLock`] if the lock cannot be
/// taken.
pub fn lock_header(path: &Path, disk: &File) -> Result<HeaderLock, DiskError> {
    lock_as(path, disk, FlockOperation::NonBlockingLockExclusive)
}

/// Opens `path` to read its header and key material, and takes the lock that cryptsetup takes to read a header. The lock is
/// needed because no checksum covers the key material. This works while the volume is up.
///
/// # Errors
/// [`DiskError`], if `path` cannot be opened or the lock cannot be taken.
pub fn open_header_to_read(path: &Path) -> Result<(FileStore, HeaderLock), DiskError> {
    let store = FileStore::open(path, Access::ReadOnly, Caching::PageCache).map_err(|error| translate(path, error))?;
    let lock = lock_as(path, store.file(), FlockOperation::NonBlockingLockShared)?;
    Ok((store, lock))
}

/// Opens `path` to look at its header. Takes no lock, so this works while the volume is up.
///
/// # Errors
/// [`DiskError`], if `path` is not a disk or cannot be opened.
pub fn open_to_look(path: &Path) -> Result<FileStore, DiskError> {
    let metadata = std::fs::metadata(path).map_err(|error| translate(path, error))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::WrongKind(path.to_owned()));
    }
    FileStore::open(path, Access::ReadOnly, Caching::PageCache).map_err(|error| translate(path, error))
}

/// Returns whether the kernel or a program has the block device open exclusively, for example because it is mounted. This
/// opens the device for a moment.
pub fn is_claimed(path: &Path) -> bool {
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let opened = || OpenOptions::new().read(true).custom_flags(exclusive).open(path);
    is_device && opened().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
}

fn lock_as(path: &Path, disk: &File, operation: FlockOperation) -> Result<HeaderLock, DiskError> {
    // Look at the open file. By now its name may belong to another file.
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
                "cryptsetup or another nbdcrypt is at work on its header, for {} seconds now (the lock is {}): try again",
                CRYPTSETUP_PATIENCE.as_secs(),
                lock.display()
            ),
        },
        _ => DiskError::NoLock { lock, source: error },
    })
}

/// Makes the folder of cryptsetup's locks as cryptsetup makes it, with mode 0700.
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
        // cryptsetup removes the lock file when nobody holds the lock. The lock taken here may be on a removed file,
        // which no other process can find.
        let now = std::fs::metadata(path).ok().map(|now| (now.dev(), now.ino()));
        let ours = file.metadata()?;
        if now == Some((ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
}

/// Checks that nothing uses the disk permanently. For a block device, that is a mounted filesystem or another device on the
/// disk or on one of its partitions. For a file, it is a loop device. This opens nothing, and does not notice locks of other
/// processes.
///
/// # Errors
/// [`DiskError::InUse`], or another [`DiskError`], such as [`DiskError::Missing`], if the disk cannot be examined.
pub fn refuse_if_used(path: &Path) -> Result<(), DiskError> {
    let metadata = std::fs::metadata(path).map_err(|error| translate(path, error))?;
    let by = match metadata.file_type().is_block_device() {
        true => holders::lasting_user_of(path).map(|user| user.text),
        false => holders::loop_device_on(path)
            .map(|device| format!("the loop device {device} is on it (losetup -d {device})")),
    };
    by.map_or(Ok(()), |by| Err(DiskError::InUse { path: path.to_owned(), by }))
}

/// Checks that the system allows writes to the disk. This opens nothing.
///
/// # Errors
/// [`DiskError::ReadOnly`] or [`DiskError::Denied`], or another [`DiskError`], such as [`DiskError::Missing`], if the disk
/// cannot be examined.
pub fn refuse_if_read_only(path: &Path) -> Result<(), DiskError> {
    let metadata = std::fs::metadata(path).map_err(|error| translate(path, error))?;
    if metadata.file_type().is_block_device() && is_read_only(metadata.rdev()) {
        return Err(read_only_device(path));
    }
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).map_err(|error| translate(path, error.into()))
}

fn read_only_device(path: &Path) -> DiskError {
    let why = format!(
        "the kernel takes no writes to this device (`blockdev --getro {0}` says 1); `blockdev --setrw {0}` may change that",
        path.display()
    );
    DiskError::ReadOnly { path: path.to_owned(), why }
}

/// Returns whether the kernel refuses writes to the block device with this number (`BLKROGET`).
fn is_read_only(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro")).is_ok_and(|content| content.trim() == "1")
}

/// Makes a sparse file of `size` bytes with mode 0600, by [`new_file::sparse`].
///
/// # Errors
/// [`DiskError::New`], if the file could not be made. No file is left behind.
pub fn make_file(path: &Path, size: u64) -> Result<(), DiskError> {
    Ok(new_file::sparse(path, size)?)
}

fn translate(path: &Path, error: io::Error) -> DiskError {
    match error.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path.to_owned()),
        io::ErrorKind::PermissionDenied => {
            let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
            DiskError::Denied { path: path.to_owned(), is_device }
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            let why = "it lies on a filesystem or disk that is read-only (findmnt -T shows it)".to_owned();
            DiskError::ReadOnly { path: path.to_owned(), why }
        }
        _ if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
            DiskError::NoDevice(path.to_owned())
        }
        _ => DiskError::Io { path: path.to_owned(), source: error },
    }
}

/// Returns the text for a block device that is in use, if the kernel does not show the user.
fn unknown_user() -> String {
    "the kernel or another program has used it for three seconds: a partition of it is mounted, it is swap, or part of a \
     RAID (see lsblk)"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_about_missing_disks_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        File::create(&path).unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = open(&path, access, Caching::PageCache).err().unwrap().to_string();
            assert!(error.contains("has 0 bytes") && error.contains("(rm "), "{error}");
        }
        let missing = |path| open(Path::new(path), Access::ReadOnly, Caching::PageCache).err().unwrap().to_string();
        let disk = missing("/dev/nbdcrypt-no-such-disk");
        assert!(disk.contains("`lsblk`") && !disk.contains("size"), "{disk}");
        assert!(missing("/nbdcrypt-no-such-file").contains("size"));
        // A path in /dev means a disk, so no file may be made there.
        assert!(matches!(make_file(Path::new("/dev/nbdcrypt-no-such-disk"), 4096), Err(DiskError::New(_))));
    }

    #[test]
    fn errors_of_the_system_are_translated() {
        use rustix::io::Errno;
        let why = |errno: Errno| translate(Path::new("/nbdcrypt-no-such-disk"), errno.into());
        assert!(matches!(why(Errno::ROFS), DiskError::ReadOnly { .. }));
        assert!(why(Errno::NXIO).to_string().contains("no device behind it"));
        assert!(matches!(why(Errno::PERM), DiskError::Denied { is_device: false, .. }));
        let device = DiskError::Denied { path: "/dev/sdx".into(), is_device: true }.to_string();
        assert_eq!(device.contains("control group"), rustix::process::geteuid().is_root(), "{device}");
    }

    #[test]
    fn a_file_is_opened_for_writing_once_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secretfs");
        make_file(&path, 1 << 20).unwrap();
        let first = open(&path, Access::ReadWrite, Caching::PageCache).unwrap();
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let second = open_within(Duration::ZERO, &path, access, Caching::PageCache);
            assert!(matches!(second, Err(DiskError::InUse { .. })));
        }
        drop(first);
        let _reader = open(&path, Access::ReadOnly, Caching::PageCache).unwrap();
        open(&path, Access::ReadOnly, Caching::PageCache).unwrap();
    }

    #[test]
    fn open_waits_for_a_process_that_is_about_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secretfs");
        make_file(&path, 1 << 20).unwrap();
        let first = open(&path, Access::ReadWrite, Caching::PageCache).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                // The CPU may be busy for longer than one call waits, so the call is repeated.
                let started = Instant::now();
                loop {
                    match open(&path, Access::ReadWrite, Caching::PageCache) {
                        Err(DiskError::InUse { .. }) if started.elapsed() < Duration::from_secs(60) => {}
                        result => return result.map(drop),
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(300));
            assert!(!second.is_finished());
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_header_lock_ends_with_its_guard() {
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
    fn a_path_that_is_not_a_disk_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path| open(path, Access::ReadOnly, Caching::PageCache).err().unwrap();
        assert!(matches!(open(folder.path()), DiskError::WrongKind(_)));
        assert!(matches!(open(&folder.path().join("none")), DiskError::Missing(_)));
        assert!(matches!(open(Path::new("/dev/null")), DiskError::WrongKind(_)));
    }
}
