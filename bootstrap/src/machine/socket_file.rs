//! A unix socket in the filesystem. Only one server at a time can make it, and only that server removes it.
//!
//! A server that died leaves its socket behind, and the next server replaces it. Between the check of the old socket and its
//! removal, a third server could put its own socket there. That live socket would then be removed. So a server takes a lock
//! for both steps. It takes the lock again at its end, to remove its own socket. The lock is a file `SOCKET.lock` next to
//! the socket. It exists only while a server holds the lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{AtFlags, FileType, Gid, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How long to wait for another server to make its socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A server listens on the path.
    #[error("{} is another server's socket: choose another path, or stop that server", .0.display())]
    Taken(PathBuf),
    /// The path is taken by something that is not a socket.
    #[error("could not listen on {}: it exists and is not a socket; choose another path", .0.display())]
    NoSocket(PathBuf),
    /// Another process holds the lock for too long.
    #[error("could not listen on {}: another process holds the lock {} and has not released it within ten seconds", socket.display(), lock.display())]
    Locked {
        /// The socket.
        socket: PathBuf,
        /// The lock file beside it.
        lock: PathBuf,
    },
    /// Any other error of the operating system.
    #[error("could not listen on {}: {source}", socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// A socket that this process made. Dropping it removes the socket, unless another server's socket has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Identifies a file. The creation time is a part of the identity, because filesystems reuse inode numbers.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino(), born: metadata.created().ok() })
    }
}

/// Who may connect to a socket: the users who may write to its file (unix(7)).
#[derive(Clone, Copy, Debug)]
pub struct Permissions {
    /// The file's mode.
    pub mode: u32,
    /// The file's group. `None` leaves the group that the system chose.
    pub group: Option<Gid>,
}

impl Permissions {
    /// Only the user of this process may connect.
    pub const ONLY_THIS_USER: Self = Self { mode: 0o600, group: None };

    /// Only the user of this process and the members of `group` may connect.
    pub const fn with_group(group: Gid) -> Self {
        Self { mode: 0o660, group: Some(group) }
    }
}

/// Listens on a new socket at `path`, to which only the users in `permissions` can connect. A socket that no server listens
/// on is replaced.
///
/// If several processes call this at the same time, one of them gets the socket, and the others get an error.
///
/// # Errors
/// [`SocketError`], if the path is taken, or the socket cannot be made.
pub fn bind(path: &Path, permissions: Permissions) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = |source| SocketError::Io { socket: path.to_owned(), source };
    let _lock = Lock::take(path)?;
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NoSocket(path.to_owned())),
        Ok(_) if is_alive(path) => return Err(SocketError::Taken(path.to_owned())),
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    // The umask keeps others from connecting, from the first moment on.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.map_err(|error| match error.kind() {
        // A program that does not take the lock made a socket meanwhile.
        io::ErrorKind::AddrInUse => SocketError::Taken(path.to_owned()),
        _ => failed(error),
    })?;
    let identity = Identity::of(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), identity };
    file.permit(permissions).map_err(failed)?;
    Ok((listener, file))
}

/// Removes the socket at `path` if no server listens on it. Leaves anything else.
///
/// # Errors
/// [`SocketError`], if the socket cannot be removed, or another process holds the lock for too long.
pub fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let is_dead = || std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) && !is_alive(path);
    // The lock is a file beside the socket, so it is only taken if there is something to remove.
    if !is_dead() {
        return Ok(());
    }
    let _lock = Lock::take(path)?;
    match is_dead() {
        true => std::fs::remove_file(path).map_err(|source| SocketError::Io { socket: path.to_owned(), source }),
        false => Ok(()),
    }
}

/// Returns whether a server listens on the socket. Does not wait for a server that does not accept connections.
fn is_alive(path: &Path) -> bool {
    let connect = || -> rustix::io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
    };
    !matches!(connect(), Err(Errno::CONNREFUSED | Errno::NOENT))
}

impl SocketFile {
    /// Sets the file's group, and then its mode, so that no other group gets the mode's rights.
    fn permit(&self, Permissions { mode, group }: Permissions) -> io::Result<()> {
        // Both calls concern the open file: in a shared folder, another user may replace what is at the path.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, rustix::fs::Mode::empty())?;
        if !FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_socket() {
            return Err(io::ErrorKind::NotFound.into());
        }
        if group.is_some() {
            rustix::fs::chownat(&file, "", None, group, AtFlags::EMPTY_PATH)?;
        }
        // fchmod(2) refuses a descriptor opened with `O_PATH`. chmod(2) accepts the descriptor's name in /proc.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(rustix::fs::chmod(name, rustix::fs::Mode::from_raw_mode(mode))?)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let Ok(_lock) = Lock::take(&self.path) else { return };
        if Identity::of(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The lock of a socket path.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Io { socket: socket.to_owned(), source };
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let start = Instant::now();
        loop {
            // Does not follow a symbolic link, which another user may have placed here.
            let flags = OFlags::NOFOLLOW.bits().cast_signed();
            let file =
                OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(&path);
            let file = file.map_err(failed)?;
            match file.try_lock() {
                // The lock is valid only if the locked file is still at the path. Its previous owner may have removed it.
                Ok(()) if is_at(&file, &path).map_err(failed)? => return Ok(Self { path, _file: file }),
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(SocketError::Locked { socket: socket.to_owned(), lock: path });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The lock is still held, so this is the file at the path.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn one_of_many_servers_replaces_a_dead_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for round in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(8);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let bind = || {
                    start.wait();
                    bind(&path, Permissions::ONLY_THIS_USER)
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (winners, losers): (Vec<_>, Vec<_>) = bound.into_iter().partition(Result::is_ok);
            assert_eq!(winners.len(), 1, "round {round}");
            assert!(losers.iter().all(|loser| matches!(loser, Err(SocketError::Taken(_)))), "{losers:?}");
            // Clients reach the winner's socket.
            let (listener, _file) = winners.into_iter().next().unwrap().unwrap();
            let _client = UnixStream::connect(&path).unwrap();
            listener.accept().unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "neither a socket nor a lock is left");
    }

    #[test]
    fn a_server_leaves_the_socket_of_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, old) = bind(&path, Permissions::ONLY_THIS_USER).unwrap();
        assert!(matches!(bind(&path, Permissions::ONLY_THIS_USER), Err(SocketError::Taken(_))));
        drop(listener);
        let (_listener, new) = bind(&path, Permissions::ONLY_THIS_USER).unwrap();
        drop(old);
        assert!(path.exists());
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_dead_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        remove_dead(&path).unwrap();
        remove_dead(&folder.path().join("none/socket")).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        remove_dead(&path).unwrap();
        assert!(path.exists(), "a server listens on it");
        drop(listener);
        remove_dead(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        remove_dead(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no lock is left");
    }

    #[test]
    fn files_are_kept_and_locks_are_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let error = bind(&path, Permissions::ONLY_THIS_USER).unwrap_err().to_string();
        assert!(error.contains("not a socket; choose another path"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(matches!(
            bind(&folder.path().join("none/socket"), Permissions::ONLY_THIS_USER),
            Err(SocketError::Io { .. })
        ));

        let path = folder.path().join("socket");
        let held = Lock::take(&path).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| bind(&path, Permissions::ONLY_THIS_USER));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished() && !path.exists());
            drop(held);
            assert!(waiting.join().unwrap().is_ok());
        });
    }

    #[test]
    fn a_socket_gets_its_mode_and_group() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let group = std::fs::metadata(folder.path()).unwrap().gid();
        let of = |mode| Permissions { mode, group: Some(Gid::from_raw(group)) };
        for (permissions, expected) in [(Permissions::ONLY_THIS_USER, 0o600), (of(0o660), 0o660), (of(0o666), 0o666)] {
            let (_listener, _file) = bind(&path, permissions).unwrap();
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            assert_eq!(metadata.mode() & 0o7777, expected);
            assert_eq!(metadata.gid(), group);
        }
    }
}
