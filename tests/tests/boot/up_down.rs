//! Bringing a volume up and taking it down.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use harness::nbdcrypt::{binary, told};
use rustix::process::{Signal, kill_process};

use super::machine::{Machine, system, unmount, wait_for, write_and_sync};

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn data_survives_down_and_up_and_is_encrypted() {
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
fn a_second_up_or_down_succeeds_and_says_so() {
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
    // A name under which no volume is up may be a typing error.
    for args in [&["down", "scratch"][..], &["down", ".."], &["status", ".."]] {
        assert_eq!(machine.run(args).status.code(), Some(1), "{args:?}");
    }
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
fn down_after_an_unmount_touches_no_other_mount() {
    let machine = Machine::new();
    machine.up();
    let mountpoint = machine.path("mnt");
    let mountpoint = mountpoint.to_str().unwrap();
    // Something else is mounted over the filesystem. `down` must not touch the other mount, and must say so.
    system("mount", &["-t", "tmpfs", "none", mountpoint]);
    let output = machine.on_config("down");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("something else is mounted over"), "{}", told(&output));
    unmount(mountpoint);
    assert!(machine.path("mnt/lost+found").exists());
    // The user has unmounted the filesystem.
    unmount(mountpoint);
    machine.down();
    machine.assert_nothing_left();
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
    machine.refused("up", &["no keyslot opens with this passphrase"]);
    // The header names another cipher.
    let mut disk = fs::read(machine.path("disk")).unwrap();
    disk[8..24].copy_from_slice(b"serpent\0\0\0\0\0\0\0\0\0");
    fs::write(machine.path("disk"), disk).unwrap();
    machine.refused("up", &["serpent-xts-plain64", "cryptsetup"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_mount_folder_may_hold_files_as_with_mount() {
    let machine = Machine::new();
    fs::create_dir(machine.path("mnt")).unwrap();
    fs::write(machine.path("mnt/below"), "covered").unwrap();
    let output = machine.on_config("up");
    assert!(output.status.success(), "{}", told(&output));
    // The program warns, because the files below are neither encrypted nor visible.
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("mnt is not empty: it contains below, which"), "{said}");
    assert!(said.contains("The folder is not made immutable"), "{said}");
    assert!(!machine.path("mnt/below").exists());
    machine.down();
    assert!(machine.path("mnt/below").exists());
    fs::write(machine.path("mnt/more"), "").unwrap();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn nothing_can_be_written_to_a_bare_mountpoint() {
    let machine = Machine::new();
    let written = || fs::write(machine.path("mnt/plaintext"), "x").is_ok();
    machine.up();
    assert!(written());
    // A user unmounts the filesystem while it is in use.
    machine.shell("umount mnt");
    assert!(!written());
    machine.down();
    assert!(!written());
    machine.up();
    assert!(machine.path("mnt/plaintext").exists());
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| machine.status()["condition"] == "dead"));
    machine.down();
    assert!(!written());
    // A failed `up` leaves the mountpoint protected too.
    fs::rename(machine.path("key"), machine.path("moved")).unwrap();
    machine.fails("up", &["No such file"]);
    assert!(!written());
    fs::rename(machine.path("moved"), machine.path("key")).unwrap();

    // The configuration can turn this off.
    machine.configure(&(machine.default_config() + "protect-mountpoint = false\n"));
    machine.up();
    machine.down();
    assert!(written());
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn an_unmounted_filesystem_is_reported_and_mounted_again() {
    let machine = Machine::new();
    machine.up();
    write_and_sync(&machine.path("mnt/text"), b"text");
    let mountpoint = machine.path("mnt");
    let at = mountpoint.to_str().unwrap();
    let expect_attached = || {
        let status = machine.status();
        assert_eq!((&status["condition"], status["mountpoint"].is_null()), (&"attached".into(), true), "{status}");
        assert!(status["device"].is_string());
    };
    unmount(at);
    expect_attached();
    assert!(told(&machine.run(&["status"])).contains("not mounted"));
    assert!(machine.up().contains("scratch is up"));
    assert!(machine.path("mnt/text").exists());
    assert!(machine.up().contains("already up"));

    // Something else is mounted there, over the volume's filesystem or instead of it.
    for unmounts in [false, true] {
        if unmounts {
            unmount(at);
        }
        system("mount", &["-t", "tmpfs", "none", at]);
        expect_attached();
        let output = machine.on_config("up");
        assert_eq!(output.status.code(), Some(1));
        assert!(told(&output).contains("tmpfs from none is mounted on"), "{}", told(&output));
        unmount(at);
    }
    machine.up();

    // The filesystem is mounted, but not in the caller's mount namespace.
    let config = machine.path("scratch.toml");
    let script = format!(
        "umount {at} || umount -l {at}; {} --run-dir {} up {}",
        binary().display(),
        machine.path("run").display(),
        config.display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("another mount namespace"), "{}", told(&output));

    // If it is mounted twice, `down` unmounts it twice.
    system("mount", &["--bind", at, at]);

    // An earlier `down` has done half of the work.
    let held = File::open(machine.status()["device"].as_str().unwrap()).unwrap();
    let output = machine.on_config("down");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("is no longer mounted, but stays attached"), "{}", told(&output));
    expect_attached();
    drop(held);
    machine.up();
    assert!(machine.path("mnt/text").exists());
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn another_configuration_of_the_same_name_is_refused() {
    let machine = Machine::new();
    machine.up();
    fs::create_dir(machine.path("b")).unwrap();
    let (first, second) = (machine.path("scratch.toml"), machine.path("b/scratch.toml"));
    let second_name = second.to_str().unwrap();
    let other = machine.default_config().replace("/disk\"", "/disk2\"").replace("/mnt\"", "/mnt2\"");
    fs::write(&second, other).unwrap();
    for verb in ["up", "down", "status", "plan"] {
        let output = machine.run(&[verb, second_name]);
        assert_eq!(output.status.code(), Some(1), "{verb}: {}", told(&output));
        for path in [&first, &second] {
            assert!(told(&output).contains(path.to_str().unwrap()), "{verb}: {}", told(&output));
        }
    }
    assert!(!machine.path("disk2").exists() && machine.path("mnt/lost+found").exists());
    // The same volume through another path: a symbolic link, a copy, and the file after it was moved.
    fs::remove_file(&second).unwrap();
    std::os::unix::fs::symlink(&first, &second).unwrap();
    assert!(told(&machine.run(&["up", second_name])).contains("already up"));
    fs::remove_file(&second).unwrap();
    fs::rename(&first, &second).unwrap();
    let output = machine.run(&["up", second_name]);
    assert!(output.status.success() && told(&output).contains("already up"), "{}", told(&output));
    // The same file after an edit. `up` must not report on the new text.
    fs::write(&first, machine.default_config().replace("/mnt\"", "/mnt2\"")).unwrap();
    let output = machine.on_config("up");
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("before it was edited"), "{}", told(&output));
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn status_calls_a_stopped_server_silent() {
    let machine = Machine::new();
    machine.up();
    let server = machine.server();
    kill_process(server, Signal::STOP).unwrap();
    let status = machine.status();
    kill_process(server, Signal::CONT).unwrap();
    assert_eq!(status["condition"], "silent", "{status}");
    assert_eq!(machine.status()["condition"], "up");
    machine.down();
}

/// With `size`, a mistyped path makes a new file, whose empty filesystem looks like lost data.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn a_new_volume_is_announced_once() {
    let machine = Machine::new();
    let news = format!("scratch: made a new, empty volume on {} (no volume was there)", machine.path("disk").display());
    let first = machine.on_config("up");
    assert!(first.status.success() && told(&first).contains(&news), "{}", told(&first));
    let log = fs::read_to_string(machine.path("run/scratch/log")).unwrap();
    assert!(log.contains(&news), "{log}");
    machine.down();
    let second = machine.on_config("up");
    assert!(second.status.success() && !told(&second).contains("made a new"), "{}", told(&second));
    machine.down();
    let log = fs::read_to_string(machine.path("run/scratch/log")).unwrap();
    assert!(log.contains(&news), "the log outlives the volume: {log}");
    // A log without a line does not.
    fs::remove_file(machine.path("run/scratch/log")).unwrap();
    machine.up();
    assert!(machine.path("run/scratch/log").exists());
    machine.down();
    assert!(!machine.path("run/scratch").exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn a_verbose_start_says_how_long_each_step_took() {
    let machine = Machine::new();
    let config = machine.path("scratch.toml");
    let output = machine.run(&["up", "-v", config.to_str().unwrap()]);
    for step in ["disk", "secret", "volume", "device", "mount"] {
        assert!(told(&output).contains(&format!("the step `{step}` took ")), "{step}: {}", told(&output));
    }
    machine.down();
    let quiet = machine.on_config("up");
    assert!(!told(&quiet).contains("the step") && !told(&quiet).contains("CAP_SYS_RESOURCE"), "{}", told(&quiet));
    machine.down();
}

/// A service or a container that starts gets a copy of every mount. For that time, the device is in use.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn down_waits_for_copies_of_the_mount_to_go() {
    let machine = Machine::new();
    machine.up();
    let own = machine.path("mnt").display().to_string();
    // The copies of other tests' mounts go at once, so that they are not in use meanwhile.
    let script = format!(
        "awk '$5 ~ \"^/(tmp|run|dev/shm)/.*\" && $5 != \"{own}\" {{ print $5 }}' /proc/self/mountinfo | tac |
         while read -r copy; do umount -l \"$copy\" 2> /dev/null || true; done; echo; sleep 2"
    );
    let mut holder = Command::new("unshare");
    holder.args(["--mount", "--propagation", "private", "sh", "-c", &script]).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    holder.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    machine.down();
    assert!(holder.wait().unwrap().success());
    machine.assert_nothing_left();
}
