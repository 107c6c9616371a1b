//! Folders of a volume that are mounted elsewhere as well.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use harness::nbdcrypt::told;
use rustix::process::{Signal, kill_process};

use super::machine::{Machine, unmount, wait_for, write_and_sync};

/// Returns a machine whose configuration mounts two folders of the volume, on `bound/one` and `bound/two`.
fn machine() -> Machine {
    let machine = Machine::new();
    let (one, two) = (machine.path("bound/one"), machine.path("bound/two"));
    let bind = format!("bind = {{ \"a/one\" = \"{}\", two = \"{}\" }}\n", one.display(), two.display());
    machine.configure(&(machine.default_config() + &bind));
    machine
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn binds_come_up_and_go_down_with_the_volume() {
    let machine = machine();
    machine.up();
    for (inside, outside) in [("a/one", "one"), ("two", "two")] {
        let (inside, outside) = (machine.path("mnt").join(inside), machine.path("bound").join(outside));
        write_and_sync(&outside.join("file"), b"kept");
        assert_eq!(fs::read(inside.join("file")).unwrap(), b"kept");
        assert_eq!(fs::metadata(&inside).unwrap().permissions().mode() & 0o777, 0o755);
    }
    // An existing folder keeps its mode.
    fs::set_permissions(machine.path("mnt/two"), fs::Permissions::from_mode(0o700)).unwrap();
    let status = machine.status();
    assert_eq!(status["condition"], "up");
    assert_eq!(status["binds"][0]["folder"], "a/one");
    assert_eq!(status["binds"][1]["target"], machine.path("bound/two").to_str().unwrap());
    assert!(status["binds"][0]["mounted"] == true && status["binds"][1]["mounted"] == true, "{status}");
    machine.down();
    machine.assert_nothing_left();
    fs::write(machine.path("bound/one/file"), "plaintext").unwrap_err();
    machine.up();
    assert_eq!(fs::read(machine.path("bound/one/file")).unwrap(), b"kept");
    assert_eq!(fs::metadata(machine.path("bound/two")).unwrap().permissions().mode() & 0o777, 0o700);
    machine.down();
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_bind_that_is_missing_is_shown_and_mounted_again() {
    let machine = machine();
    machine.up();
    let two = machine.path("bound/two").to_str().unwrap().to_owned();
    unmount(&two);
    let status = machine.status();
    assert_eq!((status["condition"].as_str(), &status["binds"][1]["mounted"]), (Some("attached"), &false.into()));
    let output = machine.run(&["status", "scratch"]);
    assert!(told(&output).contains(&format!("not mounted on {two}: nothing can be written")), "{}", told(&output));
    let output = machine.on_config("plan");
    assert!(told(&output).contains(&format!("again on {two}")), "{}", told(&output));
    machine.up();
    assert_eq!(machine.status()["condition"], "up");
    // Something else is in the place.
    unmount(&two);
    machine.shell("mount -t tmpfs none bound/two");
    machine.fails("up", &["tmpfs", &two, "unmount that first"]);
    unmount(&two);
    machine.up();
    machine.down();
    machine.assert_nothing_left();
}

/// A program that may write to the volume must not get another folder of the machine mounted.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_link_out_of_the_volume_is_refused_and_all_is_undone() {
    let machine = Machine::new();
    machine.up();
    fs::create_dir(machine.path("mnt/a")).unwrap();
    symlink("/etc", machine.path("mnt/a/one")).unwrap();
    machine.down();
    let one = machine.path("bound/one").display().to_string();
    machine.configure(&format!("{}bind = {{ \"a/one\" = \"{one}\" }}\n", machine.default_config()));
    machine.fails("up", &["the volume's folder a/one", &one, "mnt/a/one is a symbolic link"]);
    machine.assert_nothing_left();
    assert!(!machine.path("bound").exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_bind_in_use_keeps_the_volume_up() {
    let machine = machine();
    machine.up();
    let held = fs::File::create(machine.path("bound/one/held")).unwrap();
    machine.fails("down", &["bound/one is in use by", &format!("({})", std::process::id())]);
    write_and_sync(&machine.path("mnt/still"), b"up");
    // `two` was unmounted before, and is mounted again.
    assert_eq!(machine.status()["condition"], "up");
    write_and_sync(&machine.path("bound/two/still"), b"up");
    drop(held);
    machine.down();
    machine.assert_nothing_left();
}

/// No process uses the folder, so the error names none.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_mount_within_a_bind_keeps_the_volume_up() {
    let machine = machine();
    machine.up();
    machine.shell("mkdir bound/one/within; mount -t tmpfs none bound/one/within");
    machine.fails("down", &["scratch stays up", "bound/one"]);
    assert_eq!(machine.status()["condition"], "up");
    write_and_sync(&machine.path("bound/two/still"), b"up");
    unmount(machine.path("bound/one/within").to_str().unwrap());
    machine.down();
    machine.assert_nothing_left();
}

/// A program may use the filesystem before the last step is done. The server does not end below it.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_start_that_fails_waits_for_those_who_use_the_filesystem() {
    let machine = Machine::new();
    machine.up();
    fs::create_dir(machine.path("mnt/a")).unwrap();
    symlink("/etc", machine.path("mnt/a/one")).unwrap();
    machine.down();
    let one = machine.path("bound/one").display().to_string();
    machine.configure(&format!("{}bind = {{ \"a/one\" = \"{one}\" }}\n", machine.default_config()));
    // The user must open the folder between the mount and the bind mount. If he is too late, the start is repeated.
    let script = "until { exec 3< mnt/a; } 2> /dev/null; do test ! -e stop || exit 0; done; sleep 1; touch released";
    for attempt in 0.. {
        let mut user = Command::new("bash").args(["-c", script]).current_dir(machine.folder.path()).spawn().unwrap();
        machine.fails("up", &["the volume's folder a/one", "mnt/a/one is a symbolic link"]);
        machine.assert_nothing_left();
        let released = machine.path("released").exists();
        fs::write(machine.path("stop"), "").unwrap();
        assert!(user.wait().unwrap().success());
        fs::remove_file(machine.path("stop")).unwrap();
        if released {
            break;
        }
        assert!(!machine.path("released").exists(), "the server did not wait");
        assert!(attempt < 100, "the folder was never opened in time");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn binds_of_a_dead_server_are_cleaned_up() {
    let machine = machine();
    machine.up();
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| machine.status()["condition"] == "dead"));
    let output = machine.on_config("plan");
    assert!(told(&output).contains("bound/two, unmount"), "{}", told(&output));
    machine.down();
    machine.assert_nothing_left();
    // An edited configuration is noticed: its new targets are not protected yet.
    machine.up();
    machine.configure(&machine.default_config());
    machine.fails("up", &["before it was edited", "bound/two"]);
    machine.down();
    machine.assert_nothing_left();
}
