//! One volume on this machine, and what the tests find out about it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use harness::nbdcrypt::{binary, told};
use rustix::process::Pid;
use tempfile::TempDir;

/// The passphrase. It is as long as a random one, so that the default configuration may say that it is.
const SECRET: &str = "ThisIs-a-SecretPassword-of-35-Bytes";

/// A configuration in a folder of its own, with its disk, key file, mountpoint and run folder.
pub(super) struct Machine {
    pub(super) folder: TempDir,
}

impl Machine {
    /// Makes the configuration of a disk file of 16 MiB, which does not exist yet, and a key file.
    pub(super) fn new() -> Self {
        let machine = Self { folder: tempfile::Builder::new().prefix("nbdcrypt-boot-").tempdir().unwrap() };
        fs::write(machine.path("key"), SECRET).unwrap();
        fs::set_permissions(machine.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        machine.configure(&machine.default_config());
        machine
    }

    pub(super) fn default_config(&self) -> String {
        format!(
            "[volume]\ndevices = [\"{disk}\"]\nsize = \"32M\"\n\n[key]\nsource = \"file\"\npath = \"{key}\"\nrandom = true\n\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{mnt}\"\n",
            disk = self.path("disk").display(),
            key = self.path("key").display(),
            mnt = self.path("mnt").display(),
        )
    }

    pub(super) fn configure(&self, text: &str) {
        fs::write(self.path("scratch.toml"), text).unwrap();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("--run-dir").arg(self.path("run")).args(args).stdin(Stdio::null());
        command
    }

    pub(super) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    pub(super) fn on_config(&self, verb: &str) -> Output {
        let config = self.path("scratch.toml");
        self.run(&[verb, config.to_str().unwrap()])
    }

    #[track_caller]
    pub(super) fn up(&self) -> String {
        let output = self.on_config("up");
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub(super) fn down(&self) -> String {
        let output = self.on_config("down");
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with exit code 1 and an error that contains these words. It must change nothing.
    #[track_caller]
    pub(super) fn refused(&self, verb: &str, words: &[&str]) {
        let before = self.everything();
        let output = self.on_config(verb);
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        assert!(!said.contains(SECRET));
        assert_eq!(self.everything(), before, "a run that failed has changed something: {said}");
        self.assert_nothing_left();
    }

    /// Runs a command that must fail with exit code 1 and an error that contains these words. It may change files.
    #[track_caller]
    pub(super) fn fails(&self, verb: &str, words: &[&str]) {
        let output = self.on_config(verb);
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        for word in words {
            assert!(told(&output).contains(word), "`{word}` is missing: {}", told(&output));
        }
    }

    /// Runs a shell script in the folder with `$nbdcrypt` set, and returns its standard output. The script must succeed.
    #[track_caller]
    pub(super) fn shell(&self, script: &str) -> String {
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(self.folder.path())
            .env("nbdcrypt", format!("{} --run-dir {}", binary().display(), self.path("run").display()))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the names, sizes and first bytes of all files in the folder.
    pub(super) fn everything(&self) -> Vec<(PathBuf, u64, Vec<u8>)> {
        let mut all = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                if metadata.is_dir() {
                    // A failed run may make the run folder, but must leave nothing in it.
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

    pub(super) fn status(&self) -> serde_json::Value {
        let output = self.run(&["status", "--json"]);
        assert!(matches!(output.status.code(), Some(0 | 3 | 4)), "{}", told(&output));
        let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        all[0].clone()
    }

    /// Waits until `status` says that the server is doing this.
    #[track_caller]
    pub(super) fn await_doing(&self, words: &str) -> serde_json::Value {
        let doing = || self.status()["doing"].as_str().is_some_and(|doing| doing.contains(words));
        assert!(wait_for(doing), "the server was never {words}: {}", self.status());
        self.status()
    }

    /// Starts `up` with a slow mkfs. It runs a second program, badblocks, which tests every block of the device for
    /// minutes.
    pub(super) fn up_with_slow_mkfs(&self) -> Child {
        let config = self.default_config().replace("\"32M\"", "\"2G\"");
        self.configure(&config.replace("type = \"ext4\"", "type = \"ext4\"\nmkfs-options = [\"-c\", \"-c\"]"));
        let config = self.path("scratch.toml");
        let mut up = harness::nbdcrypt::interruptible();
        let up = up
            .arg("--run-dir")
            .arg(self.path("run"))
            .args(["up", config.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.await_doing("making the ext4 filesystem on /dev/loop");
        assert!(wait_for(|| !mkfs_on(self.status()["device"].as_str().unwrap()).is_empty()));
        up
    }

    pub(super) fn server(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.status()["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    pub(super) fn mounts(&self) -> usize {
        let here = self.folder.path().to_str().unwrap();
        fs::read_to_string("/proc/self/mounts").unwrap().lines().filter(|line| line.contains(here)).count()
    }

    /// Checks that no mount, loop device or process of this machine is left.
    #[track_caller]
    pub(super) fn assert_nothing_left(&self) {
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
        // Cleans up after a failed test: nothing may stay mounted under a folder that is about to be removed.
        if self.mounts() > 0 {
            self.on_config("down");
        }
        // The mountpoint of a volume that was up is immutable, so the folder could not be removed.
        for mountpoint in ["mnt", "bound/one", "bound/two"].map(|name| self.path(name)) {
            if mountpoint.is_dir() {
                let _ = bootstrap::machine::bare_folder::unprotect(&mountpoint);
            }
        }
    }
}

/// A loop device that one test owns.
pub(super) struct LoopDisk {
    pub(super) path: String,
}

impl LoopDisk {
    pub(super) fn new(machine: &Machine, losetup: &str) -> Self {
        Self { path: machine.shell(losetup).trim().to_owned() }
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // Otherwise the device would stay read-only for its next user.
        for (program, option) in [("blockdev", "--setrw"), ("losetup", "--detach"), ("blockdev", "--setrw")] {
            let _ = Command::new(program).args([option, &self.path]).output();
        }
    }
}

pub(super) fn processes() -> Vec<(i32, String)> {
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

/// Returns the processes of the slow mkfs that use a device. Other processes are left out, because another test may soon
/// use the same device.
pub(super) fn mkfs_on(device: &str) -> Vec<String> {
    let lines = fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(device) && (line.contains(" -c -c ") || line.contains("badblocks"))).collect()
}

pub(super) fn wait_for(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    condition()
}

pub(super) fn write_and_sync(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
}

pub(super) const MIB: u64 = 1 << 20;

impl Machine {
    /// Makes a sparse disk of 64 MiB with `bytes` at `offset`.
    pub(super) fn disk_with(&self, offset: u64, bytes: &[u8]) {
        let disk = File::create(self.path("disk")).unwrap();
        disk.set_len(64 * MIB).unwrap();
        disk.write_all_at(bytes, offset).unwrap();
    }

    /// Makes an ext4 filesystem of 16 MiB and returns its bytes.
    pub(super) fn ext4(&self) -> Vec<u8> {
        File::create(self.path("ext4")).unwrap().set_len(16 * MIB).unwrap();
        let output = Command::new("mkfs.ext4").args(["-qF"]).arg(self.path("ext4")).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
        let bytes = fs::read(self.path("ext4")).unwrap();
        fs::remove_file(self.path("ext4")).unwrap();
        bytes
    }

    pub(super) fn format(&self, arguments: &[&str]) {
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file"];
        let mut command = self.command(&["format"]);
        let output = command.args(quick).arg(self.path("key")).args(arguments).arg(self.path("disk")).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
    }
}

#[track_caller]
pub(super) fn system(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", told(&output));
}

/// Unmounts the filesystem. Retries, because a process that another test starts holds this process's open files for a
/// moment.
#[track_caller]
pub(super) fn unmount(at: &str) {
    assert!(wait_for(|| Command::new("umount").arg(at).status().unwrap().success()), "{at} stays mounted");
}
