//! A volume's place under /run: who serves it, what is attached and mounted for it, and how to reach the server.
//!
//! ```text
//! /run/nbdcrypt/NAME/      mode 0700
//!   lock         held with flock(2) by the server as long as it lives
//!   state.json   what the server has made, written at every step (atomically, by rename)
//!   control      the server's socket: status and down
//!   log          what the server says once it is in the background
//!   fuse/        where the FUSE method mounts its one file
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::attach::Remains;
use crate::system;

/// Where the volumes' folders are, unless told otherwise.
pub const DEFAULT_BASE: &str = "/run/nbdcrypt";

/// Longer than anyone holds a claim who only asks about it.
const A_MOMENT: Duration = Duration::from_millis(200);

/// A volume's folder.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

/// What a server has made, for whoever asks or has to clear up after it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct State {
    /// The server's process id.
    pub pid: u32,
    /// The configuration it was started with.
    pub config: PathBuf,
    /// The disk that holds the ciphertext.
    pub disk: PathBuf,
    /// The attached block device and how it came to be, once there is one.
    pub attachment: Option<Remains>,
    /// Where the filesystem is mounted, once it is.
    pub mountpoint: Option<PathBuf>,
    /// What there may be besides, of a step that had begun.
    pub begun: Option<Begun>,
}

/// What a server was about to make, written down before it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Begun {
    /// Whatever device it may have attached.
    pub attachment: Remains,
    /// Where it may have mounted that.
    pub mountpoint: Option<PathBuf>,
}

impl State {
    /// Takes away what a server that died has left, whether it could still write it down or not. Doing it twice does no
    /// harm.
    ///
    /// # Errors
    /// What is still there, and why.
    pub fn clear_up(&self) -> anyhow::Result<()> {
        let begun = self.begun.as_ref();
        let mountpoint = self.mountpoint.as_deref().or_else(|| begun?.mountpoint.as_deref());
        system::clear_up(mountpoint, self.attachment.as_ref().or_else(|| Some(&begun?.attachment)))
    }
}

/// The server's claim on a volume's folder: one at a time, and gone with the process however it ends.
#[derive(Debug)]
pub struct Claim {
    dir: RunDir,
    // Never read: the kernel lets go of the lock when the file is closed.
    _lock: File,
}

impl RunDir {
    /// The folder of the volume `name` under `base`; it need not exist.
    pub fn new(base: &Path, name: &str) -> Self {
        Self { path: base.join(name) }
    }

    /// The folders that there are under `base`, by name.
    ///
    /// # Errors
    /// What the system said, except that a missing base is no volumes.
    pub fn list(base: &Path) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names: Vec<String> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.path().join("state.json").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server's socket.
    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    /// The background server's log.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// The mount directory of the FUSE method.
    pub fn fuse(&self) -> PathBuf {
        self.path.join("fuse")
    }

    /// What the server, alive or dead, has written down.
    ///
    /// # Errors
    /// What the system said; `InvalidData` when the file is not what a server writes.
    pub fn state(&self) -> io::Result<Option<State>> {
        match std::fs::read(self.path.join("state.json")) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a server lives that has claimed the folder.
    ///
    /// # Errors
    /// What the system said.
    pub fn is_claimed(&self) -> io::Result<bool> {
        match File::open(self.path.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
            Ok(lock) => match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
                Ok(()) => Ok(false),
                Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Makes the folder where it is missing and claims it; `None` when a living server has it.
    ///
    /// # Errors
    /// What the system said.
    pub fn claim(&self) -> io::Result<Option<Claim>> {
        let path = self.path.join("lock");
        let start = Instant::now();
        loop {
            match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path) {
                // It was there, and went before it was looked at.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !self.path.is_file() => continue,
                made => made?,
            }
            let lock = match OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path) {
                // The server before has just removed the folder.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock?,
            };
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // Whoever asks whether a server lives holds it for a moment.
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < A_MOMENT => {
                    std::thread::sleep(A_MOMENT / 20);
                    continue;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // A server that ends removes its lock while it holds it. Who opened it before that, and locked it after, has
            // locked a file that nobody else will ever find.
            if std::fs::metadata(&path).is_ok_and(|now| lock.metadata().is_ok_and(|held| now.ino() == held.ino())) {
                return Ok(Some(Claim { dir: self.clone(), _lock: lock }));
            }
        }
    }
}

impl Claim {
    /// The folder.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// Writes down what there is now, replacing what was written before in one step.
    ///
    /// # Errors
    /// What the system said.
    pub fn record(&self, state: &State) -> io::Result<()> {
        let new = self.dir.path.join("state.json.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(state)?)?;
        std::fs::rename(new, self.dir.path.join("state.json"))
    }

    /// Removes the folder: nothing is left to tell of, or to clear up. The log goes with it.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove(self) -> io::Result<()> {
        for name in ["state.json", "state.json.new", "control", "log"] {
            ignore_missing(std::fs::remove_file(self.dir.path.join(name)))?;
        }
        ignore_missing(std::fs::remove_dir(self.dir.fuse()))?;
        // Last, and while it is still held: whoever comes now makes a new one, or finds this one taken.
        ignore_missing(std::fs::remove_file(self.dir.path.join("lock")))?;
        match std::fs::remove_dir(&self.dir.path) {
            // Another server has come in the meantime: the folder is its own.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => ignore_missing(result),
        }
    }
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_at_a_time_claims_a_volume_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        assert!(!dir.is_claimed().unwrap());
        let claim = dir.claim().unwrap().unwrap();
        assert!(dir.is_claimed().unwrap());
        assert!(dir.claim().unwrap().is_none());

        let state = State { pid: 7, disk: "/dev/x".into(), ..State::default() };
        claim.record(&state).unwrap();
        assert_eq!(dir.state().unwrap(), Some(state));
        assert_eq!(RunDir::list(base.path()).unwrap(), ["scratch"]);

        claim.remove().unwrap();
        assert!(!dir.path().exists());
        assert_eq!(RunDir::list(base.path()).unwrap(), [""; 0]);
    }

    #[test]
    fn however_many_come_and_go_at_once_one_at_a_time_has_the_claim() {
        let base = tempfile::tempdir().unwrap();
        let holders = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Some(claim) = RunDir::new(base.path(), "scratch").claim().unwrap() else { continue };
                        assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        claim.record(&State::default()).unwrap();
                        holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        claim.remove().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn what_a_dead_server_wrote_can_be_read() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        let claim = dir.claim().unwrap().unwrap();
        claim.record(&State::default()).unwrap();
        drop(claim);
        assert!(!dir.is_claimed().unwrap());
        assert_eq!(dir.state().unwrap(), Some(State::default()));
    }
}
