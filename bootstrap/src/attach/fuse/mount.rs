//! The FUSE mount, and the threads that serve it.

use std::ffi::CString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::volume::Volume;
use fuser::{Session, SessionACL};
use nbd_server::statistics::Statistics;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::volume_file::{FILE_NAME, OpenFiles, VolumeFile};
use crate::attach::error::{AttachError, DetachError};
use crate::attach::signal::{Ended, EndedSender, EndedSignal, ended_signal};
use crate::machine::modules::load_module;
use crate::machine::mounts::is_mounted;

const DEV_FUSE: &str = "/dev/fuse";

/// The longest time to wait until the loop driver closes the file.
const PATIENCE: Duration = Duration::from_secs(10);

/// The minimum and the maximum number of requests in flight. Each request has its own thread, which waits for the disk.
const THREADS: std::ops::RangeInclusive<usize> = 4..=16;

/// A mounted FUSE filesystem with one file in it. Dropping it unmounts the filesystem, lazily if it is in use.
#[derive(Debug)]
pub(super) struct FuseMount {
    dir: PathBuf,
    mounted: bool,
    open_files: Arc<OpenFiles>,
    sender: EndedSender,
    signal: EndedSignal,
    statistics: Arc<Statistics>,
    server: Option<JoinHandle<()>>,
}

impl FuseMount {
    pub(super) fn new(volume: Arc<Volume>, read_only: bool, dir: &Path, identifier: &str) -> Result<Self, AttachError> {
        let refused = |source: io::Error| AttachError::FuseMount { dir: dir.to_owned(), source };
        // Check this before any access to the directory. If the server of a mount there is dead, an access fails with "not
        // connected".
        if is_mounted(dir) {
            return Err(AttachError::MountDirInUse { dir: dir.to_owned() });
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(refused)?;
        let dir = dir.canonicalize().map_err(refused)?;
        let device = open_device()?;
        mount(&device, &dir, read_only, identifier).map_err(|error| refused(error.into()))?;

        // From here on, dropping the value unmounts the filesystem.
        let (sender, signal) = ended_signal();
        let open_files = Arc::new(OpenFiles::new(sender.clone()));
        let mut mount = Self {
            dir,
            mounted: true,
            open_files: Arc::clone(&open_files),
            sender: sender.clone(),
            signal,
            statistics: Arc::default(),
            server: None,
        };
        let mut config = fuser::Config::default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        config.n_threads = Some((processors * 2).clamp(*THREADS.start(), *THREADS.end()));
        let file = VolumeFile::new(volume, read_only, open_files, identifier, Arc::clone(&mount.statistics));
        let session = Session::from_fd(file, OwnedFd::from(device), SessionACL::Owner, config).map_err(refused)?;
        let server = std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || {
                sender.send(match session.run() {
                    Ok(()) => Ended::Disconnected,
                    Err(error) => Ended::ServerFailed(error.to_string()),
                });
            })
            .map_err(|source| AttachError::Resource { what: "the FUSE server's thread", source })?;
        mount.server = Some(server);
        Ok(mount)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn file(&self) -> PathBuf {
        self.dir.join(FILE_NAME)
    }

    pub(super) fn statistics(&self) -> Arc<Statistics> {
        Arc::clone(&self.statistics)
    }

    pub(super) fn ended(&self) -> EndedSignal {
        self.signal.clone()
    }

    /// Arms or disarms the signal for an unexpected end. It is armed while the loop device should exist.
    pub(super) fn watch(&self, armed: bool) {
        self.sender.set_armed(armed);
        self.open_files.notice_end();
    }

    /// Unmounts the filesystem, and waits until all serving threads have ended.
    pub(super) fn unmount(&mut self) -> Result<(), DetachError> {
        let deadline = Instant::now() + PATIENCE;
        // The loop driver closes its file shortly after the device is gone.
        while let Err(errno) = rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW) {
            match errno {
                // Another program unmounted it first.
                Errno::INVAL | Errno::NOENT => break,
                Errno::BUSY if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                Errno::BUSY => {
                    let reason = "a process uses the mount".to_owned();
                    let device = self.dir.clone();
                    return Err(DetachError::Lingers { device, seconds: PATIENCE.as_secs(), reason });
                }
                errno => {
                    let reason = io::Error::from(errno).to_string();
                    return Err(DetachError::Failed { device: self.dir.clone(), reason });
                }
            }
        }
        self.mounted = false;
        self.finish();
        Ok(())
    }

    fn finish(&mut self) {
        if let Some(server) = self.server.take() {
            // If the thread panicked, the signal has reported it already.
            let _ = server.join();
        }
        // The directory is empty now, or another program has removed it.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if !self.mounted || rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW).is_ok() {
            return self.finish();
        }
        // A lazy unmount hides the mount at once, and the kernel removes the mount when its last user is gone. Until then
        // the threads still serve the mount, so waiting for the threads could take forever.
        let _ = rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Unmounts what a dead server left at `dir`.
pub(super) fn unmount_stale(dir: &Path) -> Result<(), DetachError> {
    while is_mounted(dir) {
        let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
        match rustix::mount::unmount(dir, flags) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => {
                let reason = io::Error::from(errno).to_string();
                return Err(DetachError::Failed { device: dir.to_owned(), reason });
            }
        }
    }
    let _ = std::fs::remove_dir(dir);
    Ok(())
}

fn open_device() -> Result<File, AttachError> {
    let no_fuse = |modprobe| AttachError::NoFuse { path: DEV_FUSE, modprobe };
    load_module("fuse", Path::new(DEV_FUSE)).map_err(no_fuse)?;
    OpenOptions::new().read(true).write(true).open(DEV_FUSE).map_err(|error| no_fuse(error.to_string()))
}

/// Calls mount(2) directly, without a helper program or libfuse.
fn mount(device: &File, dir: &Path, read_only: bool, identifier: &str) -> rustix::io::Result<()> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", device.as_raw_fd());
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(identifier, dir, "fuse.nbdcrypt", flags, data.as_c_str())
}
