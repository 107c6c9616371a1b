//! Stopping a server, and cancelling a start.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};

use harness::nbdcrypt::told;
use rustix::process::{Pid, Signal, kill_process};

use super::machine::{Machine, mkfs_on, system, wait_for};

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_foreground_server_runs_until_it_is_stopped() {
    let machine = Machine::new();
    let config = machine.path("scratch.toml");
    let mut server: Child =
        machine.command(&["up", "--foreground", config.to_str().unwrap()]).stdout(Stdio::piped()).spawn().unwrap();
    assert!(wait_for(|| machine.path("mnt/lost+found").exists()));
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    machine.assert_nothing_left();
}

/// systemd's side of sd_notify(3), with the messages so far.
struct ServiceManager {
    socket: std::os::unix::net::UnixDatagram,
    messages: std::cell::RefCell<String>,
}

impl ServiceManager {
    fn new(path: &Path) -> Self {
        let socket = std::os::unix::net::UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, messages: std::cell::RefCell::default() }
    }

    fn was_told(&self, words: &str) -> bool {
        let mut message = [0; 4096];
        while let Ok(len) = self.socket.recv(&mut message) {
            let mut messages = self.messages.borrow_mut();
            messages.push_str(&String::from_utf8_lossy(&message[..len]));
            messages.push('\n');
        }
        self.messages.borrow().contains(words)
    }

    fn was_told_after(&self, first: &str, then: &str) -> bool {
        self.was_told(first) && self.messages.borrow().split(first).nth(1).is_some_and(|rest| rest.contains(then))
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_stop_waits_for_users_of_the_filesystem() {
    let machine = Machine::new();
    let manager = ServiceManager::new(&machine.path("notify"));
    let config = machine.path("scratch.toml");
    let mut server = machine
        .command(&["up", "--foreground", config.to_str().unwrap()])
        .env("NOTIFY_SOCKET", machine.path("notify"))
        .stdout(Stdio::null())
        .stderr(File::create(machine.path("said")).unwrap())
        .spawn()
        .unwrap();
    assert!(wait_for(|| manager.was_told("READY=1")));
    assert!(
        manager.was_told("STATUS=making the ext4 filesystem on /dev/loop") && manager.was_told("EXTEND_TIMEOUT_USEC=")
    );
    let mut held = File::create(machine.path("mnt/held")).unwrap();
    let us = format!("({})", std::process::id());
    for _ in 0..2 {
        held.write_all(&[7; 100_000]).unwrap();
        kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
        assert!(wait_for(|| manager.was_told("STOPPING=1") && manager.was_told(&us)));
        assert!(wait_for(|| manager.was_told_after("STOPPING=1", "EXTEND_TIMEOUT_USEC=")));
        let status = machine.await_doing(&us);
        assert_eq!(status["condition"], "going-down");
    }
    let output = machine.on_config("down");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains(&us) && told(&output).contains("keeps trying"), "{}", told(&output));
    let output = machine.on_config("up");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("going down"), "{}", told(&output));
    assert!(server.try_wait().unwrap().is_none(), "the server ended while the filesystem was in use");
    held.write_all(b"the last words").unwrap();
    drop(held);
    assert!(server.wait().unwrap().success());
    let said = fs::read_to_string(machine.path("said")).unwrap();
    assert_eq!(said.matches("asked to stop, but has to wait").count(), 1, "{said}");
    machine.assert_nothing_left();
    machine.up();
    assert!(fs::read(machine.path("mnt/held")).unwrap().ends_with(b"the last words"));
    machine.down();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_stop_ends_when_the_user_unmounts() {
    let machine = Machine::new();
    machine.up();
    let server = machine.server();
    let held = File::create(machine.path("mnt/held")).unwrap();
    kill_process(server, Signal::TERM).unwrap();
    machine.await_doing("in use by");
    system("umount", &["-l", machine.path("mnt").to_str().unwrap()]);
    // The filesystem stays in the kernel as long as its last file is open.
    assert!(machine.status()["mountpoint"].is_null());
    drop(held);
    assert!(wait_for(|| machine.status().is_null()));
    machine.assert_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_start_can_be_cancelled_while_mkfs_runs() {
    for how in ["down", "SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] {
        let machine = Machine::new();
        let front = machine.up_with_slow_mkfs();
        let device = machine.status()["device"].as_str().unwrap().to_owned();
        let signal = match how {
            "SIGINT" => Some(Signal::INT),
            "SIGTERM" => Some(Signal::TERM),
            "SIGHUP" => Some(Signal::HUP),
            "SIGKILL" => Some(Signal::KILL),
            _ => None,
        };
        match signal {
            Some(signal) => kill_process(Pid::from_child(&front), signal).unwrap(),
            None => assert!(machine.down().contains("the start was called off, and everything was undone")),
        }
        let output = front.wait_with_output().unwrap();
        if how == "SIGKILL" {
            // The background server notices the signal.
            assert!(wait_for(|| machine.run(&["status", "scratch"]).status.code() == Some(3)));
        } else {
            assert_eq!(output.status.code(), Some(1), "{how}: {}", told(&output));
            let word = if how == "down" { "called off by `nbdcrypt down`" } else { how };
            assert!(
                told(&output).contains(word) && told(&output).contains("everything was undone"),
                "{}",
                told(&output)
            );
        }
        machine.assert_nothing_left();
        assert_eq!(mkfs_on(&device), [""; 0], "{how}");
        assert!(!machine.path("disk").exists() && !machine.path("mnt").exists(), "{how}");
    }
}

/// In a mount namespace of its own, `mount` is a program that hangs. The new namespace has a copy of every mount. So the
/// script first unmounts the copies of other tests' filesystems, because a copy keeps their devices in use.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_start_can_be_cancelled_while_mount_hangs() {
    let machine = Machine::new();
    machine.shell(
        r#"cat > script <<'END'
            set -eu
            awk -v own="$PWD" '$5 ~ "^/(tmp|run|dev/shm)/.*" && index($5, own) != 1 { print $5 }' /proc/self/mountinfo |
                tac | while read -r copy; do umount -l "$copy" || true; done
            printf '#!/bin/sh
exec sleep 3600
' > hangs; chmod +x hangs
            mount --bind hangs "$(command -v mount)"
            $nbdcrypt up scratch.toml > said 2>&1 & front=$!
            # The step before is done, so that only mount is left.
            for _ in $(seq 200); do $nbdcrypt status 2> /dev/null | grep -q 'step `header` is done' && break; sleep 0.1; done
            timeout 60 $nbdcrypt down scratch | grep 'the start was called off'
            if wait $front; then exit 9; fi
            grep 'called off by `nbdcrypt down`' said
END
        unshare --mount --propagation private bash script"#,
    );
    machine.assert_nothing_left();
}

/// No server listens at the endpoint, so nbdcrypt asks for the secret again and again.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn a_start_that_waits_for_its_secret_can_be_cancelled() {
    let machine = Machine::new();
    let config = machine.default_config();
    let key = config.find("[key]").unwrap()..config.find("[filesystem]").unwrap();
    let aws = "[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\nregion = \"eu-central-1\"\n\
               endpoint-url = \"http://127.0.0.1:1\"\n\n";
    machine.configure(&config.replace(&config[key], aws));
    for by_down in [true, false] {
        let path = machine.path("scratch.toml");
        let front = machine
            .command(&["up", path.to_str().unwrap()])
            .envs([("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "key")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        machine.await_doing("getting the secret");
        // Another `up` reports this and does not wait.
        let output = machine.on_config("up");
        assert_eq!(output.status.code(), Some(1));
        assert!(told(&output).contains("is bringing") && told(&output).contains("secret"), "{}", told(&output));
        if by_down {
            assert!(machine.down().contains("the start was called off"));
        } else {
            kill_process(Pid::from_child(&front), Signal::INT).unwrap();
        }
        let output = front.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        assert!(told(&output).contains("everything was undone"), "{}", told(&output));
        machine.assert_nothing_left();
        assert!(!machine.path("disk").exists());
    }
}
