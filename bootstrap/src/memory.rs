//! How much memory this machine has, and lets this process have.

use std::fs;
use std::path::Path;

/// What the machine has, or what its control group allows where that is less; in KiB. Where neither is to be known it is
/// 1 GiB: whoever has more can ask for it, and no program is ended for having asked.
pub fn limit_kib() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_kib(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = group_limit_kib(&groups, Path::new("/sys/fs/cgroup"));
    meminfo.into_iter().chain(group).min().unwrap_or(1 << 20)
}

/// The most that Argon2 may be made to take in a new keyslot, in KiB: half of the memory, as cryptsetup has it, so that the
/// machine that made the volume can open it while it does other things.
pub fn argon2_ceiling_kib() -> u32 {
    u32::try_from(limit_kib() / 2).unwrap_or(u32::MAX)
}

/// `MemTotal` (proc(5), `/proc/meminfo`).
fn total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// The least limit on the way from this process's groups up to the root (kernel: Documentation/admin-guide/cgroup-v2.rst,
/// `memory.max`; cgroup-v1/memory.rst, `memory.limit_in_bytes`).
fn group_limit_kib(groups: &str, root: &Path) -> Option<u64> {
    let limits = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            names if names.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => return Vec::new(),
        };
        let group = root.join(path.trim_start_matches('/'));
        // In a container its own group may be mounted as the root, under a path that is known outside only.
        let read = |folder: &Path| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        group.ancestors().take_while(|folder| folder.starts_with(&root)).filter_map(read).collect()
    });
    limits.min().map(|bytes| bytes / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_some_memory_and_a_new_keyslot_may_take_half_of_it() {
        assert_eq!(total_kib("MemFree: 3 kB\nMemTotal:       24684092 kB\n"), Some(24_684_092));
        assert_eq!(total_kib("nothing"), None);
        assert!(limit_kib() > 16 << 10);
        assert_eq!(u64::from(argon2_ceiling_kib()), limit_kib() / 2);
    }

    #[test]
    fn the_least_limit_of_all_groups_around_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let old = root.path().join("memory/a");
        fs::create_dir_all(&old).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(group_limit_kib("0::/a/b\n", root.path()), None);
        fs::write(root.path().join("a/memory.max"), "1048576\n").unwrap();
        fs::write(old.join("memory.limit_in_bytes"), "2048\n").unwrap();
        assert_eq!(group_limit_kib("0::/a/b\n", root.path()), Some(1024));
        assert_eq!(group_limit_kib("5:cpu:/\n4:memory,x:/a\n0::/a/b\n", root.path()), Some(2));
        // As seen from within a container.
        fs::write(root.path().join("memory.max"), "4096").unwrap();
        assert_eq!(group_limit_kib("0::/not/here\n", root.path()), Some(4));
    }
}
