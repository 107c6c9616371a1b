//! Finds the users of a block device, a file or a mountpoint in `/proc` and `/sys`, as `lsof`, `lsblk`, `losetup` and `swapon`
//! together would.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use engine::text::printable;
use rustix::fs::{AtFlags, StatxFlags};

use crate::machine::mounts::{self, Mount, unescape};
use crate::text;

/// A user of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A filesystem on the device is mounted.
    Mount {
        /// The mountpoint.
        at: PathBuf,
        /// The filesystem's type.
        filesystem: String,
        /// If the mount is in another mount namespace, a process that sees it.
        seen_by: Option<u32>,
    },
    /// A process has the device open.
    Process {
        /// The process id.
        pid: u32,
        /// The process's name as the kernel keeps it, at most 15 characters.
        name: String,
    },
    /// A process uses a file of a filesystem on the device, but the filesystem is no longer mounted anywhere, as after
    /// `umount -l`.
    LazilyUnmounted {
        /// The process id.
        pid: u32,
        /// The process's name.
        name: String,
        /// The file or folder, as a path from the filesystem's root.
        path: PathBuf,
    },
    /// Another block device uses the device, such as a mapping or a RAID.
    Device(String),
    /// The device is swap space.
    Swap,
}

impl Holder {
    /// Returns whether the use lasts until somebody ends it. A process that has the device open may close it in a moment:
    /// udev and `losetup` open a device only briefly.
    pub fn is_lasting(&self) -> bool {
        !matches!(self, Self::Process { .. })
    }

    /// Returns whether the use may end in a moment. Besides a process that has the device open, this is a mount in another mount
    /// namespace: a service or a container that starts gets a copy of every mount, and gives up the copies that it does not need.
    pub fn may_end_soon(&self) -> bool {
        matches!(self, Self::Process { .. } | Self::Mount { seen_by: Some(_), .. })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, filesystem, seen_by } => {
                write!(f, "its {} filesystem is mounted on {}", printable(filesystem), text::path(at))?;
                seen_by.map_or(Ok(()), |pid| write!(f, " in the mount namespace of process {pid}"))
            }
            Self::Process { pid, name } => write!(f, "process {pid} ({}) has it open", printable(name)),
            Self::LazilyUnmounted { pid, name, path } => write!(
                f,
                "process {pid} ({}) uses {} in a filesystem on it that was unmounted lazily (umount -l): end that process, \
                 or have it close the file or leave the folder",
                printable(name),
                text::path(path)
            ),
            Self::Device(name) => write!(f, "the device {name} is built on it"),
            Self::Swap => f.write_str("it is swap space"),
        }
    }
}

/// Returns every user of `device` or of one of its partitions, except for this process. Users that this process has no
/// permission to see are left out.
pub fn holders_of(device: &Path) -> Vec<Holder> {
    let nodes = Node::all_of(device);
    let lasting = lasting_users(&nodes).into_iter().map(|(_, holder)| holder);
    lasting.chain(processes(&nodes)).collect()
}

/// A user of a block device or of one of its partitions.
pub struct LastingUser {
    /// The user, and what to do about it.
    pub text: String,
    /// The use may end in a moment: see [`Holder::may_end_soon`].
    pub may_end_soon: bool,
}

/// Returns a lasting user of a block device or of one of its partitions, or `None` if this process sees none. A use that does not
/// end by itself comes first.
pub fn lasting_user_of(device: &Path) -> Option<LastingUser> {
    let nodes = Node::all_of(device);
    let users = lasting_users(&nodes).into_iter();
    let (node, holder) = users.min_by_key(|(node, holder)| (holder.may_end_soon(), node.partition.is_some()))?;
    let part = node.partition.as_ref().map(|name| format!("of its partition {name}, ")).unwrap_or_default();
    let cure = match &holder {
        Holder::Mount { at, seen_by: None, .. } => format!(" (umount {})", text::path(at)),
        _ => String::new(),
    };
    Some(LastingUser { text: format!("{part}{holder}{cure}"), may_end_soon: holder.may_end_soon() })
}

/// Returns the loop device whose backing file is at `path`.
pub(super) fn loop_device_on(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let names = entries(Path::new("/sys/block"));
    let mut devices = names.map(|name| Path::new("/dev").join(name));
    devices.find(|device| backing_file(&sys_block(device)) == Some(path.clone())).map(|device| text::path(&device))
}

/// Returns the path of the backing file of the loop device whose sysfs directory is `sys_block`. It is the path that the
/// file had when the loop device was attached. Returns `None` if the loop device has no backing file, or if the device is
/// not a loop device.
pub fn backing_file(sys_block: &Path) -> Option<PathBuf> {
    let path = fs::read(sys_block.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(OsStr::from_bytes(path.strip_suffix(b"\n").unwrap_or(&path))))
}

/// Describes a process that has the file or block device open, and says what to do about it. Returns `None` if this process
/// does not see such a process.
pub fn opener_of(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let (pid, name) = processes(&Node::all_of(&path)).find_map(|holder| match holder {
        Holder::Process { pid, name } => Some((pid, name)),
        _ => None,
    })?;
    // Only whole words are compared, and none is shown: an argument may be secret.
    let line = fs::read(Process(pid).at("cmdline")).unwrap_or_default();
    let calls = |verb: &[u8]| name == "nbdcrypt" && line.split(|byte| *byte == 0).any(|word| word == verb);
    Some(if calls(b"up") {
        format!(
            "`nbdcrypt up` serves it (process {pid}): `nbdcrypt status` shows the volume, and `nbdcrypt down` takes it down"
        )
    } else if calls(b"serve") {
        format!("`nbdcrypt serve` serves it (process {pid}): end that process first (kill {pid})")
    } else {
        format!("process {pid} ({}) has it open: end that process first", printable(&name))
    })
}

/// Returns the processes that have files of the filesystem on `mountpoint` open, or whose working directory, root or
/// program lies on it, as `name (pid)`. Processes that this process may not inspect are left out.
pub fn users_of_mount(mountpoint: &Path) -> Vec<String> {
    let real = mountpoint.canonicalize();
    let mountpoint = real.as_deref().unwrap_or(mountpoint);
    let leads_there = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    let users = Process::all().filter(|process| process.folders().chain(process.files()).any(leads_there));
    users.map(|process| format!("{} ({})", printable(&process.name()), process.0)).collect()
}

/// Returns whether the system swaps to `device`, to one of its partitions, or to a file on a filesystem on it. This
/// accesses nothing on the device.
pub(crate) fn is_swapped_to(device: &Path) -> bool {
    let mounts = mounts::list().unwrap_or_default();
    !swaps_on(&Node::all_of(device), &fs::read("/proc/swaps").unwrap_or_default(), &mounts).is_empty()
}

/// Returns the kernel's name of a device: `nbd0` for `/dev/nbd0`.
pub(crate) fn kernel_name(device: &Path) -> String {
    device.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Returns the sysfs directory of a whole disk.
pub(crate) fn sys_block(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(kernel_name(device))
}

/// A disk, or one of its partitions.
struct Node {
    /// The name of the partition.
    partition: Option<String>,
    path: PathBuf,
    sys: PathBuf,
    /// The device number, `major:minor`.
    number: Option<String>,
}

impl Node {
    fn new(partition: Option<String>, path: PathBuf, sys: PathBuf) -> Self {
        let number = fs::read_to_string(sys.join("dev")).ok().map(|number| number.trim().to_owned());
        Self { partition, path, sys, number }
    }

    /// Returns the disk, and then its partitions.
    fn all_of(device: &Path) -> Vec<Self> {
        // The kernel's lists name no symbolic links, such as those in /dev/disk/by-id.
        let device = &device.canonicalize().unwrap_or_else(|_| device.to_owned());
        let by_number = mounts::number_of(device).map(|number| Path::new("/sys/dev/block").join(number));
        let sys = by_number.filter(|sys| sys.exists()).unwrap_or_else(|| sys_block(device));
        let partitions = entries(&sys).filter(|name| sys.join(name).join("partition").exists());
        let partitions = partitions.map(|name| {
            let (path, sys) = (Path::new("/dev").join(&name), sys.join(&name));
            Self::new(Some(name), path, sys)
        });
        std::iter::once(Self::new(None, device.to_owned(), sys.clone())).chain(partitions).collect()
    }

    fn is_source_of(&self, mount: &Mount) -> bool {
        self.path == mount.source || self.number.as_ref() == Some(&mount.device_number)
    }
}

/// Returns the lasting users of the devices, each with the device that it uses.
fn lasting_users(nodes: &[Node]) -> Vec<(&Node, Holder)> {
    let mut users = Vec::new();
    for (mount, seen_by) in every_mount() {
        if let Some(node) = nodes.iter().find(|node| node.is_source_of(&mount)) {
            let Mount { mountpoint: at, filesystem, .. } = mount;
            users.push((node, Holder::Mount { at, filesystem, seen_by }));
        }
    }
    let swaps = swaps_on(nodes, &fs::read("/proc/swaps").unwrap_or_default(), &[]);
    users.extend(swaps.into_iter().map(|node| (node, Holder::Swap)));
    for node in nodes {
        users.extend(entries(&node.sys.join("holders")).map(|name| (node, Holder::Device(name))));
    }
    users
}

/// Returns the devices that the system swaps to, directly or in a file on one of the `mounts`.
fn swaps_on<'n>(nodes: &'n [Node], swaps: &[u8], mounts: &[Mount]) -> Vec<&'n Node> {
    let swaps = swaps.split(|byte| *byte == b'\n').skip(1);
    let used = swaps.filter_map(|line| {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let path = PathBuf::from(unescape(fields.next()?));
        match fields.next() {
            Some(b"file") => {
                // Of several mounts at one path, the last one is visible.
                let mount = mounts.iter().filter(|mount| path.starts_with(&mount.mountpoint));
                let mount = mount.max_by_key(|mount| mount.mountpoint.as_os_str().len())?;
                nodes.iter().find(|node| node.number.as_ref() == Some(&mount.device_number))
            }
            _ => nodes.iter().find(|node| node.path == path),
        }
    });
    used.collect()
}

/// Returns the mounts of every mount namespace. Those of another namespace come with a process that sees them. Namespaces that
/// this process may not inspect are left out.
fn every_mount() -> Vec<(Mount, Option<u32>)> {
    let mut mounts: Vec<_> = mounts::list().unwrap_or_default().into_iter().map(|mount| (mount, None)).collect();
    let mut namespaces = HashSet::new();
    namespaces.extend(fs::read_link("/proc/self/ns/mnt"));
    for process in Process::all() {
        let Ok(namespace) = fs::read_link(process.at("ns/mnt")) else { continue };
        // If the process has ended meanwhile, another process in its namespace is asked.
        if !namespaces.contains(&namespace)
            && let Ok(theirs) = mounts::of_process(&process.at(""))
        {
            namespaces.insert(namespace);
            mounts.extend(theirs.into_iter().map(|mount| (mount, Some(process.0))));
        }
    }
    mounts
}

/// Returns the other processes that have one of the devices open, or use a lazily unmounted filesystem on it.
fn processes(nodes: &[Node]) -> impl Iterator<Item = Holder> {
    let own = std::process::id();
    let numbers: Vec<_> = nodes.iter().filter_map(|node| node.number.clone()).collect();
    Process::all().filter(move |process| process.0 != own).filter_map(move |process| {
        // Reading these links does not access the files behind them, which this process itself might serve.
        let mut links = process.files().filter_map(|link| fs::read_link(link).ok());
        if links.any(|path| nodes.iter().any(|node| node.path == path)) {
            return Some(Holder::Process { pid: process.0, name: process.name() });
        }
        let path = used_though_unmounted(&process, &numbers)?;
        Some(Holder::LazilyUnmounted { pid: process.0, name: process.name(), path })
    })
}

/// A process, by its id.
struct Process(u32);

impl Process {
    fn all() -> impl Iterator<Item = Self> {
        entries(Path::new("/proc")).filter_map(|name| name.parse().ok().map(Self))
    }

    /// Returns the path of a file in the process's folder in /proc.
    fn at(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(file)
    }

    /// Returns the process's name as the kernel keeps it.
    fn name(&self) -> String {
        fs::read_to_string(self.at("comm")).unwrap_or_default().trim().to_owned()
    }

    /// Returns the links to the files that the process has open.
    fn files(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let folder = self.at("fd");
        entries(&folder).map(move |fd| folder.join(fd))
    }

    /// Returns the links to the process's working directory, root and program.
    fn folders(&self) -> impl Iterator<Item = PathBuf> {
        ["cwd", "root", "exe"].into_iter().map(|link| self.at(link))
    }
}

/// Returns a file that a process uses although the file's mount is gone from the process's mount table. The process has the
/// file open, or the file is its working directory, root or program. Only files on the devices with these `numbers` count.
///
/// This does not ask the filesystem about the file, because the filesystem may hang or be served by this process: it reads
/// only the attributes that the kernel has cached (`AT_STATX_DONT_SYNC`). It does not look for memory mappings of closed
/// files, because reading a process's mappings could wait for the process. It does not find files on btrfs, which have
/// other device numbers.
fn used_though_unmounted(process: &Process, numbers: &[String]) -> Option<PathBuf> {
    let table = mounts::of_process(&process.at("")).ok()?;
    let mounts: HashSet<u64> = table.iter().map(|mount| mount.id).collect();
    let is_ours = |link: &Path| {
        let flags = AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(rustix::fs::CWD, link, flags, StatxFlags::empty());
        found.is_ok_and(|found| numbers.contains(&format!("{}:{}", found.stx_dev_major, found.stx_dev_minor)))
    };
    let files = process.files().filter(|link| {
        let info = fs::read_to_string(process.at("fdinfo").join(kernel_name(link))).unwrap_or_default();
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        mount.is_some_and(|mount: u64| !mounts.contains(&mount))
    });
    // These links have no mount number. They are needed only if no filesystem of the device is mounted: a mounted one
    // is reported from the mount table.
    let is_mounted = table.iter().any(|mount| numbers.contains(&mount.device_number));
    let folders = process.folders().filter(|_| !is_mounted);
    let used = files.chain(folders).filter_map(|link| Some((fs::read_link(&link).ok()?, link)));
    used.filter(|(path, _)| path.is_absolute()).find(|(_, link)| is_ours(link)).map(|(path, _)| path)
}

fn entries(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_on_a_device_may_be_a_file() {
        let nodes = [Node {
            partition: None,
            path: PathBuf::from("/dev/nbd0"),
            sys: PathBuf::from("/sys/block/nbd0"),
            number: Some("43:0".to_owned()),
        }];
        let mounts = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 43:0 / /mnt/a\\040b rw - ext4 /dev/nbd0 rw\n";
        let swaps = |lines: &str| format!("Filename Type Size Used Priority\n{lines}\n");
        for (lines, expected) in [
            ("", false),
            ("/dev/sda2 partition 100 0 -2", false),
            ("/dev/sda2 partition 100 0 -2\n/dev/nbd0 partition 100 0 -3", true),
            ("/mnt/a\\040b/swapfile file 100 0 -2", true),
            ("/mnt/other/swapfile file 100 0 -2", false),
        ] {
            let found = swaps_on(&nodes, swaps(lines).as_bytes(), &mounts::parse(mounts.as_bytes()));
            assert_eq!(!found.is_empty(), expected, "{lines}");
        }
    }

    #[test]
    fn a_process_in_a_folder_uses_the_mount() {
        let folder = tempfile::tempdir().unwrap();
        let _open = fs::File::create(folder.path().join("file")).unwrap();
        let me = format!("({})", std::process::id());
        assert!(users_of_mount(folder.path()).iter().any(|user| user.ends_with(&me)));
    }

    #[test]
    fn a_process_with_an_open_file_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").stdin(fs::File::open(file.path()).unwrap()).spawn().unwrap();
        let (holders, opener) = (holders_of(file.path()), opener_of(file.path()));
        child.kill().unwrap();
        child.wait().unwrap();
        // There may be other users: a child that another test is starting briefly has this test's files open.
        let sleeping = Holder::Process { pid: child.id(), name: "sleep".to_owned() };
        assert!(holders.contains(&sleeping), "{holders:?}");
        assert!(opener.is_some_and(|opener| opener.contains("end that process")));
        assert!(!holders_of(file.path()).contains(&sleeping));
    }

    /// `umount -l` takes a mount out of every table while its files are still in use.
    #[test]
    fn a_user_of_a_lazily_unmounted_filesystem_is_found() {
        let numbers = |path: &Path| {
            let found = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::empty()).unwrap();
            vec![format!("{}:{}", found.stx_dev_major, found.stx_dev_minor)]
        };
        let folder = tempfile::tempdir().unwrap();
        // This needs root. Without it, there is nothing to test.
        let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "none"]).arg(folder.path()).status();
        if !mounted.is_ok_and(|status| status.success()) {
            assert!(!rustix::process::geteuid().is_root(), "root can mount");
            return;
        }
        let numbers = numbers(folder.path());
        let file = folder.path().join("file");
        fs::write(&file, "text").unwrap();
        let start = |with_file: bool| {
            let mut sleep = std::process::Command::new("sleep");
            sleep.arg("60");
            match with_file {
                true => sleep.stdin(fs::File::open(&file).unwrap()),
                false => sleep.current_dir(folder.path()),
            };
            sleep.spawn().unwrap()
        };
        let children = [start(true), start(false)];
        let used: Vec<Option<PathBuf>> = {
            let process = |child: &std::process::Child| Process(child.id());
            let before = children.iter().all(|child| used_though_unmounted(&process(child), &numbers).is_none());
            let unmounted = std::process::Command::new("umount").arg("-l").arg(folder.path()).status();
            assert!(before && unmounted.unwrap().success());
            children.iter().map(|child| used_though_unmounted(&process(child), &numbers)).collect()
        };
        for mut child in children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(used.iter().all(Option::is_some), "{used:?}");
        let text = Holder::LazilyUnmounted { pid: 7, name: "vi".to_owned(), path: "/file".into() }.to_string();
        assert!(text.contains("process 7 (vi)") && text.contains("umount -l"), "{text}");
    }
}
