//! `nbdcrypt up` and `down` on this machine's own kernel, for real: FUSE, a loop device, mkfs and mount.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use harness::nbdcrypt::{binary, told};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A configuration in a folder of its own, and everything that it leads to.
struct Machine {
    folder: TempDir,
}

impl Machine {
    /// A 16 MiB file to be made, and a key file.
    fn new() -> Self {
        let machine = Self { folder: tempfile::Builder::new().prefix("nbdcrypt-boot-").tempdir().unwrap() };
        fs::write(machine.path("key"), "ThisIs-a-SecretPassword").unwrap();
        fs::set_permissions(machine.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        machine.configure(&machine.default_config());
        machine
    }

    fn default_config(&self) -> String {
        format!(
            "[volume]\ndevices = [\"{disk}\"]\nsize = \"32M\"\n\n[key]\nsource = \"file\"\npath = \"{key}\"\nrandom = true\n\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{mnt}\"\n",
            disk = self.path("disk").display(),
            key = self.path("key").display(),
            mnt = self.path("mnt").display(),
        )
    }

    fn configure(&self, text: &str) {
        fs::write(self.path("scratch.toml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("--run-dir").arg(self.path("run")).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn on_config(&self, verb: &str) -> Output {
        let config = self.path("scratch.toml");
        self.run(&[verb, config.to_str().unwrap()])
    }

    #[track_caller]
    fn up(&self) -> String {
        let output = self.on_config("up");
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn down(&self) -> String {
        let output = self.on_config("down");
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a verb that must fail with exit code 1 and these words.
    #[track_caller]
    fn refused(&self, verb: &str, words: &[&str]) {
        let before = self.everything();
        let output = self.on_config(verb);
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        assert!(!said.contains("ThisIs-a-SecretPassword"));
        assert_eq!(self.everything(), before, "something was changed by a run that failed: {said}");
        self.assert_nothing_left();
    }

    /// The names and sizes of all that is in the folder, and what the disk begins with.
    fn everything(&self) -> Vec<(PathBuf, u64, Vec<u8>)> {
        let mut all = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                if metadata.is_dir() {
                    // The folder for running volumes may come to be; what is in it may not stay.
                    if path != self.path("run") {
                        all.push((path.clone(), 0, Vec::new()));
                    }
                    folders.push(path);
                } else {
                    let bytes = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                    all.push((path, metadata.len(), bytes));
                }
            }
        }
        all.sort();
        all
    }

    fn status(&self) -> serde_json::Value {
        let output = self.run(&["status", "--json"]);
        assert!(output.status.success(), "{}", told(&output));
        let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        all[0].clone()
    }

    fn server(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.status()["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    fn mounts(&self) -> usize {
        let here = self.folder.path().to_str().unwrap();
        fs::read_to_string("/proc/self/mounts").unwrap().lines().filter(|line| line.contains(here)).count()
    }

    /// No mount, no loop device, no process that has to do with this machine.
    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), 0, "a mount is left");
        let here = self.folder.path().to_str().unwrap();
        for entry in fs::read_dir("/sys/block").unwrap() {
            let behind = fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).unwrap_or_default();
            assert!(!behind.contains(here), "a loop device is left on {behind}");
        }
        let gone = wait_for(|| !processes().iter().any(|(_, line)| line.contains(here)));
        assert!(gone, "a process is left: {:?}", processes().iter().find(|(_, line)| line.contains(here)));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Only what a failed test left: nothing may stay mounted under a folder that is about to be removed.
        if self.mounts() > 0 {
            self.on_config("down");
        }
    }
}

fn processes() -> Vec<(i32, String)> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            (pid != std::process::id().cast_signed()).then(|| (pid, String::from_utf8_lossy(&line).replace('\0', " ")))
        })
        .filter(|(_, line)| line.contains("nbdcrypt "))
        .collect()
}

fn wait_for(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    condition()
}

fn write_and_sync(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn what_is_written_is_there_after_down_and_up_and_nowhere_on_the_disk() {
    let machine = Machine::new();
    assert!(machine.up().contains("scratch is up"));
    assert_eq!(fs::metadata(machine.path("disk")).unwrap().mode() & 0o777, 0o600);
    write_and_sync(&machine.path("mnt/text"), b"the quick brown fox jumps over the lazy dog");
    machine.down();
    machine.assert_nothing_left();

    let disk = fs::read(machine.path("disk")).unwrap();
    assert!(!disk.windows(19).any(|window| window == b"the quick brown fox"));
    machine.up();
    assert_eq!(fs::read(machine.path("mnt/text")).unwrap(), b"the quick brown fox jumps over the lazy dog");
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn up_twice_and_down_twice_say_so_and_succeed() {
    let machine = Machine::new();
    machine.up();
    assert!(machine.up().contains("already up"));
    let status = machine.status();
    assert_eq!(
        (status["condition"].as_str(), status["volume"]["algorithm"].as_str(), status["method"].as_str()),
        (Some("up"), Some("AES-256-XTS"), Some("fuse"))
    );
    assert!(machine.down().contains("scratch is down"));
    assert!(machine.down().contains("scratch is not up"));
    // By its name as well, and what is not there is no error for a machine that shuts down.
    let output = machine.run(&["down", "scratch"]);
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(machine.run(&["status", "scratch"]).status.code(), Some(1));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_plan_tells_the_steps_and_changes_nothing() {
    let machine = Machine::new();
    let before = machine.everything();
    let output = machine.on_config("plan");
    assert!(output.status.success(), "{}", told(&output));
    let plan = String::from_utf8(output.stdout).unwrap();
    for step in ["mountpoint", "disk", "secret", "volume", "device", "filesystem", "header", "mount"] {
        assert!(plan.lines().any(|line| line.starts_with(step)), "{step} in {plan}");
    }
    assert_eq!(machine.everything(), before);
    // What would stand in the way of `up` is told as well.
    fs::write(machine.path("disk"), vec![1; 4 << 20]).unwrap();
    machine.refused("plan", &["not blank"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_busy_filesystem_stays_up_and_its_user_is_named() {
    let machine = Machine::new();
    machine.up();
    let held = File::create(machine.path("mnt/held")).unwrap();
    let output = machine.on_config("down");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("in use by") && said.contains(&format!("({})", std::process::id())), "{said}");
    write_and_sync(&machine.path("mnt/still"), b"up");
    drop(held);
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn what_was_synced_survives_a_server_that_is_killed_and_up_clears_up_after_it() {
    let machine = Machine::new();
    for round in 0..3 {
        machine.up();
        for earlier in 0..round {
            let back = fs::read(machine.path(&format!("mnt/{earlier}"))).unwrap();
            assert_eq!(back, vec![b'0' + earlier; 100_000]);
        }
        write_and_sync(&machine.path(&format!("mnt/{round}")), &vec![b'0' + round; 100_000]);
        let server = machine.server();
        kill_process(server, Signal::KILL).unwrap();
        assert!(wait_for(|| machine.status()["condition"] == "dead"));
    }
    // `down` clears up as well.
    assert!(machine.down().contains("had died"));
    machine.assert_nothing_left();
    let checked = Command::new(binary()).args(["dump"]).arg(machine.path("disk")).output().unwrap();
    assert!(checked.status.success(), "{}", told(&checked));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_filesystem_that_somebody_unmounted_already_is_taken_down_and_nothing_else_is() {
    let machine = Machine::new();
    machine.up();
    let system = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
    };
    let mountpoint = machine.path("mnt");
    let mountpoint = mountpoint.to_str().unwrap();
    // Something else over it: not to be touched, and said so.
    system("mount", &["-t", "tmpfs", "none", mountpoint]);
    let output = machine.on_config("down");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("something else is mounted over"), "{}", told(&output));
    system("umount", &[mountpoint]);
    assert!(machine.path("mnt/lost+found").exists());
    // Unmounted by another's hand.
    system("umount", &[mountpoint]);
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn in_the_foreground_it_is_up_until_it_is_told_to_stop() {
    let machine = Machine::new();
    let config = machine.path("scratch.toml");
    let mut server: Child =
        machine.command(&["up", "--foreground", config.to_str().unwrap()]).stdout(Stdio::piped()).spawn().unwrap();
    assert!(wait_for(|| machine.path("mnt/lost+found").exists()));
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_server_shows_its_secret_nowhere_and_cannot_be_dumped() {
    let machine = Machine::new();
    machine.up();
    let pid = machine.server().as_raw_nonzero();
    for (what, bytes) in [
        ("argv", fs::read(format!("/proc/{pid}/cmdline")).unwrap()),
        ("environment", fs::read(format!("/proc/{pid}/environ")).unwrap()),
        ("log", fs::read(machine.path("run/scratch/log")).unwrap()),
        ("state", fs::read(machine.path("run/scratch/state.json")).unwrap()),
    ] {
        assert!(!bytes.windows(6).any(|window| window == b"Secret"), "the secret is in its {what}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let locked = status.lines().find(|line| line.starts_with("VmLck")).unwrap();
    assert_ne!(locked.split_whitespace().nth(1), Some("0"), "{locked}");
    machine.down();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and cryptsetup: run `make test`")]
fn a_volume_of_the_old_boot_script_opens_and_is_called_what_it_is() {
    let machine = Machine::new();
    File::create(machine.path("disk")).unwrap().set_len(16 << 20).unwrap();
    let formatted = Command::new("cryptsetup")
        .args([
            "luksFormat",
            "--batch-mode",
            "--type",
            "luks1",
            "--key-size",
            "256",
            "--pbkdf-force-iterations",
            "1000",
        ])
        .arg("--key-file")
        .arg(machine.path("key"))
        .arg(machine.path("disk"))
        .output()
        .unwrap();
    assert!(formatted.status.success(), "{}", told(&formatted));
    assert!(machine.up().contains("AES-128-XTS"));
    let volume = machine.status()["volume"].clone();
    assert_eq!((volume["key-bits"].as_u64(), volume["algorithm"].as_str()), (Some(256), Some("AES-128-XTS")));
    machine.down();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn bad_input_is_refused_by_name_and_changes_nothing() {
    let machine = Machine::new();
    let good = machine.default_config();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from));
        machine.configure(&good.replacen(from, to, 1));
    };

    with("type = \"ext4\"", "typo = \"ext4\"");
    machine.refused("up", &["scratch.toml:11:1", "`typo`", "`mountpoint`"]);
    with("size = \"32M\"", "size = true");
    machine.refused("up", &["scratch.toml:3:8"]);
    with("size = \"32M\"\n", "");
    machine.refused("up", &["disk does not exist", "size"]);
    with("size = \"32M\"", "size = \"1M\"");
    machine.refused("up", &["disk", "at least"]);
    with(machine.path("disk").to_str().unwrap(), machine.folder.path().to_str().unwrap());
    machine.refused("up", &["neither a block device nor a regular file"]);
    with(machine.path("key").to_str().unwrap(), machine.path("none").to_str().unwrap());
    machine.refused("up", &["none", "No such file"]);
    with("type = \"ext4\"", "type = \"nosuchfs\"");
    machine.refused("up", &["mkfs.nosuchfs is not installed"]);
    with("type = \"ext4\"", "type = \"ext4\"\nmkfs-options = [\"-E\", \"nonsense\"]");
    machine.refused("up", &["mkfs.ext4 failed", "nonsense"]);
    with(machine.path("mnt").to_str().unwrap(), "/proc");
    machine.refused("up", &["/proc is already a mountpoint"]);

    machine.configure(&good);
    let full = |bytes: &[u8]| {
        let mut disk = vec![0; 8 << 20];
        disk[..bytes.len()].copy_from_slice(bytes);
        fs::write(machine.path("disk"), disk).unwrap();
    };
    full(b"XFSB\0\0\x10\0");
    machine.refused("up", &["not blank", "xfs"]);
    full(&[&[0; 1000][..], b"mine"].concat());
    machine.refused("up", &["not blank", "1000"]);
    full(b"LUKS\xba\xbe\0\x01aes\0");
    machine.refused("up", &["corrupt"]);
    full(b"LUKS\xba\xbe\0\x02aes\0");
    machine.refused("up", &["corrupt"]);
    fs::remove_file(machine.path("disk")).unwrap();

    with("size = \"32M\"", "size = \"32M\"\ntype = \"luks1\"");
    machine.up();
    machine.down();
    fs::write(machine.path("key"), "another").unwrap();
    machine.refused("up", &["passphrase is wrong"]);
    // The header asks for another cipher.
    let mut disk = fs::read(machine.path("disk")).unwrap();
    disk[8..24].copy_from_slice(b"serpent\0\0\0\0\0\0\0\0\0");
    fs::write(machine.path("disk"), disk).unwrap();
    machine.refused("up", &["serpent-xts-plain64", "cryptsetup"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_disk_that_something_else_has_is_refused_and_its_user_named() {
    let machine = Machine::new();
    machine.up();
    let second = Machine::new();
    second.configure(
        &second.default_config().replace(second.path("disk").to_str().unwrap(), machine.path("disk").to_str().unwrap()),
    );
    second.refused("up", &["in use", "nbdcrypt status"]);
    // The attached device itself: mounted, so nobody else's.
    let device = machine.status()["device"].as_str().unwrap().to_owned();
    second.configure(
        &second
            .default_config()
            .replace(second.path("disk").to_str().unwrap(), &device)
            .replace("size = \"32M\"\n", ""),
    );
    second.refused("up", &["in use", "ext4 filesystem is mounted on"]);
    machine.down();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_mount_folder_may_hold_files_as_with_mount() {
    let machine = Machine::new();
    fs::create_dir(machine.path("mnt")).unwrap();
    fs::write(machine.path("mnt/below"), "covered").unwrap();
    machine.up();
    assert!(!machine.path("mnt/below").exists());
    machine.down();
    assert!(machine.path("mnt/below").exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs to be root to become someone else: run `make test`")]
fn who_is_not_root_is_told_so_and_may_format_and_dump_what_is_theirs() {
    use std::os::unix::process::CommandExt;
    let machine = Machine::new();
    // Wherever this repository is, anyone may run a program in here.
    fs::set_permissions(machine.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(machine.path("key"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::copy(binary(), machine.path("nbdcrypt")).unwrap();
    let nobody = |args: &[&str]| {
        let mut command = Command::new(machine.path("nbdcrypt"));
        command.args(args).current_dir(machine.folder.path()).stdin(Stdio::null()).uid(65534).gid(65534);
        command.output().unwrap()
    };
    for args in [&["up", "scratch.toml"][..], &["down", "scratch.toml"], &["demo"]] {
        let output = nobody(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", told(&output));
        assert!(told(&output).contains("only root may do"), "{}", told(&output));
    }
    let format = [
        "format",
        "--key-file",
        "key",
        "--size",
        "8M",
        "--type",
        "luks1",
        "--pbkdf-force-iterations",
        "1000",
        "theirs",
    ];
    for args in [&format[..], &["dump", "theirs"]] {
        let output = nobody(args);
        assert!(output.status.success(), "{args:?}: {}", told(&output));
    }
    machine.assert_nothing_left();
}
