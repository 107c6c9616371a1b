//! How much memory this machine has, and how much this process may use.

use std::fs;
use std::path::{Path, PathBuf};

use engine::text::human;

use crate::text;

/// The maximum memory that this process can use, and what sets this limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The limit in KiB.
    pub kib: u64,
    /// What sets the limit.
    pub source: Source,
}

/// What sets a limit on memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The memory of the whole machine.
    Machine,
    /// A control group of this process.
    Group {
        /// The group's path, in the form of `/proc/self/cgroup`.
        group: String,
        /// The file that holds the limit.
        file: PathBuf,
    },
    /// Unknown: neither the machine's memory nor its control groups can be read.
    Unknown,
}

impl Source {
    /// Returns the limit as the end of a sentence: "this machine has 2 GiB".
    pub fn says(&self, kib: u64) -> String {
        let limit = human(kib << 10);
        match self {
            Self::Machine => format!("this machine has {limit}"),
            Self::Group { group, file } => {
                format!("the control group {} allows {limit} ({})", text::path(group), text::path(file))
            }
            Self::Unknown => format!("{limit} is assumed, since /proc/meminfo cannot be read"),
        }
    }

    /// Returns advice about a limit that is too low.
    pub fn cure(&self) -> &'static str {
        match self {
            Self::Group { .. } => {
                "raise that limit (systemd: MemoryMax=; docker and podman: --memory; Kubernetes: resources.limits.memory)"
            }
            Self::Machine | Self::Unknown => "open it on a machine with more memory",
        }
    }
}

/// Returns the memory of the machine, or the limit of this process's control groups if that is lower. If neither can be
/// read, returns 1 GiB. This guess is low on purpose. A user with more memory can raise the limit. With a guess that is too
/// high, the kernel could kill the program.
pub fn limit() -> Limit {
    let meminfo = installed_kib();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = group_limit(&groups, Path::new("/sys/fs/cgroup"));
    let machine = meminfo.map(|kib| Limit { kib, source: Source::Machine });
    let least = machine.into_iter().chain(group).min_by_key(|limit| limit.kib);
    least.unwrap_or(Limit { kib: 1 << 20, source: Source::Unknown })
}

/// Returns the memory of the machine in KiB, or `None` if /proc/meminfo cannot be read.
pub fn installed_kib() -> Option<u64> {
    total_kib(&fs::read_to_string("/proc/meminfo").ok()?)
}

/// Returns [`limit`] in KiB.
pub fn limit_kib() -> u64 {
    limit().kib
}

/// Returns the maximum memory in KiB that Argon2 may use in a new keyslot: half of [`limit`], as in cryptsetup. The same
/// machine can then open the volume while other programs use the rest of the memory.
pub fn argon2_ceiling_kib() -> u32 {
    u32::try_from(limit_kib() / 2).unwrap_or(u32::MAX)
}

/// Returns `MemTotal` in KiB (proc_meminfo(5)).
fn total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// Returns the lowest limit of this process's groups and of all groups above them (kernel:
/// Documentation/admin-guide/cgroup-v2.rst, `memory.max`; cgroup-v1/memory.rst, `memory.limit_in_bytes`).
fn group_limit(groups: &str, root: &Path) -> Option<Limit> {
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            names if names.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => return Vec::new(),
        };
        let group = root.join(path.trim_start_matches('/'));
        // In a container, the process's own group may be mounted as the root. Its path is then valid only outside the
        // container, so folders that do not exist are skipped.
        let read = |folder: &Path| {
            let file = folder.join(file);
            let bytes = fs::read_to_string(&file).ok()?.trim().parse::<u64>().ok()?;
            let group = folder.strip_prefix(&root).unwrap_or(Path::new(""));
            Some(Limit { kib: bytes / 1024, source: Source::Group { group: format!("/{}", group.display()), file } })
        };
        group.ancestors().take_while(|folder| folder.starts_with(&root)).filter_map(read).collect::<Vec<_>>()
    });
    limits.min_by_key(|limit| limit.kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_keyslot_may_take_half_of_the_memory() {
        assert_eq!(total_kib("MemFree: 3 kB\nMemTotal:       24684092 kB\n"), Some(24_684_092));
        assert_eq!(total_kib("nothing"), None);
        assert!(limit_kib() > 16 << 10);
        assert_eq!(u64::from(argon2_ceiling_kib()), limit_kib() / 2);
    }

    #[test]
    fn the_least_limit_of_all_groups_counts() {
        let kib = |groups: &str, root: &Path| group_limit(groups, root).map(|limit| limit.kib);
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let old = root.path().join("memory/a");
        fs::create_dir_all(&old).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(kib("0::/a/b\n", root.path()), None);
        fs::write(root.path().join("a/memory.max"), "1048576\n").unwrap();
        fs::write(old.join("memory.limit_in_bytes"), "2048\n").unwrap();
        assert_eq!(kib("0::/a/b\n", root.path()), Some(1024));
        assert_eq!(kib("5:cpu:/\n4:memory,x:/a\n0::/a/b\n", root.path()), Some(2));
        let limit = group_limit("0::/a/b\n", root.path()).unwrap();
        let file = root.path().join("a/memory.max");
        let says = limit.source.says(limit.kib);
        assert_eq!(says, format!("the control group /a allows 1 MiB ({})", file.display()));
        // As seen inside a container.
        fs::write(root.path().join("memory.max"), "4096").unwrap();
        assert_eq!(kib("0::/not/here\n", root.path()), Some(4));
    }
}
