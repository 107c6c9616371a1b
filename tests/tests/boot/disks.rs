//! Choosing a disk: what is taken, what is refused, and what is made on it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::nbdcrypt::told;
use rustix::process::{Pid, Signal, kill_process};

use super::machine::{LoopDisk, MIB, Machine, write_and_sync};

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and cryptsetup: run `make test`")]
fn an_old_boot_script_volume_opens_and_is_named() {
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
fn data_behind_a_wiped_start_is_not_overwritten() {
    let machine = Machine::new();
    let ext4 = machine.ext4();
    let cure = format!("`fallocate --punch-hole --offset 0 --length 67108864 {}`", machine.path("disk").display());
    machine.disk_with(MIB, &ext4);
    for verb in ["up", "plan"] {
        machine.refused(verb, &["not blank", "ext4 filesystem beginning at byte 1048576 (1 MiB)", &cure]);
    }
    machine.disk_with(63 * 512, &ext4);
    machine.refused("up", &["not blank", "ext4 filesystem beginning at byte 32256"]);
    machine.disk_with(40 * MIB, b"a diary");
    machine.refused("up", &["not blank", "byte 41943040, at 40 MiB"]);
    // The same holds for the data's disk if the header is detached.
    let header = format!("size = \"32M\"\nheader = \"{}\"", machine.path("header").display());
    machine.configure(&machine.default_config().replace("size = \"32M\"", &header));
    machine.refused("up", &["the disk for the data is not", "byte 41943040, at 40 MiB"]);
    // The command that the error suggests works.
    let output = Command::new("sh").args(["-c", cure.trim_matches('`')]).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    machine.up();
    machine.down();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn no_filesystem_is_made_over_a_volumes_data() {
    let machine = Machine::new();
    fs::write(machine.path("key"), harness::luks::PASSPHRASE).unwrap();
    let mut ext4 = machine.ext4();
    // If the volume was partitioned, the partition's filesystem is found.
    machine.disk_with(0, b"");
    machine.format(&[]);
    harness::luks::open(&machine.path("disk")).write(MIB, &mut ext4).unwrap();
    machine.refused("up", &["was written to", "ext4 filesystem beginning at byte 1048576 (1 MiB)", "nbdcrypt serve"]);
    // The same with other data that lies only beyond the range that mkfs writes first.
    machine.disk_with(0, b"");
    machine.format(&[]);
    harness::luks::open(&machine.path("disk")).write(30 * MIB, &mut b"a diary".to_vec()).unwrap();
    machine.refused("up", &["was written to", "at 30 MiB", "mkfs.ext4"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn an_unwritten_volume_over_old_data_gets_a_filesystem() {
    let machine = Machine::new();
    fs::write(machine.path("key"), harness::luks::PASSPHRASE).unwrap();
    let mut old = vec![0; 64 << 20];
    harness::luks::noise(3)(&mut old).unwrap();
    for kind in ["luks1", "luks2"] {
        machine.disk_with(0, &old);
        machine.format(&["--wipe", "--type", kind]);
        harness::luks::open(&machine.path("disk")).write(20 * MIB, &mut b"a diary".to_vec()).unwrap();
        machine.refused("up", &["was written to"]);
        machine.disk_with(0, &old);
        machine.format(&["--wipe", "--type", kind]);
        machine.up();
        write_and_sync(&machine.path("mnt/text"), b"here");
        machine.down();
        machine.up();
        assert_eq!(fs::read(machine.path("mnt/text")).unwrap(), b"here");
        machine.down();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, cryptsetup and mkfs.ext4: run `make test`")]
fn a_disk_of_odd_size_gets_sectors_that_fit() {
    let machine = Machine::new();
    let sized = |bytes: u64| File::create(machine.path("disk")).unwrap().set_len(bytes).unwrap();
    sized(32 * MIB + 512);
    machine.configure(&machine.default_config().replace("size = \"32M\"", "sector-size = 4096"));
    for verb in ["plan", "up"] {
        machine.refused(verb, &["`sector-size` under [volume] does not fit", "not a multiple of 4096", "512 bytes"]);
    }
    for (more, sector) in [(512, "512"), (3584, "512"), (4096, "4096")] {
        sized(32 * MIB + more);
        machine.configure(&machine.default_config());
        machine.up();
        write_and_sync(&machine.path("mnt/text"), b"here");
        machine.down();
        machine.up();
        assert_eq!(fs::read(machine.path("mnt/text")).unwrap(), b"here");
        machine.down();
        let dump = harness::luks::run("cryptsetup", [Path::new("luksDump"), &machine.path("disk")]);
        assert!(dump.contains(&format!("sector: {sector} [bytes]")), "{more}: {dump}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn unaligned_data_uses_the_page_cache_automatically() {
    let memory = tempfile::Builder::new().prefix("nbdcrypt-boot-").tempdir_in("/dev/shm").unwrap();
    let machine = Machine::new();
    fs::write(machine.path("key"), harness::luks::PASSPHRASE).unwrap();
    for disk in [machine.path("disk"), memory.path().join("disk")] {
        let config = machine.default_config().replace(machine.path("disk").to_str().unwrap(), disk.to_str().unwrap());
        machine.configure(&config.replace("size = \"32M\"", "type = \"luks1\""));
        File::create(&disk).unwrap().set_len(32 * MIB).unwrap();
        harness::luks::format_luks1(&disk, engine::luks::HashAlgorithm::Sha256, harness::luks::key(64));
        // The payload begins 512 bytes later (LUKS1 specification, figure 1: payload-offset).
        let file = File::options().write(true).open(&disk).unwrap();
        file.write_all_at(&4097_u32.to_be_bytes(), 104).unwrap();
        machine.up();
        write_and_sync(&machine.path("mnt/text"), b"here");
        machine.down();
        machine.up();
        assert_eq!(fs::read(machine.path("mnt/text")).unwrap(), b"here");
        machine.down();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn a_plain_volumes_key_has_the_configured_length() {
    let machine = Machine::new();
    let plain = |more: &str| {
        let config = machine.default_config().replace("size = \"32M\"", &format!("type = \"plain\"\n{more}"));
        machine.configure(&config.replace("random = true\n", ""));
    };
    machine.disk_with(0, b"");
    let mut bytes = [0; 65];
    harness::luks::noise(9)(&mut bytes).unwrap();
    for (len, more, words) in [
        (32, "key-size = 512", ["it has 32 bytes, but 64 were asked for", "`key-size = 512` needs exactly 64 bytes"]),
        (65, "", ["it has 65 bytes, but 64 were asked for", "`keyfile-size = 64`"]),
        (64, "key-size = 256", ["it has 64 bytes, but 32 were asked for", "`key-size = 256` needs exactly 32 bytes"]),
        (32, "hash = \"sha256\"", ["is ignored, as cryptsetup does with a key file", "`hash-key-file = true`"]),
    ] {
        fs::write(machine.path("key"), &bytes[..len]).unwrap();
        plain(more);
        machine.refused("up", &words);
    }
    fs::write(machine.path("key"), bytes).unwrap();
    plain("keyfile-size = 64");
    machine.up();
    machine.down();
}

/// A disk that is in use is refused.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_user_of_a_busy_disk_is_named() {
    let machine = Machine::new();
    machine.up();
    let second = Machine::new();
    second.configure(
        &second.default_config().replace(second.path("disk").to_str().unwrap(), machine.path("disk").to_str().unwrap()),
    );
    second.refused("up", &["in use", "nbdcrypt status"]);
    // The attached device itself, whose filesystem the server has mounted.
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
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn no_file_is_made_in_dev_for_a_missing_disk() {
    let machine = Machine::new();
    std::os::unix::fs::symlink("/dev", machine.path("nodes")).unwrap();
    let good = machine.default_config();
    let (disk, missing) = (machine.path("disk").display().to_string(), "/dev/nbdcrypt-no-such-disk");
    let through = machine.path("nodes/nbdcrypt-no-such-disk").display().to_string();
    for path in [missing, &through, "/dev/disk/by-id/nvme-no-such-disk", "/proc/disk", "/sys/disk"] {
        for config in
            [good.replace(&disk, path), good.replace("size = \"32M\"", &format!("size = \"32M\"\nheader = \"{path}\""))]
        {
            machine.configure(&config.replace("[volume]", "[volume]\nwait-for = \"0s\""));
            for verb in ["plan", "up"] {
                machine.refused(verb, &[path, "no file is made there", "lsblk"]);
            }
        }
    }
    assert!(!Path::new(missing).exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn an_empty_file_is_refused_with_a_remedy() {
    let machine = Machine::new();
    File::create(machine.path("disk")).unwrap();
    machine.refused("up", &["has 0 bytes", "rm ", "makes it again"]);
    machine.refused("plan", &["has 0 bytes"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and losetup: run `make test`")]
fn a_read_only_disk_is_brought_up_read_only() {
    let machine = Machine::new();
    machine.up();
    write_and_sync(&machine.path("mnt/text"), b"kept");
    machine.down();
    let good = machine.default_config();
    let disk = machine.path("disk").display().to_string();
    let check = |why: &str| {
        let output = machine.on_config("up");
        assert!(output.status.success(), "{}", told(&output));
        assert!(told(&output).contains(why), "{}", told(&output));
        assert_eq!(machine.status()["volume"]["read-only"], true, "{}", machine.status());
        assert_eq!(fs::read(machine.path("mnt/text")).unwrap(), b"kept");
        let error = fs::write(machine.path("mnt/text"), b"lost").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        machine.down();
    };
    // One device is read-only when it is made, the other is made read-only later.
    for prepare in ["losetup --find --show --read-only disk", "losetup --find --show disk"] {
        let attached = LoopDisk::new(&machine, prepare);
        let device = &attached.path;
        machine.shell(&format!("blockdev --setro {device}"));
        machine.configure(&good.replace(&disk, device).replace("size = \"32M\"\n", ""));
        check(&format!("{device} is read-only"));
        for args in [
            &["format", "--wipe", "--key-file", "key"][..],
            &["key", "add", "--key-file", "key", "--new-key-file", "key"],
            &["header", "repair"],
        ] {
            let output = machine.command(args).arg(device).current_dir(machine.folder.path()).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{args:?}: {}", told(&output));
            assert!(told(&output).contains(&format!("{device} is read-only: the kernel")), "{}", told(&output));
        }
        let served = machine.shell(&format!(
            "rm -f address
             $nbdcrypt serve --key-file key --socket $PWD/socket {device} > address & server=$!
             trap 'kill $server' EXIT
             until [ -s address ]; do sleep 0.1; done
             nbdinfo --json \"nbd+unix:///?socket=$PWD/socket\""
        ));
        assert!(served.contains("\"is_read_only\": true"), "{served}");
    }
    // A file without write permission.
    machine.configure(&good);
    machine.shell("chattr +i disk");
    check("permission denied");
    machine.shell("chattr -i disk");

    // A file on a filesystem that is mounted read-only.
    machine.shell("mkdir ro; mount --bind . ro; mount -o remount,ro,bind ro");
    machine.configure(&good.replace(&disk, machine.path("ro/disk").to_str().unwrap()));
    check("is read-only: it lies on a filesystem");
    machine.shell("umount ro; rmdir ro");
    machine.configure(&good);

    // A blank read-only disk cannot become a volume.
    machine.shell("truncate -s 0 disk; truncate -s 32M disk");
    let attached = LoopDisk::new(&machine, "losetup --find --show --read-only disk");
    machine.configure(&good.replace(&disk, &attached.path).replace("size = \"32M\"\n", ""));
    machine.fails("up", &["blank but read-only"]);
    drop(attached);
    machine.assert_nothing_left();
}

/// A service or a container that starts gets a copy of every mount. For that time, a disk that was just unmounted is in use.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and unshare: run `make test`")]
fn copies_of_a_mount_of_the_disk_are_waited_for() {
    let machine = Machine::new();
    machine.disk_with(0, &machine.ext4());
    let disk = LoopDisk::new(&machine, "losetup --find --show disk");
    let script = "mkdir there; mount \"$0\" there; echo; sleep 1";
    let mut holder = Command::new("unshare");
    holder.args(["--mount", "--propagation", "private", "sh", "-c", script, &disk.path]);
    let mut holder = holder.current_dir(machine.folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    holder.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let key = machine.path("key").display().to_string();
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", &key];
    let output = machine.run(&[&["format", "--wipe", &disk.path], &quick[..]].concat());
    assert!(output.status.success(), "{}", told(&output));
    assert!(holder.wait().unwrap().success());
}

/// A name in /dev that this test makes.
struct Node(PathBuf);

impl Node {
    /// Returns a name that does not exist yet.
    fn missing() -> Self {
        Self(PathBuf::from(format!("/dev/nbdcrypt-late-{}", std::process::id())))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// `up` waits for a disk until it is there, and says so. `down` and SIGTERM end the wait.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and losetup: run `make test`")]
fn a_disk_that_appears_late_is_waited_for() {
    let machine = Machine::new();
    machine.shell("truncate -s 32M image");
    let attached = LoopDisk::new(&machine, "losetup --find --show image");
    let node = Node::missing();
    let path = node.0.display().to_string();
    let volume = format!("devices = [\"{path}\"]\nwait-for = \"2h\"");
    let disk = machine.path("disk").display().to_string();
    let config = machine.default_config();
    machine.configure(&config.replace(&format!("devices = [\"{disk}\"]\nsize = \"32M\""), &volume));
    let planned = machine.on_config("plan");
    assert!(told(&planned).contains(&format!("wait up to 7200 s for {path}")), "{}", told(&planned));
    for how in ["down", "SIGTERM", "it appears"] {
        let config = machine.path("scratch.toml");
        let mut up = machine.command(&["up", config.to_str().unwrap()]);
        let front = up.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let status = machine.await_doing(&format!("waiting up to 7200 s for {path}"));
        assert_eq!(status["disk"], path.as_str(), "{status}");
        match how {
            "down" => assert!(machine.down().contains("the start was called off")),
            "SIGTERM" => kill_process(Pid::from_child(&front), Signal::TERM).unwrap(),
            _ => std::os::unix::fs::symlink(&attached.path, &node.0).unwrap(),
        }
        let output = front.wait_with_output().unwrap();
        assert!(told(&output).contains(&format!("waiting up to 7200 s for {path}")), "the log: {}", told(&output));
        if how == "it appears" {
            assert!(output.status.success(), "{}", told(&output));
        } else {
            assert_eq!(output.status.code(), Some(1), "{how}: {}", told(&output));
            assert!(told(&output).contains("everything was undone"), "{how}: {}", told(&output));
            assert!(machine.status().is_null() && machine.mounts() == 0, "{how}: {}", machine.status());
        }
    }
    machine.down();
}

/// The wait has a bound. Then the error names what there is.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn a_disk_that_does_not_appear_is_an_error() {
    let machine = Machine::new();
    let config = machine.default_config();
    let disk = machine.path("disk").display().to_string();
    let configure = |volume: &str| {
        machine.configure(&config.replace(&format!("devices = [\"{disk}\"]\nsize = \"32M\""), volume));
    };
    for wait in ["0s", "1s"] {
        let wait = format!("wait-for = \"{wait}\"");
        configure(&format!("devices = [\"/dev/nbdcrypt-no-such-disk\"]\n{wait}"));
        machine.refused("up", &["/dev/nbdcrypt-no-such-disk does not exist"]);
        configure(&format!("serial = \"nbdcrypt-none\"\n{wait}"));
        machine.refused("up", &["no disk has the serial number nbdcrypt-none"]);
        configure(&format!("devices = [\"instance-store\"]\nserial = \"nbdcrypt-none\"\n{wait}"));
        machine.refused("up", &["no disk has the serial number nbdcrypt-none"]);
    }
    for verb in ["plan", "doctor"] {
        machine.fails(
            verb,
            &["no disk has the serial number nbdcrypt-none", "wait up to 1 s for the disk with the serial"],
        );
    }
}

/// A mount namespace plays an EC2 instance: the loop device of this test is an EBS volume there.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and losetup: run `make test`")]
fn a_blank_ebs_volume_is_not_made_a_volume_by_chance() {
    let machine = Machine::new();
    machine.shell("truncate -s 32M image");
    let attached = LoopDisk::new(&machine, "losetup --find --show image");
    let disk = machine.path("disk").display().to_string();
    let config = machine.default_config();
    machine.configure(&config.replace(&format!("{disk}\"]\nsize = \"32M\""), &format!("{}\"]", attached.path)));
    machine.shell(&format!(
        r#"cat > script <<'END'
            set -eu
            number=$(lsblk --noheadings --nodeps --output MAJ:MIN {device} | tr -d ' ')
            mount -t tmpfs none /sys/dev/block; ln -s ../../block/nvme1n1 "/sys/dev/block/$number"
            mount -t tmpfs none /sys/block; mkdir -p /sys/block/nvme1n1/device; echo 65536 > /sys/block/nvme1n1/size
            echo 'Amazon Elastic Block Store' > /sys/block/nvme1n1/device/model
            echo vol0abc > /sys/block/nvme1n1/device/serial
            for verb in up plan doctor; do
                if $nbdcrypt $verb scratch.toml > $verb 2>&1; then exit 9; fi
                grep -F 'is blank, and it is an EBS volume (vol0abc)' $verb
                grep -F 'serial = "vol0abc"' $verb
            done
END
        unshare --mount --propagation private bash script
        cmp --bytes 33554432 image /dev/zero"#,
        device = attached.path
    ));
    drop(attached);
    machine.assert_nothing_left();
}

/// Needs no md driver.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn several_disks_are_one_volume_whatever_their_names() {
    let machine = Machine::new();
    let disk = |name: &str| machine.path(name).display().to_string();
    let devices = |names: &[&str]| {
        let list: Vec<_> = names.iter().map(|name| format!("{:?}", disk(name))).collect();
        let one = format!("devices = [{:?}]\nsize = \"32M\"", disk("disk"));
        machine.configure(&machine.default_config().replace(&one, &format!("devices = [{}]", list.join(", "))));
    };
    for name in ["a", "b", "c"] {
        File::create(machine.path(name)).unwrap().set_len(24 * MIB).unwrap();
    }
    devices(&["a", "b", "c"]);
    machine.up();
    assert_eq!(machine.status()["made"], "volume");
    write_and_sync(&machine.path("mnt/file"), &vec![7; 4 << 20]);
    assert!(machine.status()["disk"].as_str().unwrap().contains("the array of"));
    machine.down();
    devices(&["c", "a", "b"]);
    machine.up();
    assert_eq!(fs::read(machine.path("mnt/file")).unwrap(), vec![7; 4 << 20]);
    machine.down();
    // One is missing, or was replaced by a blank disk, or is named twice under two names.
    let before = ["a", "b", "c"].map(|name| fs::read(machine.path(name)).unwrap());
    devices(&["a", "b"]);
    machine.refused("up", &["only 2 of the array's 3 members are given (missing roles: 2)"]);
    File::create(machine.path("blank")).unwrap().set_len(24 * MIB).unwrap();
    devices(&["a", "b", "blank"]);
    let blank = format!("{}: there is no md superblock", disk("blank"));
    for verb in ["up", "plan"] {
        machine.refused(verb, &[&blank]);
    }
    assert!(fs::read(machine.path("blank")).unwrap().iter().all(|byte| *byte == 0));
    fs::copy(machine.path("a"), machine.path("copy")).unwrap();
    devices(&["a", "b", "copy"]);
    machine.refused("up", &["it has the same role 0 in the array"]);
    assert_eq!(["a", "b", "c"].map(|name| fs::read(machine.path(name)).unwrap()), before);
    machine.assert_nothing_left();
}
