//! Who uses a block device: what `lsof`, `lsblk` and `swapon` would say together, read from `/proc` and `/sys`.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Something that uses a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A filesystem on it is mounted.
    Mount {
        /// Where.
        at: PathBuf,
        /// A process that sees the mount, where it is in another mount namespace than ours.
        seen_by: Option<u32>,
    },
    /// A process has it open.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, as the kernel keeps it: 15 characters at most.
        name: String,
    },
    /// Another block device lies on it: a mapping, a RAID.
    Device(String),
    /// The system swaps to it.
    Swap,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, seen_by: None } => write!(f, "it is mounted at {}", at.display()),
            Self::Mount { at, seen_by: Some(pid) } => {
                write!(f, "it is mounted at {} in the mount namespace of process {pid}", at.display())
            }
            Self::Process { pid, name } => write!(f, "process {pid} ({name}) has it open"),
            Self::Device(name) => write!(f, "{name} lies on it"),
            Self::Swap => f.write_str("it is swap space"),
        }
    }
}

/// Everything but this process that uses `device` or a partition of it, as far as this process may look.
pub fn holders_of(device: &Path) -> Vec<Holder> {
    let nodes = Nodes::of(device);
    let mut holders = mounts(&nodes);
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

/// The name the kernel knows a device by: `nbd0` of `/dev/nbd0`.
pub(super) fn kernel_name(device: &Path) -> String {
    device.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The directory that describes a whole disk.
pub(super) fn sys_block(device: &Path) -> PathBuf {
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

fn mounts(nodes: &Nodes) -> Vec<Holder> {
    let mut namespaces = HashSet::new();
    namespaces.extend(fs::read_link("/proc/self/ns/mnt"));
    let mut holders = Vec::new();
    let mut add = |table: &str, seen_by| {
        let mounts = table.lines().filter_map(MountLine::parse);
        let ours = mounts.filter(|mount| {
            nodes.numbers.iter().any(|number| number == mount.number) || nodes.has_path(Path::new(&mount.source))
        });
        holders.extend(ours.map(|mount| Holder::Mount { at: PathBuf::from(mount.at), seen_by }));
    };
    if let Ok(table) = fs::read_to_string("/proc/self/mountinfo") {
        add(&table, None);
    }
    for pid in pids() {
        let process = Path::new("/proc").join(pid.to_string());
        // A namespace that has been looked at already, or may not be.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if namespaces.insert(namespace)
            && let Ok(table) = fs::read_to_string(process.join("mountinfo"))
        {
            add(&table, Some(pid));
        }
    }
    holders
}

fn processes(nodes: &Nodes) -> Vec<Holder> {
    let own = std::process::id();
    let mut holders = Vec::new();
    for pid in pids().filter(|pid| *pid != own) {
        let process = Path::new("/proc").join(pid.to_string());
        // Reading the links touches none of the files behind them: one could be a file that this process serves.
        let mut links = entries(&process.join("fd")).filter_map(|fd| fs::read_link(process.join("fd").join(fd)).ok());
        if links.any(|path| nodes.has_path(&path)) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            holders.push(Holder::Process { pid, name: name.trim().to_owned() });
        }
    }
    holders
}

fn pids() -> impl Iterator<Item = u32> {
    entries(Path::new("/proc")).filter_map(|name| name.parse().ok())
}

fn entries(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// A line of `/proc/PID/mountinfo`, see proc_pid_mountinfo(5).
struct MountLine<'a> {
    number: &'a str,
    at: String,
    source: String,
}

impl<'a> MountLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let number = left.next()?;
        let at = unescape(left.nth(1)?);
        let source = unescape(right.split(' ').nth(1)?);
        Some(Self { number, at, source })
    }
}

/// Whether anything is mounted at `dir`, alive or dead. Touches nothing of what is mounted.
pub(super) fn is_mounted(dir: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(MountLine::parse).any(|mount| Path::new(&mount.at) == dir)
}

/// Undoes the octal escapes, `\040` for a space, of the kernel's mount tables.
fn unescape(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if byte.is_ascii() => {
                out.push(char::from(byte));
                rest = &after[3..];
            }
            _ => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_table_line_names_number_place_and_source() {
        let line = r"36 35 98:0 /mnt1 /mnt\040two rw,noatime shared:1 - ext3 /dev/ro\134ot rw,errors=continue";
        let mount = MountLine::parse(line).unwrap();
        assert_eq!((mount.number, mount.at.as_str(), mount.source.as_str()), ("98:0", "/mnt two", r"/dev/ro\ot"));
    }

    #[test]
    fn a_process_that_has_a_file_open_is_found_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").stdin(fs::File::open(file.path()).unwrap()).spawn().unwrap();
        let holders = holders_of(file.path());
        child.kill().unwrap();
        child.wait().unwrap();
        // Others may be seen besides: a child that another test is just starting has this test's files for a moment.
        let sleeping = Holder::Process { pid: child.id(), name: "sleep".to_owned() };
        assert!(holders.contains(&sleeping), "{holders:?}");
        assert!(!holders_of(file.path()).contains(&sleeping));
    }

    #[test]
    fn proc_is_mounted_and_a_new_directory_is_no_mount() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(tempfile::tempdir().unwrap().path()));
    }
}
