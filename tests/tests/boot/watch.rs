//! What programs that watch a volume see: the exit code of `status`, and what it reports.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use harness::nbdcrypt::told;
use rustix::process::{Signal, kill_process};

use super::machine::{MIB, Machine, unmount, wait_for, write_and_sync};

impl Machine {
    /// Checks the exit code of `status`: of this volume, with and without `--json`, by its name and its configuration, and of
    /// all volumes.
    #[track_caller]
    fn expect_exit_code(&self, code: i32, health: &str) {
        let config = self.path("scratch.toml");
        let config = config.to_str().unwrap();
        for args in [&["status"][..], &["status", "scratch"], &["status", "--json"], &["status", "--json", config]] {
            let output = self.run(args);
            assert_eq!(output.status.code(), Some(code), "{args:?}: {}", told(&output));
        }
        let status = self.status();
        assert_eq!(status["health"].as_str().unwrap_or_default(), health, "{status}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_exit_code_says_whether_a_volume_is_as_it_should_be() {
    let machine = Machine::new();
    machine.expect_exit_code(3, "");
    let said = machine.run(&["status", "scratch"]);
    assert!(String::from_utf8_lossy(&said.stderr).contains("scratch is not up"), "{}", told(&said));
    assert_eq!(machine.run(&["status", "--json", "scratch"]).stdout, b"[]\n");
    assert_eq!(machine.run(&["status", "--no-such-option"]).status.code(), Some(2));

    machine.up();
    machine.expect_exit_code(0, "healthy");
    unmount(machine.path("mnt").to_str().unwrap());
    machine.expect_exit_code(4, "degraded");
    machine.up();
    let server = machine.server();
    kill_process(server, Signal::STOP).unwrap();
    let silent = machine.run(&["status", "scratch"]).status.code();
    kill_process(server, Signal::CONT).unwrap();
    assert_eq!(silent, Some(4));
    machine.expect_exit_code(0, "healthy");

    // The server waits for the user of the filesystem.
    let held = File::open(machine.path("mnt")).unwrap();
    kill_process(server, Signal::TERM).unwrap();
    machine.await_doing("in use by");
    machine.expect_exit_code(3, "not-up");
    drop(held);
    assert!(wait_for(|| machine.status().is_null()));
    machine.expect_exit_code(3, "");

    machine.up();
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| machine.status()["condition"] == "dead"));
    machine.expect_exit_code(4, "degraded");
    machine.down();
    machine.expect_exit_code(3, "");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_volume_that_is_coming_up_is_not_up() {
    let machine = Machine::new();
    let front = machine.up_with_slow_mkfs();
    machine.expect_exit_code(3, "not-up");
    machine.down();
    front.wait_with_output().unwrap();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn status_shows_the_volume_and_its_requests() {
    let machine = Machine::new();
    machine.up();
    write_and_sync(&machine.path("mnt/text"), &[7; 300_000]);
    let status = machine.status();
    assert_eq!((&status["made"], &status["key"]["source"]), (&"volume".into(), &"file".into()), "{status}");
    assert!(status["uptime"].is_u64() && status["key"]["age"].is_u64(), "{status}");
    let path = status["volume"]["cpu-path"].as_str().unwrap().to_owned();
    assert!(["vaes512", "vaes256", "aesni", "portable"].contains(&path.as_str()), "{status}");
    // FUSE has no connections.
    assert!(status["connections"].is_null(), "{status}");
    let requests = &status["requests"];
    assert!(requests["bytes-written"].as_u64().unwrap() >= 300_000, "{status}");
    assert_eq!(status["problems"], serde_json::json!([]));
    for (list, operation) in [("kinds", "write"), ("kinds", "flush"), ("latency", "write"), ("latency", "flush")] {
        let found = requests[list].as_array().unwrap().iter().any(|one| one["operation"] == operation);
        assert!(found, "{list} {operation}: {status}");
    }
    let said = machine.run(&["status", "scratch"]);
    for words in [
        "\n  key:         in the server's memory for ",
        ", from file\n",
        "\n  new:         this start made the volume\n",
        "\n  latency:     write ",
        "\n  uptime:      ",
        &format!("\n  cpu path:    {path}\n"),
    ] {
        assert!(String::from_utf8_lossy(&said.stdout).contains(words), "{words}: {}", told(&said));
    }
    machine.down();
    machine.up();
    assert!(machine.status()["made"].is_null(), "the second start makes nothing: {}", machine.status());
    machine.down();
}

/// The file is cut short while it is served, so that the disk fails reads beyond its new end.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn a_volume_whose_disk_failed_is_degraded() {
    let machine = Machine::new();
    machine.up();
    let device = machine.status()["device"].as_str().unwrap().to_owned();
    machine.expect_exit_code(0, "healthy");
    File::options().write(true).open(machine.path("disk")).unwrap().set_len(24 * MIB).unwrap();
    let at = machine.status()["volume"]["size"].as_u64().unwrap() - 4096;
    File::open(device).unwrap().read_exact_at(&mut [0; 4096], at).unwrap_err();
    machine.expect_exit_code(4, "degraded");
    let status = machine.status();
    assert_eq!(status["condition"], "up");
    let errors = status["requests"]["errors"].as_array().unwrap();
    let of_disk =
        |one: &&serde_json::Value| one["operation"] == "read" && one["error"] == "EIO" && one["blame"] == "disk";
    assert!(errors.iter().find(of_disk).is_some_and(|one| one["count"].as_u64() > Some(0)), "{status}");
    let said = machine.run(&["status", "scratch"]);
    for words in ["problem:     the disk failed a request", "errors:      read EIO: "] {
        assert!(told(&said).contains(words), "{words}: {}", told(&said));
    }
    // The disk is as long as before, but nobody knows what else is wrong with it.
    File::options().write(true).open(machine.path("disk")).unwrap().set_len(32 * MIB).unwrap();
    machine.expect_exit_code(4, "degraded");
    machine.down();
    assert!(fs::metadata(machine.path("disk")).unwrap().len() == 32 * MIB);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and curl: run `make test`")]
fn metrics_show_whether_a_volume_is_as_it_should_be() {
    let machine = Machine::new();
    let socket = machine.path("run/scratch.metrics");
    let with = |listen: &str| {
        machine.configure(&format!("{}\n[metrics]\nlisten = \"{listen}\"\n", machine.default_config()));
    };
    let expect = |lines: &[&str]| {
        let curl = "curl --silent --show-error --unix-socket run/scratch.metrics http://localhost/metrics";
        let text = machine.shell(curl);
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "`{line}` is missing:\n{text}");
        }
        text
    };
    with(&format!("unix:{}", socket.display()));
    machine.up();
    let text = expect(&["nbdcrypt_up{volume=\"scratch\"} 1", "nbdcrypt_degraded{volume=\"scratch\"} 0"]);
    for found in ["nbdcrypt_key_age_seconds{volume=\"scratch\"} ", "key_source=\"file\"", "method=\"fuse\""] {
        assert!(text.contains(found), "{found}: {text}");
    }
    unmount(machine.path("mnt").to_str().unwrap());
    expect(&["nbdcrypt_up{volume=\"scratch\"} 0", "nbdcrypt_degraded{volume=\"scratch\"} 1"]);
    machine.down();
    assert!(!socket.exists());

    // The socket of a server that was killed is removed with everything else.
    machine.up();
    kill_process(machine.server(), Signal::KILL).unwrap();
    assert!(wait_for(|| UnixStream::connect(&socket).is_err() && machine.status()["condition"] == "dead"));
    assert!(socket.exists());
    machine.down();
    assert!(!socket.exists());

    // A volume comes up without its metrics, too.
    fs::write(&socket, "not a socket").unwrap();
    let output = machine.on_config("up");
    assert!(output.status.success(), "{}", told(&output));
    assert!(told(&output).contains("the metrics are not served: "), "{}", told(&output));
    machine.down();
    fs::remove_file(&socket).unwrap();
    with("0.0.0.0:9105");
    machine.fails("up", &["use a loopback address such as 127.0.0.1:9105", "scratch.toml:15:10"]);
    machine.assert_nothing_left();
}
