//! Who may read or change what a volume depends on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use harness::nbdcrypt::{binary, copy_binary, told};
use rustix::process::{Pid, Signal, kill_process};

use super::machine::{Machine, wait_for};

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
        assert!(!bytes.windows(6).any(|window| window == b"Secret"), "the secret is in the server's {what}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let locked = status.lines().find(|line| line.starts_with("VmLck")).unwrap();
    assert_ne!(locked.split_whitespace().nth(1), Some("0"), "{locked}");
    machine.down();
}

/// The background server keeps no descriptors of its caller. The foreground server has its caller's descriptors, but does
/// not pass them to the programs that it starts.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and flock: run `make test`")]
fn the_server_does_not_hold_its_callers_lock() {
    let machine = Machine::new();
    machine.shell("exec 9> lock; flock 9; $nbdcrypt up scratch.toml");
    machine.shell("flock --nonblock lock true; $nbdcrypt down scratch.toml");

    let script = "exec 9> lock; flock 9; exec $nbdcrypt up --foreground scratch.toml";
    let mut server = Command::new("bash")
        .args(["-c", script])
        .current_dir(machine.folder.path())
        .env("nbdcrypt", format!("{} --run-dir {}", binary().display(), machine.path("run").display()))
        .spawn()
        .unwrap();
    assert!(wait_for(|| machine.path("mnt/lost+found").exists()));
    machine.shell("! flock --nonblock lock true");
    for info in fs::read_dir(format!("/proc/{}/fdinfo", server.id())).unwrap() {
        let info = info.unwrap();
        let number: u32 = info.file_name().to_str().unwrap().parse().unwrap();
        let Ok(text) = fs::read_to_string(info.path()) else { continue };
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let closed_on_exec = u32::from_str_radix(flags.trim(), 8).unwrap() & 0o2_000_000 != 0;
        assert!(number < 3 || closed_on_exec, "{number}: {text}");
    }
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    // A key that is passed as a descriptor can still be read.
    machine.configure(&machine.default_config().replace(machine.path("key").to_str().unwrap(), "/dev/fd/5"));
    machine.shell("$nbdcrypt up scratch.toml 5< key; $nbdcrypt down scratch.toml");
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn root_refuses_files_that_other_users_may_change() {
    use std::os::unix::fs::{chown, symlink};
    let machine = Machine::new();
    let chmod = |name: &str, mode| fs::set_permissions(machine.path(name), fs::Permissions::from_mode(mode)).unwrap();
    for name in ["scratch.toml", "key"] {
        for mode in [0o666, 0o620, 0o602] {
            chmod(name, mode);
            for verb in ["up", "plan", "provision"] {
                machine.refused(verb, &[name, "is refused", "chmod go-w"]);
            }
        }
        chmod(name, 0o600);
        chown(machine.path(name), Some(65534), None).unwrap();
        machine.refused("up", &[name, "belongs to user 65534", "chown root"]);
        chown(machine.path(name), Some(0), None).unwrap();
    }
    chmod("", 0o777);
    machine.refused("up", &["is refused", "move the file to", "/etc/nbdcrypt"]);
    chmod("", 0o700);
    // A pipe is refused too, and so is a link that another user may change.
    machine.shell("mv key real; mkfifo -m 622 key");
    machine.refused("up", &["key", "is refused", "chmod go-w"]);
    machine.shell("rm key; mkdir -m 777 links; ln -s ../real links/key; ln -s links/key key");
    machine.refused("up", &["links can be changed by others"]);
    machine.shell("rm -r key links; mv real key");
    // A link is judged by its target.
    fs::create_dir(machine.path("theirs")).unwrap();
    chmod("theirs", 0o777);
    fs::rename(machine.path("scratch.toml"), machine.path("theirs/scratch.toml")).unwrap();
    symlink("theirs/scratch.toml", machine.path("scratch.toml")).unwrap();
    machine.refused("up", &["theirs can be changed by others"]);

    fs::remove_file(machine.path("scratch.toml")).unwrap();
    fs::rename(machine.path("theirs/scratch.toml"), machine.path("scratch.toml")).unwrap();
    // The run folder, and the volume's own folder in it.
    fs::create_dir_all(machine.path("run/scratch")).unwrap();
    for folder in ["run", "run/scratch"] {
        for mode in [0o777, 0o775, 0o1777] {
            chmod(folder, mode);
            for verb in ["up", "down", "status"] {
                machine.fails(verb, &["is not safe", folder, "chmod go-w"]);
            }
        }
        chmod(folder, 0o755);
        chown(machine.path(folder), Some(65534), None).unwrap();
        machine.fails("up", &["is not safe", "belongs to user 65534"]);
        chown(machine.path(folder), Some(0), None).unwrap();
        fs::rename(machine.path(folder), machine.path("elsewhere")).unwrap();
        symlink(machine.path("elsewhere"), machine.path(folder)).unwrap();
        for verb in ["up", "down", "status"] {
            machine.fails(verb, &["is not safe", "symbolic link"]);
        }
        fs::remove_file(machine.path(folder)).unwrap();
        fs::rename(machine.path("elsewhere"), machine.path(folder)).unwrap();
    }
    assert!(!machine.path("disk").exists() && !machine.path("mnt").exists());
    machine.assert_nothing_left();
}

/// Other commands fail with an error that says that only root may run them.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs to be root to become someone else: run `make test`")]
fn other_users_may_only_format_and_dump() {
    use std::os::unix::process::CommandExt;
    let machine = Machine::new();
    // The repository may lie anywhere, so everyone must be able to run a program in this folder.
    fs::set_permissions(machine.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(machine.path("key"), fs::Permissions::from_mode(0o644)).unwrap();
    copy_binary(&machine.path("nbdcrypt"));
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

/// The mode of each file or folder would let others write, but they cannot.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and unshare: run `make test`")]
fn what_nobody_else_can_change_is_trusted_wherever_it_lies() {
    let machine = Machine::new();
    let here = machine.folder.path().display().to_string();
    let plan = |script: &str| {
        // This does not use a mount namespace, because one would hold the mounts of tests that run at the same time.
        let script = format!("set -e; cd {here}; trap 'umount -lq open map || true' EXIT; {script}");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", told(&output));
        told(&output)
    };
    let nbdcrypt = format!("{} --run-dir {here}/run", binary().display());
    // A separate filesystem that a container sees read-only: a ConfigMap or an emptyDir.
    let config_map = "mkdir -p map rw; mount -t tmpfs none map; mkdir map/..1; cp -p scratch.toml map/..1/
         ln -s ..1 map/..data; ln -s ..data/scratch.toml map/scratch.toml
         chmod 777 map map/..1; chmod 666 map/..1/scratch.toml";
    let ro = format!("{config_map}; mount -o remount,ro,bind map");
    assert!(plan(&format!("{ro}; {nbdcrypt} plan map/scratch.toml")).contains("mountpoint"));
    let refused = format!("{nbdcrypt} plan map/scratch.toml 2> said && exit 1; cat said");
    assert!(plan(&format!("{config_map}; {refused}")).contains("is refused"));
    // The file's owner may write to it through a mount in another namespace.
    let bobs = format!("{config_map}; chown 1000 map/..1/scratch.toml; mount -o remount,ro,bind map");
    assert!(plan(&format!("{bobs}; {refused}")).contains("belongs to user 1000"));
    // The same filesystem is also mounted writable at another place. In the first case other users can reach this
    // place, in the second they cannot.
    let twice = format!("{config_map}; mkdir -p open; mount --bind map open; mount -o remount,ro,bind map");
    assert!(plan(&format!("{twice}; chmod 711 .; {refused}")).contains("is refused"));
    assert!(plan(&format!("{twice}; chmod 700 .; {nbdcrypt} plan map/scratch.toml")).contains("mountpoint"));
    // The store of NixOS.
    let store =
        "mkdir store; chown 0:12345 store; chmod 1775 store; cp -p scratch.toml store/; chmod 444 store/scratch.toml";
    assert!(plan(&format!("{store}; {nbdcrypt} plan store/scratch.toml")).contains("mountpoint"));
}

/// The system's root user is not in the namespace: `/` and `/tmp` belong to the overflow user there.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs to be root to become someone else, and unshare: run `make test`")]
fn root_of_a_user_namespace_reads_only_its_own_files() {
    use std::os::unix::fs::chown;
    use std::os::unix::process::CommandExt;
    let machine = Machine::new();
    copy_binary(&machine.path("nbdcrypt"));
    for name in ["", "key", "scratch.toml"] {
        chown(machine.path(name), Some(4321), Some(4321)).unwrap();
    }
    let plan = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "./nbdcrypt", "--run-dir", "run", "plan", "scratch.toml"]);
        command.current_dir(machine.folder.path()).uid(4321).gid(4321).output().unwrap()
    };
    let output = plan();
    assert!(output.status.success(), "{}", told(&output));
    for mine in ["key", "scratch.toml"] {
        chown(machine.path(mine), Some(4322), None).unwrap();
        fs::set_permissions(machine.path(mine), fs::Permissions::from_mode(0o644)).unwrap();
        let output = plan();
        assert_eq!(output.status.code(), Some(1), "{mine}: {}", told(&output));
        for words in ["belongs to user 65534", "outside of this user namespace", "cp "] {
            assert!(told(&output).contains(words), "{mine}: {}", told(&output));
        }
        chown(machine.path(mine), Some(4321), None).unwrap();
    }
}
