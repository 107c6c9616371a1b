//! Checks the machine: permissions, drivers, programs, memory and the clock.
//!
//! The checks are functions of a machine's files ([`Root`]) and of a few [`Facts`], so tests can use fake machines.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::text::human;

use super::Check;
use crate::attach::Method;
use crate::config::{Config, FilesystemConfig};
use crate::machine::memory::{self, Limit};
use crate::machine::modules::{self, Driver};
use crate::machine::root::Root;
use crate::machine::{packages, programs};
use crate::text;
use crate::volume::new_volume::Strength;

/// The facts about a machine that are in no file.
#[derive(Debug)]
pub(super) struct Facts {
    /// Whether this process may use io_uring.
    io_uring: io::Result<()>,
    /// The maximum memory that this process can use.
    memory: Limit,
    now: SystemTime,
}

impl Facts {
    pub(super) fn gather() -> Self {
        Self { io_uring: nbd_server::server::io_uring(), memory: memory::limit(), now: SystemTime::now() }
    }
}

/// A time before this program was written: 2026-01-01.
const PAST: Duration = Duration::from_secs(1_767_225_600);
/// With less memory than this (in KiB), the key derivation of a volume that was made on another machine may not fit.
const LITTLE_MEMORY: u64 = 256 << 10;

/// Returns what the machine lacks. `run_dir` is the folder of running volumes.
pub(super) fn checks(root: &Root, facts: &Facts, config: Option<&Config>, run_dir: &Path) -> Vec<Check> {
    let process = Process::of(root);
    let mut checks = vec![user(&process)];
    checks.extend(capabilities(&process));
    checks.extend(attaching(root, &process, config.map_or(Method::Auto, |config| config.attach.method)));
    checks.push(io_uring(&facts.io_uring));
    checks.extend(filesystem(root, &process, config));
    checks.push(tools(root));
    checks.push(memory(&facts.memory, config));
    checks.push(locked_memory(&process));
    checks.push(run_folder(root, run_dir));
    checks.push(clock(facts.now));
    checks
}

/// A capability (capabilities(7)).
#[derive(Clone, Copy)]
struct Capability {
    number: u32,
    name: &'static str,
    /// What is worse without the capability. `None` if `up` fails without it.
    without: Option<&'static str>,
}

const IPC_LOCK: u32 = 14;
const SYS_MODULE: u32 = 16;
const CAPABILITIES: [Capability; 4] = [
    Capability { number: 21, name: "CAP_SYS_ADMIN", without: None },
    Capability {
        number: 9,
        name: "CAP_LINUX_IMMUTABLE",
        without: Some("while the volume is not up, root can write into its mountpoint"),
    },
    Capability { number: IPC_LOCK, name: "CAP_IPC_LOCK", without: Some("a key could be swapped out") },
    Capability {
        number: 24,
        name: "CAP_SYS_RESOURCE",
        without: Some("when memory is short, the kernel may kill the server or make it wait for itself"),
    },
];

/// What `/proc/self` says about the permissions of `up`.
struct Process {
    is_root: bool,
    /// The capabilities that `up` would have: those of this process or, if it is not root, those that root can get.
    capabilities: u64,
    /// The bytes of memory that may be locked, if there is a limit.
    lockable: Option<u64>,
}

impl Process {
    fn of(root: &Root) -> Self {
        let status = root.text("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim()
        };
        // The line begins with the real and the effective user (proc_pid_status(5)).
        let is_root = field("Uid").split_whitespace().nth(1) == Some("0");
        let set = if is_root { field("CapEff") } else { field("CapBnd") };
        let limits = root.text("/proc/self/limits").unwrap_or_default();
        let locked = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        Self {
            is_root,
            capabilities: u64::from_str_radix(set, 16).unwrap_or_default(),
            lockable: locked.and_then(|line| line.split_whitespace().next()?.parse().ok()),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & (1 << capability) != 0
    }
}

fn user(process: &Process) -> Check {
    match process.is_root {
        true => Check::ok("root", "this is root"),
        false => Check::warn(
            "root",
            "this is not root: `up` needs root, and these checks see less without it",
            "sudo nbdcrypt doctor",
        ),
    }
}

fn capabilities(process: &Process) -> Vec<Check> {
    let cure = |name: &str| {
        format!(
            "run nbdcrypt outside the container, or give the container the capability (docker and podman: --cap-add {}; systemd: \
             CapabilityBoundingSet=)",
            name.trim_start_matches("CAP_")
        )
    };
    let missing = CAPABILITIES.iter().filter(|capability| !process.has(capability.number));
    let missing: Vec<_> = missing
        .map(|Capability { name, without, .. }| match without {
            None => Check::fail("capabilities", format!("{name} is missing: nothing can be mounted"), cure(name)),
            Some(without) => Check::warn("capabilities", format!("{name} is missing: {without}"), cure(name)),
        })
        .collect();
    match missing.is_empty() {
        true => vec![Check::ok("capabilities", "`up` has all that it uses")],
        false => missing,
    }
}

/// Checks the drivers of both methods to attach a volume. Only a method that `up` would use must work.
fn attaching(root: &Root, process: &Process, method: Method) -> Vec<Check> {
    let lack = |module, node: Option<&str>| lack_of_driver(root, process, module, node);
    let nbd = lack("nbd", None);
    let fuse = lack("fuse", Some("/dev/fuse"));
    let looped = lack("loop", Some("/dev/loop-control")).or_else(|| lack_of_program(root, "losetup"));
    let has_nbd = nbd.is_none();
    let is_needed = |is_nbd: bool| match method {
        Method::Nbd => is_nbd,
        Method::Fuse => !is_nbd,
        // Without nbd, `up` uses FUSE. If both are missing, FUSE is easier to install.
        Method::Auto => !is_nbd && !has_nbd,
    };
    let check = |name, lack: Option<Lack>, is_nbd| match lack {
        None => Check::ok(name, "there is a driver"),
        Some(Lack { found, cure }) if is_needed(is_nbd) => Check::fail(name, found, cure),
        Some(Lack { found, cure }) if is_nbd && method == Method::Auto => {
            Check::warn(name, format!("{found}; FUSE and a loop device are used instead"), cure)
        }
        Some(Lack { found, .. }) => Check::ok(name, format!("{found}; it is not needed here")),
    };
    vec![check("nbd", nbd, true), check("fuse", fuse, false), check("loop", looped, false)]
}

/// Something that is missing.
struct Lack {
    found: String,
    cure: String,
}

fn lack_of_driver(root: &Root, process: &Process, module: &str, node: Option<&str>) -> Option<Lack> {
    let lack = |found: String, cure: String| Some(Lack { found, cure });
    match modules::driver(root, module) {
        Driver::Loaded => {
            let node = node?;
            match std::fs::File::open(root.path(node)) {
                Ok(_) => None,
                Err(error) if error.kind() == io::ErrorKind::NotFound => lack(
                    format!("{node} is missing"),
                    modules::missing_node(&root.path("/sys/class/misc"), Path::new(node)).unwrap_or_else(|| {
                        format!("load the driver (modprobe {module}), or give the container {node}")
                    }),
                ),
                Err(_) if !process.is_root => None,
                Err(error) => lack(
                    format!("{node} cannot be opened: {error}"),
                    format!("give the container the device (docker and podman: --device {node})"),
                ),
            }
        }
        Driver::Loadable if node.is_some_and(|node| root.has(node)) => None,
        Driver::Loadable if !process.has(SYS_MODULE) => lack(
            format!("the driver `{module}` is not loaded, and loading it needs CAP_SYS_MODULE, which is missing"),
            format!("load it on the host: modprobe {module}"),
        ),
        Driver::Loadable => lack_of_program(root, "modprobe"),
        Driver::Absent if node.is_some_and(|node| root.has(node)) => None,
        Driver::Absent => lack(format!("the kernel has no driver `{module}`"), packages::driver_hint(root, module)),
    }
}

fn lack_of_program(root: &Root, program: &str) -> Option<Lack> {
    let lack = || Lack { found: format!("{program} is not installed"), cure: packages::hint_at(root, program) };
    (!programs::is_installed(root, program)).then(lack)
}

fn io_uring(found: &io::Result<()>) -> Check {
    match found {
        Ok(()) => Check::ok("io_uring", "it may be used"),
        Err(error) => Check::warn(
            "io_uring",
            format!("it cannot be used ({error}), so serving takes more CPU time"),
            "set the sysctl kernel.io_uring_disabled to 0, allow it in the container's seccomp profile, or use Linux 5.11 \
             or later",
        ),
    }
}

fn filesystem(root: &Root, process: &Process, config: Option<&Config>) -> Vec<Check> {
    let wanted = match config {
        None => FilesystemConfig::DEFAULT_KIND,
        Some(Config { filesystem: None, .. }) => return Vec::new(),
        Some(Config { filesystem: Some(filesystem), .. }) => &filesystem.kind,
    };
    let program = format!("mkfs.{wanted}");
    let mkfs = match lack_of_program(root, &program) {
        None => Check::ok("mkfs", format!("{program} is installed")),
        Some(Lack { found, cure }) if config.is_none() => Check::warn("mkfs", found, cure),
        Some(Lack { found, cure }) => Check::fail("mkfs", found, cure),
    };
    let known = root.text("/proc/filesystems").unwrap_or_default();
    let is_known = known.lines().any(|line| line.split_whitespace().next_back() == Some(wanted));
    let driver = match (is_known, lack_of_driver(root, process, wanted, None)) {
        (true, _) | (false, None) => Check::ok("filesystem", format!("the kernel can mount {wanted}")),
        // This is only a warning, because a module may have another name than the filesystem type.
        (false, Some(Lack { found, cure })) => Check::warn("filesystem", found, cure),
    };
    vec![mkfs, driver]
}

/// The programs of every `up` and `down`.
const TOOLS: [&str; 4] = ["mount", "umount", "blockdev", "sync"];

fn tools(root: &Root) -> Check {
    let missing: Vec<_> = TOOLS.iter().filter_map(|program| lack_of_program(root, program)).collect();
    match missing.is_empty() {
        true => Check::ok("programs", TOOLS.join(", ")),
        false => {
            let joined = |part: fn(&Lack) -> &str| missing.iter().map(part).collect::<Vec<_>>().join("; ");
            Check::fail("programs", joined(|lack| &lack.found), joined(|lack| &lack.cure))
        }
    }
}

fn memory(limit: &Limit, config: Option<&Config>) -> Check {
    let found = limit.source.says(limit.kib);
    let is_cheap = config.is_some_and(|config| config.strength == Strength::Random);
    match limit.kib < LITTLE_MEMORY && !is_cheap {
        true => Check::warn(
            "memory",
            format!("{found}, which may be too little to derive a key (Argon2)"),
            "use a random secret, with `random = true` under [key], or more memory",
        ),
        false => Check::ok("memory", found),
    }
}

fn locked_memory(process: &Process) -> Check {
    match process.lockable.filter(|_| !process.has(IPC_LOCK)) {
        None => Check::ok("locked memory", "there is no limit"),
        Some(bytes) => Check::warn(
            "locked memory",
            format!("only {} may be locked, so a key could be swapped out", human(bytes)),
            "raise the limit: `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the systemd unit",
        ),
    }
}

fn run_folder(root: &Root, run_dir: &Path) -> Check {
    let name = text::path(run_dir);
    let existing = run_dir.ancestors().find(|folder| root.has(folder)).unwrap_or(Path::new("/"));
    match rustix::fs::access(root.path(existing), rustix::fs::Access::WRITE_OK) {
        Ok(()) => Check::ok("run folder", format!("{name} can be written to")),
        Err(rustix::io::Errno::ACCESS) if !rustix::process::geteuid().is_root() => {
            Check::new("run folder", super::State::Unknown, format!("only root can write to {name}"))
        }
        Err(error) => Check::fail(
            "run folder",
            format!("{} cannot be written to: {error}", text::path(existing)),
            "mount a tmpfs on /run, or name another folder with --run-dir",
        ),
    }
}

fn clock(now: SystemTime) -> Check {
    match now.duration_since(UNIX_EPOCH) {
        Ok(since) if since > PAST => Check::ok("clock", "it is set"),
        _ => Check::fail(
            "clock",
            "it shows a time before this program was built, so AWS refuses every request",
            "set the clock, and let the machine set it at every boot: `timedatectl set-ntp true`, or chronyd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::machine::memory::Source;
    use crate::service::doctor::State;

    /// A fake machine. At first it lacks nothing.
    struct Machine {
        dir: TempDir,
        facts: Facts,
    }

    impl Machine {
        fn new(release: &str) -> Self {
            let memory = Limit { kib: 8 << 20, source: Source::Machine };
            let facts = Facts { io_uring: Ok(()), memory, now: UNIX_EPOCH + PAST * 2 };
            let machine = Self { dir: tempfile::tempdir().unwrap(), facts };
            machine.file("etc/os-release", release);
            machine.status(0, u64::MAX);
            machine.file(
                "proc/self/limits",
                "Max locked memory         8388608              8388608              bytes\n",
            );
            machine.file("proc/sys/kernel/osrelease", "6.1.0-1\n");
            machine.file("proc/filesystems", "nodev\ttmpfs\n\text4\n");
            machine.file("lib/modules/6.1.0-1/modules.dep", "kernel/drivers/block/nbd.ko.xz:\nkernel/fs/xfs/xfs.ko:\n");
            machine.file("lib/modules/6.1.0-1/modules.builtin", "kernel/drivers/block/loop.ko\n");
            machine.file("sys/module/fuse/x", "");
            machine.file("dev/fuse", "");
            machine.file("dev/loop-control", "");
            for program in ["mkfs.ext4", "mkfs.xfs", "mount", "umount", "blockdev", "sync", "losetup", "modprobe"] {
                machine.file(&format!("usr/sbin/{program}"), "");
            }
            machine.file("run/x", "");
            machine
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn remove(&self, path: &str) {
            fs::remove_file(self.dir.path().join(path)).unwrap();
        }

        fn status(&self, user: u32, capabilities: u64) {
            let status = format!(
                "Uid:\t{user}\t{user}\t{user}\t{user}\nCapEff:\t{capabilities:016x}\nCapBnd:\t{:016x}\n",
                u64::MAX
            );
            self.file("proc/self/status", &status);
        }

        fn checks(&self, config: &str) -> Vec<Check> {
            let text = format!("[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"file\"\npath = \"/k\"\n{config}");
            let config = Config::parse(&text, Path::new("/etc/x.toml")).unwrap();
            checks(&Root::at(self.dir.path()), &self.facts, Some(&config), Path::new("/run/nbdcrypt"))
        }

        /// Returns the state of a check, and its texts.
        #[track_caller]
        fn one(&self, config: &str, name: &str) -> (State, String) {
            let checks = self.checks(config);
            let found = checks.iter().find(|check| check.name == name);
            let check = found.unwrap_or_else(|| panic!("no check {name}: {checks:?}"));
            (check.state, format!("{}. {}", check.found, check.cure.as_deref().unwrap_or_default()))
        }
    }

    const DEBIAN: &str = "ID=debian\n";
    const EXT4: &str = "[filesystem]\nmountpoint = \"/mnt/x\"\n";

    #[test]
    fn a_machine_that_lacks_nothing_passes_every_check() {
        let checks = Machine::new(DEBIAN).checks(EXT4);
        assert!(checks.len() >= 12, "{checks:?}");
        for check in checks {
            assert_eq!((check.state, check.cure.as_ref()), (State::Ok, None), "{check:?}");
        }
    }

    #[test]
    fn a_missing_program_is_cured_by_the_distributions_command() {
        for (release, cure) in [
            (DEBIAN, "apt-get install xfsprogs"),
            ("ID=ubuntu\nID_LIKE=debian\n", "apt-get install xfsprogs"),
            ("ID=\"amzn\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"2023\"\n", "dnf install xfsprogs"),
            ("ID=fedora\n", "dnf install xfsprogs"),
            ("ID=alpine\n", "apk add xfsprogs"),
            ("ID=arch\n", "pacman -S xfsprogs"),
        ] {
            let machine = Machine::new(release);
            machine.remove("usr/sbin/mkfs.xfs");
            let config = format!("{EXT4}type = \"xfs\"\n");
            let (state, said) = machine.one(&config, "mkfs");
            assert!(state == State::Fail && said.contains(cure), "{release}: {said}");
            assert_eq!(machine.one(&config, "filesystem").0, State::Ok, "xfs is a module");
        }
        let machine = Machine::new(DEBIAN);
        machine.remove("usr/sbin/umount");
        let (state, said) = machine.one("", "programs");
        assert!(state == State::Fail && said.contains("umount is not installed. install the package mount"), "{said}");
    }

    #[test]
    fn only_a_driver_that_up_would_use_is_required() {
        let machine = Machine::new("ID=ubuntu\nID_LIKE=debian\n");
        machine.file("lib/modules/6.1.0-1/modules.dep", "");
        let (state, said) = machine.one("", "nbd");
        assert!(state == State::Warn && said.contains("FUSE and a loop device are used instead"), "{said}");
        assert!(said.contains("apt-get install linux-modules-extra-6.1.0-1"), "{said}");
        assert_eq!(machine.one("[attach]\nmethod = \"nbd\"\n", "nbd").0, State::Fail);
        assert_eq!(machine.one("[attach]\nmethod = \"fuse\"\n", "nbd").0, State::Ok);
        machine.remove("dev/fuse");
        machine.file("sys/class/misc/fuse/dev", "10:229\n");
        let (state, said) = machine.one("", "fuse");
        assert!(state == State::Fail && said.contains("mknod -m 600 /dev/fuse c 10 229"), "{said}");
        machine.remove("usr/sbin/losetup");
        assert_eq!(machine.one("", "loop").0, State::Fail);
        machine.file("lib/modules/6.1.0-1/modules.dep", "kernel/drivers/block/nbd.ko.zst:\n");
        assert_eq!(machine.one("", "nbd").0, State::Ok);
        assert_eq!(machine.one("", "fuse").0, State::Ok, "nbd is used");
        // Nobody may load the driver.
        machine.status(0, !(1 << SYS_MODULE));
        let (state, said) = machine.one("[attach]\nmethod = \"nbd\"\n", "nbd");
        assert!(state == State::Fail && said.contains("on the host: modprobe nbd"), "{said}");
    }

    /// This happens if the kernel was upgraded and the machine was not rebooted.
    #[test]
    fn modules_of_another_kernel_are_cured_by_a_reboot() {
        let machine = Machine::new("ID=arch\n");
        machine.file("proc/sys/kernel/osrelease", "6.0.0-9\n");
        let (state, said) = machine.one("[attach]\nmethod = \"nbd\"\n", "nbd");
        assert!(state == State::Fail && said.contains("reboot") && said.contains("6.0.0-9"), "{said}");
    }

    #[test]
    fn permissions_are_those_that_root_would_have() {
        let machine = Machine::new(DEBIAN);
        machine.status(1000, 0);
        assert_eq!(machine.one("", "root").0, State::Warn);
        assert_eq!(machine.one("", "capabilities").0, State::Ok);
        machine.status(0, !(1 << 21));
        let (state, said) = machine.one("", "capabilities");
        assert!(state == State::Fail && said.contains("--cap-add SYS_ADMIN"), "{said}");
        machine.status(0, !(1 << IPC_LOCK));
        assert_eq!(machine.one("", "capabilities").0, State::Warn);
        let (state, said) = machine.one("", "locked memory");
        assert!(state == State::Warn && said.contains("only 8 MiB") && said.contains("LimitMEMLOCK"), "{said}");
    }

    #[test]
    fn memory_clock_and_io_uring_are_judged() {
        let mut machine = Machine::new(DEBIAN);
        machine.facts.io_uring = Err(io::ErrorKind::PermissionDenied.into());
        machine.facts.memory.kib = 128 << 10;
        machine.facts.now = UNIX_EPOCH;
        for (name, state) in [("io_uring", State::Warn), ("memory", State::Warn), ("clock", State::Fail)] {
            assert_eq!(machine.one("", name).0, state, "{name}");
        }
        let random = machine.one("random = true\n", "memory");
        assert_eq!(random.0, State::Ok, "{random:?}");
    }
}
