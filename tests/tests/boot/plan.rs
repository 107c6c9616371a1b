//! Asking what `up` would do.

use std::fs;

use harness::nbdcrypt::told;
use rustix::process::{Signal, kill_process};

use super::machine::{LoopDisk, Machine, wait_for};

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_plan_lists_the_steps_and_changes_nothing() {
    let machine = Machine::new();
    let before = machine.everything();
    let output = machine.on_config("plan");
    assert!(output.status.success(), "{}", told(&output));
    let plan = String::from_utf8(output.stdout).unwrap();
    for step in ["mountpoint", "disk", "secret", "volume", "device", "filesystem", "header", "mount"] {
        assert!(plan.lines().any(|line| line.starts_with(step)), "{step} in {plan}");
    }
    assert_eq!(machine.everything(), before);
    // The plan also says what would make `up` fail.
    fs::write(machine.path("disk"), vec![1; 4 << 20]).unwrap();
    machine.refused("plan", &["not blank"]);
}

/// `plan` says this at the step at which `up` would fail, and changes nothing.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and losetup: run `make test`")]
fn a_plan_says_which_disks_are_impossible() {
    let machine = Machine::new();
    let good = machine.default_config();
    let disk = machine.path("disk").display().to_string();
    let impossible = |step: &str, words: &[&str]| {
        let before = machine.everything();
        let output = machine.on_config("plan");
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let plan = String::from_utf8_lossy(&output.stdout).into_owned();
        let row = plan.lines().find(|line| line.starts_with(step) && line.contains("not possible"));
        assert!(row.is_some(), "{step}: {}", told(&output));
        for word in words {
            assert!(told(&output).contains(word), "{word}: {}", told(&output));
        }
        assert_eq!(machine.everything(), before);
    };
    // Too small: a file that would be made, a file that exists, and the header's file.
    for size in ["1M", "16M"] {
        machine.configure(&good.replace("32M", size));
        impossible("volume", &["the disk has", "at least"]);
    }
    machine.configure(&good.replace("size = \"32M\"", ""));
    impossible("disk", &["does not exist"]);
    machine.shell("truncate -s 16M disk");
    impossible("volume", &["the disk has", "at least"]);
    machine.shell("truncate -s 32M disk; truncate -s 4K header");
    let header = machine.path("header").display().to_string();
    machine.configure(&good.replace("size = \"32M\"", &format!("header = \"{header}\"")));
    impossible("volume", &["at least"]);
    machine.shell("rm disk header");
    // Odd sizes.
    machine.shell("truncate -s 33554944 disk");
    machine.configure(&good.replace("size = \"32M\"", "sector-size = 4096"));
    impossible("volume", &["`sector-size` under [volume] does not fit", "not a multiple of 4096"]);
    // Read-only: a device, and a file.
    machine.shell("truncate -s 32M disk");
    let attached = LoopDisk::new(&machine, "losetup --find --show --read-only disk");
    machine.configure(&good.replace(&disk, &attached.path).replace("size = \"32M\"\n", ""));
    impossible("volume", &["is blank", "is read-only", "blockdev --setrw"]);
    // In use: by the loop device, and by a filesystem.
    machine.configure(&good);
    impossible("disk", &["in use", "the loop device", "losetup -d"]);
    drop(attached);
    machine.shell("chattr +i disk");
    let read_only =
        std::panic::catch_unwind(|| impossible("volume", &["is blank", "not even root may open it", "lsattr"]));
    machine.shell("chattr -i disk; mkfs.ext4 -qF disk; mkdir other");
    read_only.unwrap();
    let attached = LoopDisk::new(&machine, "losetup --find --show disk");
    machine.configure(&good.replace(&disk, &attached.path).replace("size = \"32M\"\n", ""));
    machine.shell(&format!("mount {} other", attached.path));
    impossible("disk", &["in use", "ext4 filesystem is mounted on"]);
    machine.shell("umount other");
    drop(attached);
    // A header whose disk is missing.
    machine.shell("rm disk; truncate -s 16M header");
    machine.configure(&good.replace("size = \"32M\"", &format!("size = \"32M\"\nheader = \"{header}\"")));
    impossible("disk", &["is missing, but its header", "exists"]);
}

/// `up` cleans up what a dead server left, and does nothing if the volume is up. So neither is an obstacle.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn a_plan_knows_of_a_server_that_lives_or_died() {
    let machine = Machine::new();
    let plan = || {
        let output = machine.on_config("plan");
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    machine.up();
    let alive = plan();
    assert!(alive.contains("done already") && alive.contains("scratch is up: /dev/"), "{alive}");
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| machine.status()["condition"] == "dead"), "{}", machine.status());
    let dead = plan();
    assert!(dead.contains("clean up what a dead server") && dead.contains("unlock the LUKS2 volume"), "{dead}");
    machine.up();
    machine.down();
}
