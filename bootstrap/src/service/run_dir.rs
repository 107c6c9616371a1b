//! A volume's folder under /run. It records who serves the volume, what is attached and mounted for it, and how to reach the
//! server.
//!
//! ```text
//! /run/nbdcrypt/NAME/      mode 0700
//!   lock         locked by the server with flock(2) for as long as it lives
//!   state.json   what the server has made; replaced at every step (atomically, by rename)
//!   control      the server's socket, for status, up and down
//!   log          the server's log once it is in the background; it stays, unless it is empty
//!   fuse/        where the FUSE method mounts its single file
//! ```

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::attach::Remains;
use crate::config::Config;
use crate::machine::selection::Selection;
use crate::machine::socket_file;
use crate::machine::trust::{self, Distrust};
use crate::service::status::{Bind, Condition, Status};
use crate::service::system;

/// If the log is longer than this many bytes, the next start renames it to `log.old`.
const LONG_LOG: u64 = 1 << 20;

/// The default folder for the folders of all volumes.
pub const DEFAULT_BASE: &str = "/run/nbdcrypt";

/// How long to wait for a process that only checks whether the folder is claimed. Such a process holds the lock for a
/// shorter time than this.
const A_MOMENT: Duration = Duration::from_millis(200);

/// A volume's folder.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

/// The record of what a server has made. Other processes read it to report the status, or to clean up after the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct State {
    /// The server's process id.
    pub pid: u32,
    /// The configuration that the server was started with.
    pub config: PathBuf,
    /// What the configuration asked for at that time.
    pub wanted: Option<Wanted>,
    /// The disk that holds the ciphertext.
    pub disk: PathBuf,
    /// The attached block device and how it was attached, once it exists.
    pub attachment: Option<Remains>,
    /// The folder on which the filesystem is mounted, once the mount exists.
    pub mountpoint: Option<PathBuf>,
    /// What may exist in addition, because a step that makes it has started.
    pub begun: Option<Begun>,
    /// The unix socket on which the server serves its metrics.
    pub metrics: Option<PathBuf>,
}

/// Identifies a volume by its disk, its header and its mountpoint, independently of the configuration's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Wanted {
    /// The disk or file, or how it is selected, such as `instance-store`.
    pub disk: PathBuf,
    /// The disk or file of a detached header.
    pub header: Option<PathBuf>,
    /// The folder on which the filesystem is to be mounted.
    pub mountpoint: Option<PathBuf>,
    /// The folders of the filesystem that are to be mounted elsewhere as well, with their targets.
    #[serde(default)]
    pub binds: Vec<(PathBuf, PathBuf)>,
}

impl Wanted {
    /// Returns what this configuration asks for. Paths are resolved.
    pub fn of(config: &Config) -> Self {
        let disk = match &config.volume.devices {
            Selection::Paths(paths) => {
                let paths: Vec<_> = paths.iter().map(|path| real(path).into_os_string()).collect();
                PathBuf::from(paths.join(", ".as_ref()))
            }
            other => PathBuf::from(other.describe()),
        };
        let mountpoint = config.filesystem.as_ref().map(|filesystem| real_parent(&filesystem.mountpoint));
        let binds = config.filesystem.iter().flat_map(|filesystem| &filesystem.binds);
        let binds = binds.map(|bind| (bind.folder.clone(), real_parent(&bind.target))).collect();
        Self { disk, header: config.volume.header.as_deref().map(real), mountpoint, binds }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.disk.display())?;
        if let Some(header) = &self.header {
            write!(f, ", header {}", header.display())?;
        }
        match &self.mountpoint {
            Some(at) => write!(f, ", on {}", at.display())?,
            None => write!(f, ", not mounted")?,
        }
        self.binds.iter().try_for_each(|(folder, at)| write!(f, ", {} on {}", folder.display(), at.display()))
    }
}

/// Resolves all symbolic links in the path. If the path does not exist, resolves only the links in its parent.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| real_parent(path))
}

/// Resolves all of the path except its last name. The last name is not examined, since a filesystem whose server is gone may be
/// mounted there.
fn real_parent(path: &Path) -> PathBuf {
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// What a server was about to make, recorded before the server began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Begun {
    /// The device that the server may have attached.
    pub attachment: Remains,
    /// The folder on which the server may have mounted the device.
    pub mountpoint: Option<PathBuf>,
}

impl State {
    /// Returns the part of the volume's status that the record contains.
    pub fn status(&self, name: &str, condition: Condition) -> Status {
        Status {
            pid: self.pid,
            config: self.config.clone(),
            disk: self.disk.clone(),
            configured_mountpoint: self.any_mountpoint().map(Path::to_owned),
            binds: self.binds().map(|(folder, target)| Bind::not_mounted(folder, target)).collect(),
            ..Status::new(name, condition)
        }
    }

    /// Returns the folder on which the filesystem is mounted, or may be.
    fn any_mountpoint(&self) -> Option<&Path> {
        self.mountpoint.as_deref().or_else(|| self.begun.as_ref()?.mountpoint.as_deref())
    }

    /// Removes what a dead server has left, whether or not the record contains it. Calling this twice does no harm.
    ///
    /// # Errors
    /// Fails if something could not be removed, and says why.
    pub fn clean_up(&self) -> anyhow::Result<()> {
        let attachment = self.attachment.as_ref().or_else(|| Some(&self.begun.as_ref()?.attachment));
        // The binds were mounted last, so they are unmounted first.
        let binds: Vec<&Path> = self.binds().map(|(_, target)| target.as_path()).collect();
        let mountpoints: Vec<&Path> = binds.into_iter().rev().chain(self.any_mountpoint()).collect();
        if let Some(Err(error)) = self.metrics.as_deref().map(socket_file::remove_dead) {
            tracing::warn!("the socket of the metrics was not removed: {error}");
        }
        system::clean_up(&mountpoints, attachment)
    }

    /// Returns the folders that are mounted elsewhere as well, or may be, with their targets.
    fn binds(&self) -> impl Iterator<Item = &(PathBuf, PathBuf)> {
        self.wanted.iter().flat_map(|wanted| &wanted.binds)
    }
}

/// The server's claim on a volume's folder. Only one process can hold it, and the kernel releases it when the process ends,
/// even if it is killed.
#[derive(Debug)]
pub struct Claim {
    dir: RunDir,
    // Never read. The kernel releases the lock when the file is closed.
    _lock: File,
}

impl RunDir {
    /// Returns the folder of the volume `name` under `base`. It need not exist.
    pub fn new(base: &Path, name: &str) -> Self {
        Self { path: base.join(name) }
    }

    /// Returns the names of all volumes that have a folder under `base`. A missing base has none.
    ///
    /// # Errors
    /// Fails if others could change `base`, or if it cannot be read.
    pub fn list(base: &Path) -> io::Result<Vec<String>> {
        refuse_unsafe(base, 1)?;
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

    /// Fails if others could change what is in the folder, or replace the folder. This process trusts what it reads there,
    /// and unmounts and detaches what it finds named there.
    fn refuse_unsafe(&self) -> io::Result<()> {
        // Neither the base nor the volume's own folder may be a symbolic link.
        refuse_unsafe(&self.path, 2)
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of the server's socket.
    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }

    /// Returns the path of the background server's log.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Makes room for the log of a server that starts now. The log holds the lines of earlier servers, too. If it is long, it
    /// becomes `log.old`, in the place of an older one.
    ///
    /// # Errors
    /// Fails if the log cannot be renamed.
    pub fn begin_log(&self) -> io::Result<()> {
        match std::fs::metadata(self.log()) {
            Ok(log) if log.len() > LONG_LOG => std::fs::rename(self.log(), self.path.join("log.old")),
            Ok(_) => Ok(()),
            missing => ignore_missing(missing.map(drop)),
        }
    }

    /// Returns the mount directory of the FUSE method.
    pub fn fuse(&self) -> PathBuf {
        self.path.join("fuse")
    }

    /// Returns the record of the server, which may be alive or dead.
    ///
    /// # Errors
    /// Fails if others could change the folder, or if the file cannot be read. Returns `InvalidData` if a server did not
    /// write it.
    pub fn state(&self) -> io::Result<Option<State>> {
        self.refuse_unsafe()?;
        match std::fs::read(self.path.join("state.json")) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns whether a living server has claimed the folder.
    ///
    /// # Errors
    /// Fails if others could change the folder, or if the lock cannot be opened.
    pub fn is_claimed(&self) -> io::Result<bool> {
        self.refuse_unsafe()?;
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

    /// Returns the process that has claimed the folder, according to the kernel. Returns `None` if no process has claimed the
    /// folder, or if that process is in another PID namespace.
    pub fn holder(&self) -> Option<u32> {
        let lock = std::fs::metadata(self.path.join("lock")).ok()?;
        let (major, minor) = (rustix::fs::major(lock.dev()), rustix::fs::minor(lock.dev()));
        holder_in(&std::fs::read_to_string("/proc/locks").ok()?, &format!("{major:02x}:{minor:02x}:{}", lock.ino()))
    }

    /// Claims the folder, and makes it if it is missing. Returns `None` if a living server has claimed it.
    ///
    /// # Errors
    /// Fails if others could change the folder, or if the folder or the lock cannot be made.
    pub fn claim(&self) -> io::Result<Option<Claim>> {
        self.refuse_unsafe()?;
        let path = self.path.join("lock");
        let start = Instant::now();
        loop {
            match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path) {
                // The folder existed, and was removed before it could be checked.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !self.path.is_file() => continue,
                made => made?,
            }
            // Another user may have made the folder in the meantime.
            self.refuse_unsafe()?;
            let nofollow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).write(true).mode(0o600).custom_flags(nofollow);
            let lock = match options.open(&path) {
                // The previous server has just removed the folder.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock?,
            };
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // A process that checks whether a server lives holds the lock for a moment.
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < A_MOMENT => {
                    std::thread::sleep(A_MOMENT / 20);
                    continue;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // A server that ends removes its lock file while it holds the lock. A process that opened the file before that,
            // and locked it after, has locked a file that nobody else can find.
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

    /// Records what exists now. This replaces the previous record atomically.
    ///
    /// # Errors
    /// Fails if the file cannot be written, for example because /run is full. The previous record is then unchanged.
    pub fn record(&self, state: &State) -> io::Result<()> {
        let new = self.dir.path.join("state.json.new");
        let written = serde_json::to_vec_pretty(state).map_err(io::Error::from).and_then(|text| {
            let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            std::fs::rename(&new, self.dir.path.join("state.json"))
        });
        if written.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        written
    }

    /// Removes the folder, except for a log that has something in it. Call this when nothing is left to report or to clean up.
    ///
    /// # Errors
    /// Fails if something in the folder cannot be removed.
    pub fn remove(self) -> io::Result<()> {
        for name in ["state.json", "state.json.new", "control"] {
            ignore_missing(std::fs::remove_file(self.dir.path.join(name)))?;
        }
        if std::fs::metadata(self.dir.log()).is_ok_and(|log| log.len() == 0) {
            ignore_missing(std::fs::remove_file(self.dir.log()))?;
        }
        ignore_missing(std::fs::remove_dir(self.dir.fuse()))?;
        // The lock file is removed last, while this process holds the lock. Another process then makes a new lock file, or finds
        // this file locked.
        ignore_missing(std::fs::remove_file(self.dir.path.join("lock")))?;
        match std::fs::remove_dir(&self.dir.path) {
            // The log stays, or another server has just made the folder again.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => ignore_missing(result),
        }
    }
}

/// Returns the process that has locked `file` by flock(2). A line of /proc/locks is
/// `1: FLOCK  ADVISORY  WRITE 708 00:1a:1051 0 EOF`. Lines of processes that wait for a lock have `->` behind the number.
fn holder_in(locks: &str, file: &str) -> Option<u32> {
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, _, pid, locked, ..] if locked == file => pid.parse().ok().filter(|pid| *pid > 0),
            _ => None,
        }
    };
    locks.lines().find_map(holder)
}

fn refuse_unsafe(path: &Path, last: usize) -> io::Result<()> {
    trust::folder(path, last).map_err(|why| {
        if let Distrust::Io { source, .. } = &why
            && source.kind() == io::ErrorKind::PermissionDenied
        {
            let why = format!(
                "only root may look into {}, the folder for running volumes: run this with sudo",
                path.display()
            );
            return io::Error::new(io::ErrorKind::PermissionDenied, why);
        }
        let why = format!(
            "the folder for running volumes, {}, is not safe: {why}; or name another folder with --run-dir",
            path.display()
        );
        io::Error::new(io::ErrorKind::PermissionDenied, why)
    })
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
    fn one_server_at_a_time_claims_a_volume() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        assert!(!dir.is_claimed().unwrap());
        let claim = dir.claim().unwrap().unwrap();
        assert!(dir.is_claimed().unwrap());
        assert!(dir.claim().unwrap().is_none());
        assert_eq!(dir.holder(), Some(std::process::id()));

        let state = State { pid: 7, disk: "/dev/x".into(), ..State::default() };
        claim.record(&state).unwrap();
        assert_eq!(dir.state().unwrap(), Some(state));
        assert_eq!(RunDir::list(base.path()).unwrap(), ["scratch"]);

        claim.remove().unwrap();
        assert!(!dir.path().exists());
        assert_eq!(RunDir::list(base.path()).unwrap(), [""; 0]);
    }

    #[test]
    fn the_holder_of_a_lock_is_found_among_others() {
        let locks = "1: POSIX  ADVISORY  WRITE 5 00:1a:7 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 708 00:1a:7 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 709 00:1a:7 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 0 00:1a:8 0 EOF\n";
        let holders = ["00:1a:7", "00:1a:8", "00:1b:7"].map(|file| holder_in(locks, file));
        assert_eq!(holders, [Some(708), None, None]);
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        let claim = dir.claim().unwrap().unwrap();
        claim.record(&State::default()).unwrap();
        drop(claim);
        for folder in [base.path(), dir.path()] {
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
            let errors = [dir.claim().err().unwrap(), dir.state().unwrap_err(), dir.is_claimed().unwrap_err()];
            for error in errors.map(|error| error.to_string()) {
                assert!(error.contains("is not safe") && error.contains("chmod go-w"), "{error}");
            }
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
            dir.state().unwrap();
        }
        std::fs::rename(dir.path(), base.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", dir.path()).unwrap();
        assert!(dir.claim().err().unwrap().to_string().contains("is a symbolic link"));
    }

    #[test]
    fn the_log_outlives_the_volume_unless_it_is_empty() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        let claim = dir.claim().unwrap().unwrap();
        claim.record(&State::default()).unwrap();
        std::fs::write(dir.log(), "what happened").unwrap();
        claim.remove().unwrap();
        assert_eq!(std::fs::read_to_string(dir.log()).unwrap(), "what happened");
        assert_eq!((RunDir::list(base.path()).unwrap(), dir.state().unwrap()), (vec![], None));
        dir.begin_log().unwrap();
        assert!(dir.log().exists());
        // A long log makes room for a new one.
        let long = vec![b'x'; usize::try_from(LONG_LOG).unwrap() + 1];
        std::fs::write(dir.log(), &long).unwrap();
        dir.begin_log().unwrap();
        assert!(!dir.log().exists() && std::fs::read(dir.path().join("log.old")).unwrap() == long);
        dir.begin_log().unwrap();
        std::fs::remove_file(dir.path().join("log.old")).unwrap();
        std::fs::write(dir.log(), "").unwrap();
        dir.claim().unwrap().unwrap().remove().unwrap();
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_record_that_cannot_be_written_leaves_the_one_before() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        let claim = dir.claim().unwrap().unwrap();
        let before = State { pid: 7, ..State::default() };
        claim.record(&before).unwrap();
        // Nothing can be renamed over a folder that is not empty.
        std::fs::rename(dir.path().join("state.json"), dir.path().join("kept")).unwrap();
        std::fs::create_dir_all(dir.path().join("state.json/x")).unwrap();
        claim.record(&State::default()).unwrap_err();
        assert!(!dir.path().join("state.json.new").exists());
    }

    #[test]
    fn volumes_are_compared_with_symbolic_links_resolved() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk"), "").unwrap();
        std::os::unix::fs::symlink(folder.path().join("disk"), folder.path().join("by-id")).unwrap();
        let wanted = |disk: &str, mountpoint: &str| {
            let text = format!(
                "[volume]\ndevices = [\"{}\"]\n[key]\nsource = \"file\"\npath = \"/key\"\n[filesystem]\nmountpoint = \"{}\"\n",
                folder.path().join(disk).display(),
                folder.path().join(mountpoint).display()
            );
            Wanted::of(&Config::parse(&text, Path::new("test.toml")).unwrap())
        };
        assert_eq!(wanted("disk", "mnt"), wanted("by-id", "mnt"));
        assert_ne!(wanted("disk", "mnt"), wanted("other", "mnt"));
        assert_ne!(wanted("disk", "mnt"), wanted("disk", "elsewhere"));
        let bound = wanted("disk", "mnt\"\nbind = { a = \"/srv/a\" } #");
        assert_ne!(wanted("disk", "mnt"), bound);
        assert!(bound.to_string().ends_with("mnt, a on /srv/a"), "{bound}");
    }

    #[test]
    fn only_one_of_many_processes_holds_the_claim() {
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
