//! What is left when a server is killed, its device ends, or space runs out.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use harness::nbdcrypt::{binary, told};
use rustix::process::{Signal, kill_process};

use super::machine::{Machine, mkfs_on, processes, system, unmount, wait_for, write_and_sync};

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn synced_data_survives_a_killed_server() {
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
    // `down` also cleans up.
    assert!(machine.down().contains("had died"));
    machine.assert_nothing_left();
    let checked = Command::new(binary()).args(["dump"]).arg(machine.path("disk")).output().unwrap();
    assert!(checked.status.success(), "{}", told(&checked));
}

/// strace kills the server at each of the system calls that make a new file: first for the disk, then for the detached
/// header.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn up_succeeds_after_a_kill_while_it_made_files() {
    let machine = Machine::new();
    let header = machine.path("header");
    let with_header = format!("size = \"32M\"\nheader = \"{}\"", header.display());
    machine.configure(&machine.default_config().replace("size = \"32M\"", &with_header));
    let config = machine.path("scratch.toml").display().to_string();
    for (call, time) in [("ftruncate", 1), ("fsync", 1), ("linkat", 1), ("fsync", 2), ("ftruncate", 2), ("linkat", 2)] {
        let killed = Command::new("strace")
            .args(["-f", "-qq", "-o"])
            .arg(machine.path("trace"))
            .args(["-e", &format!("trace={call}"), "-e", &format!("inject={call}:signal=KILL:when={time}")])
            .arg(binary())
            .arg("--run-dir")
            .arg(machine.path("run"))
            .args(["up", "--foreground", &config])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let trace = fs::read_to_string(machine.path("trace")).unwrap();
        assert!(trace.contains("killed by SIGKILL"), "{call} {time}: {} {trace}", told(&killed));
        machine.up();
        machine.down();
        for made in [machine.path("disk"), header.clone()] {
            fs::remove_file(made).unwrap();
        }
        machine.assert_nothing_left();
    }
}

/// A filesystem in memory of 256 KiB. Dropping this value unmounts it.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        system("mount", &["-t", "tmpfs", "-o", "size=256k,mode=700", "none", path.to_str().unwrap()]);
        Self(path)
    }

    fn fill(&self) {
        let mut file = File::options().append(true).create(true).open(self.0.join("full")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        while file.write_all(&[1]).is_ok() {}
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn down_needs_no_space_and_up_without_it_leaves_nothing() {
    let machine = Machine::new();
    let run = Tmpfs::new(machine.path("run"));
    machine.up();
    write_and_sync(&machine.path("mnt/text"), b"text");
    run.fill();
    machine.down();
    run.fill();
    let output = machine.on_config("up");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("No space left"), "{}", told(&output));
    assert!(!machine.path("run/scratch/state.json").exists(), "an incomplete record is left");
    fs::remove_file(machine.path("run/full")).unwrap();
    machine.up();
    assert!(machine.path("mnt/text").exists());
    // A server that is stopped by a signal needs no space either.
    run.fill();
    kill_process(machine.server(), Signal::TERM).unwrap();
    assert!(wait_for(|| machine.status().is_null()));
    drop(run);
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_server_killed_during_up_is_reported() {
    let machine = Machine::new();
    let front = machine.up_with_slow_mkfs();
    let status = machine.status();
    kill_process(machine.server(), Signal::KILL).unwrap();
    let output = front.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    for words in ["killed by signal 9 (SIGKILL) while it was making the ext4 filesystem", "nbdcrypt down scratch"] {
        assert!(told(&output).contains(words), "{words}: {}", told(&output));
    }
    // mkfs and the programs that it has started end with the server.
    let device = status["device"].as_str().unwrap();
    assert!(wait_for(|| mkfs_on(device).is_empty()), "{:?}", mkfs_on(device));
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_log_is_kept_when_the_device_ends() {
    let machine = Machine::new();
    machine.up();
    let status = machine.status();
    unmount(machine.path("mnt").to_str().unwrap());
    system("losetup", &["--detach", status["device"].as_str().unwrap()]);
    assert!(wait_for(|| machine.run(&["status", "scratch"]).status.code() == Some(3)));
    let log = machine.path("run/scratch/log");
    assert!(wait_for(|| !processes().iter().any(|(_, line)| line.contains(machine.folder.path().to_str().unwrap()))));
    let before = fs::read_to_string(&log).unwrap();
    assert!(before.contains("another program detached the device"), "{before}");
    assert!(told(&machine.run(&["status", "scratch"])).contains(log.to_str().unwrap()));
    machine.up();
    assert!(fs::read_to_string(&log).unwrap().starts_with(&before));
    machine.down();
    assert!(fs::read_to_string(&log).unwrap().starts_with(&before), "the log outlives the volume");
    assert!(!machine.path("run/scratch/state.json").exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_restart_right_after_a_kill_succeeds() {
    let machine = Machine::new();
    machine.up();
    for round in 0..5 {
        write_and_sync(&machine.path("mnt/round"), &[round]);
        kill_process(machine.server(), Signal::KILL).unwrap();
        assert!(machine.up().contains("scratch is up"));
        assert_eq!(fs::read(machine.path("mnt/round")).unwrap(), [round]);
    }
    machine.down();
    machine.assert_nothing_left();
}
