//! The real system behind the steps: disks, programs and the kernel's devices.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use engine::luks::FormatOptions;
use engine::store::{Access, BlockStore, Caching, Medium};
use engine::text::human;
use engine::volume::Volume;
use nbd_server::statistics::Statistics;

use crate::attach::{self, Attachment, Remains};
use crate::config::{BindConfig, Config, FilesystemConfig, VolumeConfig};
use crate::keys::{self, KeySource, Secret, SecretRequest};
use crate::machine::bare_folder::{self, Protection};
use crate::machine::programs::{self, ProgramError, QUICK, WHOLE_FILESYSTEM};
use crate::machine::root::Root;
use crate::machine::selection::Selection;
use crate::machine::{cpu, disk, holders, memory, mounts, new_file, random};
use crate::steps::Outside;
use crate::steps::outside::{Attached, Devices, Disks, Filesystems, Folder, HeaderLock, Machine};
use crate::volume::new_volume::{self, Strength};

/// Returns what the steps need to know about this machine.
///
/// # Errors
/// The errors of [`cpu::path`].
pub fn machine() -> Result<Machine> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(Machine { cpu: cpu::path()?, memory_kib: memory::limit_kib(), unix_time: since_1970.as_secs() })
}

/// The real system for `plan` and `doctor`, which only ask the steps what they would do. Fetches no secret.
pub struct Looking {
    keys: RealKeys<'static>,
    disks: RealDisks,
    devices: RealDevices,
    filesystems: RealFilesystems<'static>,
    machine: Machine,
}

impl Looking {
    /// Prepares to ask the steps of this configuration.
    ///
    /// # Errors
    /// The errors of [`machine`].
    pub fn new(config: &Config) -> Result<Self> {
        let options = attach::Options {
            method: attach::Method::Auto,
            device: None,
            connections: 1,
            request_timeout: None,
            read_only: true,
            identifier: String::new(),
            mount_dir: PathBuf::new(),
        };
        Ok(Self {
            keys: RealKeys { source: keys::source(&config.key), fetch: &no_secret, strength: config.strength },
            disks: RealDisks { caching: Caching::PageCache, root: Root::of_this_machine() },
            devices: RealDevices { options },
            filesystems: RealFilesystems { watch: &NoWork, keeper: None, gone: None },
            machine: machine()?,
        })
    }

    /// Makes everything that is mounted from `gone` count as unmounted. `gone` is the device of a dead server, which `up`
    /// cleans up first.
    #[must_use]
    pub fn once_gone(mut self, gone: Option<PathBuf>) -> Self {
        self.filesystems.gone = gone;
        self
    }

    /// Returns the system as the steps see it.
    pub fn outside(&self) -> Outside<'_> {
        let Self { keys, disks, devices, filesystems, machine } = self;
        Outside { keys, disks, devices, filesystems, machine: *machine }
    }
}

fn no_secret(_: SecretRequest) -> Result<Secret> {
    bail!("internal error: a look fetches no secret")
}

/// The observer for [`Looking`], which does no work that takes long.
struct NoWork;

impl LongWork for NoWork {
    fn begins(&self, _what: &str) {}

    fn may_go_on(&self) -> bool {
        false
    }

    fn can_be_called_off(&self) -> bool {
        true
    }
}

/// Files and block devices.
#[derive(Debug, Clone)]
pub struct RealDisks {
    /// Whether disks are opened with the page cache or with direct I/O.
    pub caching: Caching,
    /// The machine whose disks these are.
    pub root: Root,
}

impl Disks for RealDisks {
    fn exists(&self, path: &Path) -> Result<bool> {
        path.try_exists().with_context(|| path.display().to_string())
    }

    fn check_folder(&self, path: &Path) -> Result<()> {
        Ok(new_file::check_folder(path)?)
    }

    fn make(&self, path: &Path, size: u64) -> Result<()> {
        Ok(disk::make_file(path, size)?)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).with_context(|| path.display().to_string())
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        Ok(Arc::new(disk::open_as_allowed(path, self.caching)?))
    }

    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        Ok(Arc::new(disk::open(path, Access::ReadOnly, Caching::PageCache)?))
    }

    fn refuse_if_used(&self, path: &Path) -> Result<()> {
        Ok(disk::refuse_if_used(path)?)
    }

    fn confirm(&self, wanted: &Selection, path: &Path) -> Result<()> {
        Ok(wanted.confirm(&self.root, path)?)
    }

    fn refuse_unless_meant(&self, wanted: &Selection, path: &Path) -> Result<()> {
        Ok(wanted.refuse_unless_meant(&self.root, path)?)
    }

    fn refuse_if_read_only(&self, path: &Path) -> Result<()> {
        Ok(disk::refuse_if_read_only(path)?)
    }

    fn lock_header(&self, path: &Path, disk: &dyn BlockStore) -> Result<Box<dyn HeaderLock>> {
        let Medium::File { file, .. } = disk.medium() else {
            bail!("internal error: {} is not a file, so it cannot be locked", path.display());
        };
        Ok(Box::new(disk::lock_header(path, file)?))
    }
}

impl HeaderLock for disk::HeaderLock {}

/// The kernel's devices.
#[derive(Debug, Clone)]
pub struct RealDevices {
    /// How to attach a volume.
    pub options: attach::Options,
}

impl Devices for RealDevices {
    fn has_nbd(&self) -> bool {
        Path::new("/sys/module/nbd").exists()
    }

    fn attach(&self, volume: Arc<Volume>) -> Result<Box<dyn Attached>> {
        Ok(Box::new(attach::attach(volume, &self.options)?))
    }
}

impl Attached for Attachment {
    fn device(&self) -> &Path {
        self.device()
    }

    fn remains(&self) -> Remains {
        self.remains()
    }

    fn ended(&self) -> Option<attach::EndedSignal> {
        Some(self.ended())
    }

    fn statistics(&self) -> Arc<Statistics> {
        self.statistics()
    }

    fn detach(self: Box<Self>) -> Result<(), (Box<dyn Attached>, anyhow::Error)> {
        (*self).detach().map_err(|still| (still.attachment as Box<dyn Attached>, still.error.into()))
    }
}

/// An observer of work that may take minutes.
pub trait LongWork {
    /// Reports that the work begins. `what` describes it, such as "making ...".
    fn begins(&self, what: &str);

    /// Returns whether the work may go on. Called often; `false` ends the work.
    fn may_go_on(&self) -> bool;

    /// Returns whether anybody can end the work, so that it needs no time limit.
    fn can_be_called_off(&self) -> bool;
}

/// mkfs, mount and umount.
#[derive(Clone)]
pub struct RealFilesystems<'w> {
    /// The observer while mkfs or mount runs.
    pub watch: &'w dyn LongWork,
    /// This program, which ends mkfs if this process is killed (see [`programs::run_long`]), and makes bind mounts.
    pub keeper: Option<&'w Path>,
    /// The device of a dead server. For a plan, what is mounted from it counts as unmounted.
    pub gone: Option<PathBuf>,
}

/// The filesystem is in use, so it cannot be unmounted.
#[derive(Debug, thiserror::Error)]
#[error("{} is in use by {}: end them or have them leave it, then try again", mountpoint.display(), holders.join(", "))]
pub struct FilesystemInUse {
    /// The folder on which the filesystem is mounted.
    pub mountpoint: PathBuf,
    /// The processes that use the filesystem, as `name (pid)`.
    pub holders: Vec<String>,
}

/// umount has not ended within its time limit, and the filesystem is not in the table of mounts any more.
#[derive(Debug, thiserror::Error)]
#[error(
    "the filesystem is not mounted on {} any more, but the kernel still writes it to the disk. Wait, and do not switch the \
     machine off: {error}", mountpoint.display()
)]
pub struct StillWritten {
    /// The folder on which the filesystem was mounted.
    pub mountpoint: PathBuf,
    /// The error of umount.
    pub error: ProgramError,
}

impl Filesystems for RealFilesystems<'_> {
    fn mounted_on(&self, mountpoint: &Path) -> Result<Option<mounts::Mount>> {
        let mounted = mounts::on(mountpoint).context("/proc/self/mountinfo")?;
        Ok(mounted.filter(|mount| self.gone.as_ref() != Some(&mount.source)))
    }

    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let missing: Vec<PathBuf> =
            path.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        refuse_files(path)?;
        let mut made: Vec<PathBuf> = Vec::new();
        for folder in missing.into_iter().rev() {
            if let Err(error) = std::fs::create_dir(&folder) {
                for folder in made.iter().rev() {
                    self.remove_folder(folder)?;
                }
                return Err(error).with_context(|| format!("could not make the folder {}", folder.display()));
            }
            made.push(folder);
        }
        Ok(made)
    }

    fn look_at_folder(&self, path: &Path) -> Result<Folder> {
        // Any access to a filesystem whose server is dead could wait forever.
        if self.gone.is_some() && mounts::on(path)?.is_some() {
            return Ok(Folder::Unseen);
        }
        refuse_files(path)?;
        let looked = bare_folder::is_protected(path).and_then(|is_protected| {
            Ok(if bare_folder::content(path)?.is_some() { Folder::Full } else { Folder::Empty(is_protected) })
        });
        match looked {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Folder::Missing),
            // Only root may look into a protected folder.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Folder::Unseen),
            looked => looked.with_context(|| path.display().to_string()),
        }
    }

    fn check_mkfs(&self, kind: &str) -> Result<()> {
        Ok(programs::check(&format!("mkfs.{kind}"))?)
    }

    fn see_to_folder(&self, path: &Path, protect: bool) {
        if let Err(error) = see_to_folder(path, protect) {
            tracing::warn!(
                "{}: could not prevent writes to this folder while the volume is not up: {error}",
                path.display()
            );
        }
    }

    fn remove_folder(&self, path: &Path) -> Result<()> {
        let removed = match std::fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && bare_folder::unprotect(path)? => {
                std::fs::remove_dir(path)
            }
            removed => removed,
        };
        removed.with_context(|| path.display().to_string())
    }

    fn make_filesystem(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        let mut args: Vec<&std::ffi::OsStr> = Vec::new();
        if quiet_option(&filesystem.kind) {
            args.push("-q".as_ref());
        }
        args.extend(filesystem.mkfs_options.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        args.push(device.as_os_str());
        let size = attach::size_of(device).map(|size| format!(" ({})", human(size))).unwrap_or_default();
        self.watch.begins(&format!("making the {} filesystem on {}{size}", filesystem.kind, device.display()));
        let program = format!("mkfs.{}", filesystem.kind);
        programs::run_long(&program, &args, self.keeper, &mut || self.watch.may_go_on())?;
        Ok(())
    }

    fn mount(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        let options = filesystem.options.join(",");
        let mut args: Vec<&std::ffi::OsStr> = vec!["-t".as_ref(), filesystem.kind.as_ref()];
        if !options.is_empty() {
            args.extend(["-o".as_ref(), options.as_ref() as &std::ffi::OsStr]);
        }
        args.extend([device.as_os_str(), filesystem.mountpoint.as_os_str()]);
        // If mount is ended, the next attempt replays a long journal, or checks the quotas of xfs, from the beginning. So a
        // time limit could keep the filesystem from ever being mounted.
        let limit = if self.watch.can_be_called_off() { Duration::MAX } else { WHOLE_FILESYSTEM };
        let mut every_minute = EveryMinute::from(Instant::now());
        let mounted = programs::run_while("mount", &args, limit, &mut || {
            if let Some(minutes) = every_minute.passed(Instant::now()) {
                tracing::warn!(
                    "mount has worked for {minutes} min on {}: the filesystem may replay its journal or check its quotas",
                    filesystem.mountpoint.display()
                );
            }
            self.watch.may_go_on()
        });
        match mounted {
            Ok(_) => Ok(()),
            // `mount` was ended after it had mounted the filesystem: by this process, or by another one, such as the kernel when
            // memory runs out. The filesystem is then unmounted normally, when the volume goes down.
            Err(error) if mounts::at(device, &filesystem.mountpoint)? == mounts::At::Mounted => {
                tracing::warn!("the filesystem is mounted, although {error}");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn bind(&self, device: &Path, mountpoint: &Path, bind: &BindConfig) -> Result<()> {
        // Another process does this, because this one serves the filesystem and must not access it.
        let program = self.keeper.context("internal error: a look mounts nothing")?.to_string_lossy();
        let BindConfig { folder, target } = bind;
        let paths = [mountpoint, folder.as_path(), target.as_path()].map(Path::as_os_str);
        let args = [&["bind-mount".as_ref(), "--".as_ref()], &paths[..]].concat();
        // A request to stop does not interrupt this: the filesystem is mounted already, so the volume is stopped as one that is up.
        match programs::run(&program, &args, WHOLE_FILESYSTEM) {
            Ok(_) => Ok(()),
            // The process was ended after it had mounted the folder, which is the last thing that it does.
            Err(error) if has_no_reason(&error) && mounts::at(device, target)? == mounts::At::Mounted => {
                tracing::warn!("{} is mounted, although {error}", target.display());
                Ok(())
            }
            Err(ProgramError::TimedOut { .. }) => {
                bail!("this took longer than {} minutes", WHOLE_FILESYSTEM.as_secs() / 60)
            }
            Err(ProgramError::Failed { said, .. }) if !said.is_empty() => {
                bail!("{}", said.strip_prefix("nbdcrypt: ").unwrap_or(&said))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn unmount(&self, device: &Path, mountpoint: &Path) -> Result<()> {
        let at = mountpoint.display();
        let mut busy_since = None;
        loop {
            match mounts::at(device, mountpoint)? {
                mounts::At::Mounted => {}
                mounts::At::Covered(_) => {
                    bail!("something else is mounted over {at}: unmount that first (umount {at})")
                }
                // Another process has unmounted it.
                mounts::At::Other(_) | mounts::At::Nothing => return Ok(()),
            }
            // After a success, try once more: the filesystem may be mounted there twice.
            let error = match programs::run("umount", &[mountpoint.as_os_str()], WHOLE_FILESYSTEM) {
                Ok(_) => continue,
                Err(error @ ProgramError::TimedOut { ended, .. }) => {
                    return after_time_out(&mounts::at(device, mountpoint)?, mountpoint, error, ended);
                }
                Err(error) => error,
            };
            let holders = holders::users_of_mount(mountpoint);
            if !holders.is_empty() {
                return Err(FilesystemInUse { mountpoint: mountpoint.to_owned(), holders }.into());
            }
            // The process that used the filesystem, such as a program that looks at every new mount, has just left it.
            if busy_since.get_or_insert_with(Instant::now).elapsed() > A_MOMENT {
                return Err(error.into());
            }
            std::thread::sleep(A_MOMENT / 20);
        }
    }

    fn sync(&self, device: &Path, mountpoint: Option<&Path>) -> Result<()> {
        // syncfs(2) writes the filesystem out and reports errors. It needs a path in the filesystem.
        let synced = mountpoint
            .filter(|at| matches!(mounts::at(device, at), Ok(mounts::At::Mounted)))
            .map(|at| programs::run("sync", &["--file-system".as_ref(), at.as_os_str()], WHOLE_FILESYSTEM));
        // BLKFLSBUF writes out the filesystem that the kernel has on the device, and the device's own page cache. It works
        // without a mount that this process sees: others may have bind mounts, or mounts in their own mount namespaces. It
        // reports no errors of the filesystem. (fsync(2) on the device's node would not write the filesystem's dirty files.)
        attach::write_out(device)?;
        synced.transpose()?;
        Ok(())
    }
}

/// Returns the outcome of a `umount` that took too long. `now` is what is mounted afterwards, and `ended` is whether `umount`
/// has ended.
fn after_time_out(now: &mounts::At, mountpoint: &Path, error: ProgramError, ended: bool) -> Result<()> {
    match now {
        mounts::At::Mounted | mounts::At::Covered(_) => Err(error.into()),
        mounts::At::Other(_) | mounts::At::Nothing if ended => Ok(()),
        // The kernel takes the mount out of the table first, and then writes the filesystem out.
        mounts::At::Other(_) | mounts::At::Nothing => {
            Err(StillWritten { mountpoint: mountpoint.to_owned(), error }.into())
        }
    }
}

fn see_to_folder(path: &Path, protect: bool) -> io::Result<()> {
    let at = path.display();
    if let Some((names, count)) = bare_folder::content(path)? {
        let names: Vec<_> = names.iter().map(|name| name.to_string_lossy().escape_debug().to_string()).collect();
        let more = if count > names.len() { format!(" and {} more", count - names.len()) } else { String::new() };
        let open = match protect && !bare_folder::is_protected(path)? {
            true => {
                ". The folder is not made immutable, since it is in use: while the volume is not up, what is written there is not \
                 encrypted. Empty it, and the next `nbdcrypt up` protects it"
            }
            false => "",
        };
        tracing::warn!(
            "{at} is not empty: it contains {}{more}, which are not in the volume and are hidden while it is mounted{open}",
            names.join(", ")
        );
        return Ok(());
    }
    if !protect {
        if bare_folder::unprotect(path)? {
            tracing::info!("{at} may again be written to while the volume is not up (protect-mountpoint = false)");
        }
        return Ok(());
    }
    match bare_folder::protect(path)? {
        Protection::Immutable => {
            tracing::info!("{at} is immutable while nothing is mounted there (chattr -i {at} undoes it)")
        }
        Protection::ReadOnly => tracing::info!("{at} is on a read-only filesystem"),
        Protection::Mode(why) => tracing::warn!(
            "{at} could not be made immutable ({why}), so it has mode 000: while the volume is not up, only root can \
             write there"
        ),
    }
    Ok(())
}

/// Counts the minutes that some work has taken so far.
struct EveryMinute {
    start: Instant,
    reported: u64,
}

impl EveryMinute {
    fn from(start: Instant) -> Self {
        Self { start, reported: 0 }
    }

    /// Returns how many minutes have passed, once for each number.
    fn passed(&mut self, now: Instant) -> Option<u64> {
        let minutes = now.duration_since(self.start).as_secs() / 60;
        (minutes > self.reported).then(|| {
            self.reported = minutes;
            minutes
        })
    }
}

/// Returns whether a program was ended, so that it could not say what failed.
fn has_no_reason(error: &ProgramError) -> bool {
    match error {
        ProgramError::TimedOut { .. } | ProgramError::Interrupted { .. } => true,
        ProgramError::Failed { said, .. } => said.is_empty(),
        ProgramError::Missing { .. } | ProgramError::Start { .. } => false,
    }
}

/// How long to retry umount if the filesystem is in use, although no process that uses it can be found.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Returns whether this mkfs accepts `-q`. The mkfs programs that do not accept it print little anyway.
fn quiet_option(kind: &str) -> bool {
    matches!(kind, "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "f2fs")
}

/// Fails if a file is in the place of the folder `path` or of a folder above it.
fn refuse_files(path: &Path) -> Result<()> {
    let existing = path.ancestors().find(|folder| folder.exists());
    match existing.filter(|existing| !existing.is_dir()) {
        None => Ok(()),
        Some(file) if file == path => bail!("{} is not a folder, so nothing can be mounted there", path.display()),
        Some(file) => bail!(
            "the folder {} cannot be made, because {} is not a folder; choose another `mountpoint`",
            path.display(),
            file.display()
        ),
    }
}

/// Removes what a dead server has left. `mountpoints` are unmounted in this order. Calling this twice does no harm.
///
/// # Errors
/// Fails if something could not be removed, and says why.
pub fn clean_up(mountpoints: &[&Path], remains: Option<&Remains>) -> Result<()> {
    let mut holders = Vec::new();
    // This comes first, since `umount` would wait for the dead server.
    if let Some(Err(error)) = remains.map(attach::fail_requests_of_stale) {
        tracing::debug!("{error}");
    }
    if let Some(remains) = remains {
        for mountpoint in mountpoints {
            holders.extend(unmount_stale(mountpoint, &remains.device)?);
        }
    }
    holders.sort();
    holders.dedup();
    let detached = remains.map_or(Ok(()), attach::detach_stale);
    if holders.is_empty() {
        return Ok(detached?);
    }
    detached.with_context(|| {
        format!("the dead filesystem is still in use by {}: end them, then try again", holders.join(", "))
    })
}

/// Unmounts what is mounted from the dead server's device. Somebody may have mounted something else there since. Returns the
/// processes that still use the dead filesystem.
fn unmount_stale(mountpoint: &Path, device: &Path) -> Result<Vec<String>> {
    let mut holders = Vec::new();
    let is_mounted = || Ok::<_, io::Error>(mounts::on(mountpoint)?.is_some_and(|mount| mount.source == device));
    while is_mounted()? {
        // The server is gone, so nothing can be written any more. Processes that still use the dead filesystem keep it
        // until they leave it. Even if `umount` failed, the mount may be gone from the table: `umount` took too long, or
        // another process unmounted it first.
        if programs::run("umount", &[mountpoint.as_os_str()], QUICK).is_err() && is_mounted()? {
            holders = holders::users_of_mount(mountpoint);
            let lazily = programs::run("umount", &["-l".as_ref(), mountpoint.as_os_str()], QUICK);
            if let Err(error) = lazily
                && is_mounted()?
            {
                return Err(error.into());
            }
        }
    }
    Ok(holders)
}

/// The source of the secret, and of new keys.
pub struct RealKeys<'k> {
    /// The source of the secret.
    pub source: Box<dyn KeySource>,
    /// Gets the secret.
    pub fetch: &'k dyn Fn(SecretRequest) -> Result<Secret>,
    /// Whether the secret can be guessed.
    pub strength: Strength,
}

impl crate::steps::outside::Keys for RealKeys<'_> {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn check(&self) -> Result<()> {
        Ok(self.source.check()?)
    }

    fn secret(&self, request: SecretRequest) -> Result<Secret> {
        (self.fetch)(request)
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        random::fill(bytes)
    }

    fn format_options(&self, volume: &VolumeConfig, data_len: u64) -> Result<FormatOptions> {
        let sector_size = new_volume::sector_size(volume.sector_size, data_len)?;
        let uuid = new_volume::new_uuid(&mut random::fill)?;
        new_volume::options(volume.kind, sector_size, self.strength, uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_umount_that_does_not_end_may_have_unmounted() {
        let after = |now, ended| {
            let error = ProgramError::TimedOut { program: "umount".to_owned(), limit: WHOLE_FILESYSTEM, ended };
            after_time_out(&now, Path::new("/mnt/x"), error, ended)
        };
        let error = after(mounts::At::Nothing, false).unwrap_err();
        assert!(error.is::<StillWritten>() && error.to_string().contains("still writes"), "{error}");
        assert!(!after(mounts::At::Mounted, false).unwrap_err().is::<StillWritten>());
        after(mounts::At::Nothing, true).unwrap();
    }

    #[test]
    fn each_minute_is_reported_once() {
        let start = Instant::now();
        let mut every_minute = EveryMinute::from(start);
        let mut passed = |seconds| every_minute.passed(start + Duration::from_secs(seconds));
        assert_eq!([0, 59, 60, 61, 119, 300, 301].map(&mut passed), [None, None, Some(1), None, None, Some(5), None]);
    }
}
