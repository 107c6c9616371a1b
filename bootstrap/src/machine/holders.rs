//! Finds the users of a block device in `/proc` and `/sys`, as `lsof`, `lsblk` and `swapon` together would.

use std::collections::HashSet;
use std::fmt;
use std::fs;
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
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, seen_by: None } => write!(f, "it is mounted at {}", text::path(at)),
            Self::Mount { at, seen_by: Some(pid) } => {
                write!(f, "it is mounted at {} in the mount namespace of process {pid}", text::path(at))
            }
            Self::Process { pid, name } => write!(f, "process {pid} ({}) has it open", printable(name)),
            Self::LazilyUnmounted { pid, name, path } => write!(
                f,
                "process {pid} ({}) uses {} in a filesystem on it that was unmounted lazily (umount -l): end that process, \
                 or have it close the file or leave the folder",
                printable(name),
                text::path(path)
            ),
            Self::Device(name) => write!(f, "the device {name} uses it"),
            Self::Swap => f.write_str("it is swap space"),
        }
    }
}

/// Returns every user of `device` or of one of its partitions, except for this process. Users that this process has no
/// permission to see are left out.
pub fn holders_of(device: &Path) -> Vec<Holder> {
    let nodes = Nodes::of(device);
    let mut holders = mounts_of(&nodes);
    if let Ok(swaps) = fs::read_to_string("/proc/swaps") {
        let swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        holders.extend(swaps.filter(|path| nodes.has_path(Path::new(path))).map(|_| Holder::Swap));
    }
    for name in &nodes.names {
        holders.extend(entries(&nodes.sys.join(name).join("holders")).map(Holder::Device));
    }
    holders.extend(entries(&nodes.sys.join("holders")).map(Holder::Device));
    holders.extend(processes(&nodes));
    holders
}

/// Describes a process that has the file or block device open, and says what to do about it. Returns `None` if this process
/// does not see such a process.
pub fn opener_of(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let found = processes(&Nodes::of(&path)).into_iter().find_map(|holder| match holder {
        Holder::Process { pid, name } => Some((pid, name)),
        _ => None,
    })?;
    let (pid, name) = found;
    // Only whole words are compared, and none is shown: an argument may be secret.
    let line = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
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

/// Returns whether the system swaps to `device`, to one of its partitions, or to a file on a filesystem on it. This
/// accesses nothing on the device.
pub(crate) fn is_swapped_to(device: &Path) -> bool {
    is_among_swaps(
        &Nodes::of(device),
        &fs::read("/proc/swaps").unwrap_or_default(),
        &mounts::list().unwrap_or_default(),
    )
}

fn is_among_swaps(nodes: &Nodes, swaps: &[u8], mounts: &[Mount]) -> bool {
    swaps.split(|byte| *byte == b'\n').skip(1).any(|line| {
        let mut fields = line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
        let Some(path) = fields.next().map(|field| PathBuf::from(unescape(field))) else { return false };
        match fields.next() {
            Some(b"file") => {
                // Of several mounts at one path, the last one is visible.
                let mount = mounts.iter().filter(|mount| path.starts_with(&mount.mountpoint));
                let mount = mount.max_by_key(|mount| mount.mountpoint.as_os_str().len());
                mount.is_some_and(|mount| nodes.numbers.contains(&mount.device_number))
            }
            _ => nodes.has_path(&path),
        }
    })
}

/// Returns the kernel's name of a device: `nbd0` for `/dev/nbd0`.
pub(crate) fn kernel_name(device: &Path) -> String {
    device.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Returns the sysfs directory of a whole disk.
pub(crate) fn sys_block(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(kernel_name(device))
}

/// A disk and its partitions.
struct Nodes {
    sys: PathBuf,
    names: Vec<String>,
    paths: Vec<PathBuf>,
    numbers: Vec<String>,
}

impl Nodes {
    fn of(device: &Path) -> Self {
        let sys = sys_block(device);
        let partitions = entries(&sys).filter(|name| sys.join(name).join("partition").exists());
        let mut nodes =
            Self { names: partitions.collect(), paths: vec![device.to_owned()], numbers: Vec::new(), sys: sys.clone() };
        nodes.paths.extend(nodes.names.iter().map(|name| Path::new("/dev").join(name)));
        let numbers = std::iter::once(sys.clone()).chain(nodes.names.iter().map(|name| sys.join(name)));
        nodes.numbers = numbers
            .filter_map(|dir| fs::read_to_string(dir.join("dev")).ok())
            .map(|number| number.trim().to_owned())
            .collect();
        nodes
    }

    fn has_path(&self, path: &Path) -> bool {
        self.paths.iter().any(|ours| ours == path)
    }
}

fn mounts_of(nodes: &Nodes) -> Vec<Holder> {
    let mut namespaces = HashSet::new();
    namespaces.extend(fs::read_link("/proc/self/ns/mnt"));
    let mut holders = Vec::new();
    let mut add = |mounts: Vec<Mount>, seen_by| {
        let ours = mounts
            .into_iter()
            .filter(|mount| nodes.numbers.contains(&mount.device_number) || nodes.has_path(&mount.source));
        holders.extend(ours.map(|mount| Holder::Mount { at: mount.mountpoint, seen_by }));
    };
    if let Ok(mounts) = mounts::list() {
        add(mounts, None);
    }
    for pid in pids() {
        let process = Path::new("/proc").join(pid.to_string());
        // Skip namespaces that were seen already or may not be inspected.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if namespaces.insert(namespace)
            && let Ok(mounts) = mounts::of_process(&process)
        {
            add(mounts, Some(pid));
        }
    }
    holders
}

fn processes(nodes: &Nodes) -> Vec<Holder> {
    let own = std::process::id();
    let mut holders = Vec::new();
    for pid in pids().filter(|pid| *pid != own) {
        let process = Path::new("/proc").join(pid.to_string());
        // Reading these links does not access the files behind them, which this process itself might serve.
        let mut links = entries(&process.join("fd")).filter_map(|fd| fs::read_link(process.join("fd").join(fd)).ok());
        if links.any(|path| nodes.has_path(&path)) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            holders.push(Holder::Process { pid, name: name.trim().to_owned() });
        } else if let Some(path) = used_though_unmounted(&process, &nodes.numbers) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            holders.push(Holder::LazilyUnmounted { pid, name: name.trim().to_owned(), path });
        }
    }
    holders
}

/// Returns a file that a process uses although the file's mount is gone from the process's mount table. The process has the
/// file open, or the file is its working directory, root or program. Only files on the devices with these `numbers` count.
///
/// This function does not ask the filesystem about the file, because the filesystem may hang or be served by this process.
/// It reads only the attributes that the kernel has cached (`AT_STATX_DONT_SYNC`). It does not look for memory mappings of
/// closed files, because reading a process's mappings could wait for the process. It does not find files on btrfs, which
/// have other device numbers.
fn used_though_unmounted(process: &Path, numbers: &[String]) -> Option<PathBuf> {
    let table = mounts::of_process(process).ok()?;
    let mounts: HashSet<u64> = table.iter().map(|mount| mount.id).collect();
    let is_ours = |link: &Path| {
        let flags = AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(rustix::fs::CWD, link, flags, StatxFlags::empty());
        found.is_ok_and(|found| numbers.contains(&format!("{}:{}", found.stx_dev_major, found.stx_dev_minor)))
    };
    let files = entries(&process.join("fd")).filter_map(|fd| {
        let info = fs::read_to_string(process.join("fdinfo").join(&fd)).ok()?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
        (!mounts.contains(&mount)).then(|| process.join("fd").join(fd))
    });
    // These links have no mount number. They are needed only if no filesystem of the device is mounted: a mounted one
    // is reported from the mount table.
    let folders = ["cwd", "root", "exe"].into_iter().map(|link| process.join(link));
    let is_mounted = table.iter().any(|mount| numbers.contains(&mount.device_number));
    let folders = folders.filter(|_| !is_mounted);
    let used = files.chain(folders).filter_map(|link| Some((fs::read_link(&link).ok()?, link)));
    used.filter(|(path, _)| path.is_absolute()).find(|(_, link)| is_ours(link)).map(|(path, _)| path)
}

fn pids() -> impl Iterator<Item = u32> {
    entries(Path::new("/proc")).filter_map(|name| name.parse().ok())
}

fn entries(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_on_a_device_is_a_partition_or_a_file_of_its_filesystem() {
        let nodes = Nodes {
            sys: PathBuf::from("/sys/block/nbd0"),
            names: Vec::new(),
            paths: vec![PathBuf::from("/dev/nbd0")],
            numbers: vec!["43:0".to_owned()],
        };
        let mounts = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 43:0 / /mnt/a\\040b rw - ext4 /dev/nbd0 rw\n";
        let swaps = |lines: &str| format!("Filename Type Size Used Priority\n{lines}\n");
        for (lines, expected) in [
            ("", false),
            ("/dev/sda2 partition 100 0 -2", false),
            ("/dev/sda2 partition 100 0 -2\n/dev/nbd0 partition 100 0 -3", true),
            ("/mnt/a\\040b/swapfile file 100 0 -2", true),
            ("/mnt/other/swapfile file 100 0 -2", false),
        ] {
            assert_eq!(
                is_among_swaps(&nodes, swaps(lines).as_bytes(), &mounts::parse(mounts.as_bytes())),
                expected,
                "{lines}"
            );
        }
    }

    #[test]
    fn a_process_that_has_a_file_open_is_found_by_name() {
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
            let process = |child: &std::process::Child| Path::new("/proc").join(child.id().to_string());
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
