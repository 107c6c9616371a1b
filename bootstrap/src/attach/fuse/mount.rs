//! The FUSE mount, and the threads that answer it.

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
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::volume_file::{FILE_NAME, OpenFiles, VolumeFile};
use crate::attach::command::load_module;
use crate::attach::error::{AttachError, DetachError};
use crate::attach::holders::is_mounted;
use crate::attach::signal::{Ended, EndedSender, EndedSignal, ended_signal};

const DEV_FUSE: &str = "/dev/fuse";

/// The longest to wait for the loop driver to let go of the file.
const PATIENCE: Duration = Duration::from_secs(10);

/// Fewest and most requests in flight. Each has a thread, which waits for the disk with it.
const THREADS: std::ops::RangeInclusive<usize> = 4..=16;

/// A mounted FUSE filesystem with one file in it. Dropping it unmounts, lazily where it is in use.
#[derive(Debug)]
pub(super) struct FuseMount {
    dir: PathBuf,
    mounted: bool,
    open_files: Arc<OpenFiles>,
    sender: EndedSender,
    signal: EndedSignal,
    server: Option<JoinHandle<()>>,
}

impl FuseMount {
    pub(super) fn new(volume: Arc<Volume>, read_only: bool, dir: &Path, identifier: &str) -> Result<Self, AttachError> {
        let refused = |source: io::Error| AttachError::FuseMount { dir: dir.to_owned(), source };
        // Asked before anything touches the directory, which a dead mount would answer with "not connected".
        if is_mounted(dir) {
            return Err(AttachError::MountDirInUse { dir: dir.to_owned() });
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(refused)?;
        let dir = dir.canonicalize().map_err(refused)?;
        let device = open_device()?;
        mount(&device, &dir, read_only, identifier).map_err(|error| refused(error.into()))?;

        // From here on the value unmounts when it is dropped.
        let (sender, signal) = ended_signal();
        let open_files = Arc::new(OpenFiles::new(sender.clone()));
        let mut mount = Self {
            dir,
            mounted: true,
            open_files: Arc::clone(&open_files),
            sender: sender.clone(),
            signal,
            server: None,
        };
        let mut config = fuser::Config::default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        config.n_threads = Some((processors * 2).clamp(*THREADS.start(), *THREADS.end()));
        let file = VolumeFile::new(volume, read_only, open_files);
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

    pub(super) fn ended(&self) -> EndedSignal {
        self.signal.clone()
    }

    /// Whether the end is to be told of when it comes: while the loop device is there, and shall be.
    pub(super) fn watch(&self, armed: bool) {
        self.sender.set_armed(armed);
        self.open_files.notice_end();
    }

    /// Unmounts, and waits until every thread that served is gone.
    pub(super) fn unmount(&mut self) -> Result<(), DetachError> {
        let deadline = Instant::now() + PATIENCE;
        // The loop driver closes its file a moment after the device is gone.
        while let Err(errno) = rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW) {
            match errno {
                // Someone else was faster.
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
            // A panic in it was told by the signal, or by nobody there to hear it.
            let _ = server.join();
        }
        // What is left is an empty directory of ours, or none.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if !self.mounted || rustix::mount::unmount(&self.dir, UnmountFlags::NOFOLLOW).is_ok() {
            return self.finish();
        }
        // Hidden now, and gone when its last user is. Until then the threads go on serving: waiting for them could be
        // waiting for ever.
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

/// mount(2) itself: no helper program, and nothing of libfuse.
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
