//! `nbdcrypt-bench servers` on a kernel with dm-crypt and network block devices: it measures them and leaves none behind.

use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::{bench_binary, binary};
use serde_json::Value;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and fio: run `make test`")]
fn the_kernels_own_devices_are_measured_too() {
    let kernel = Kernel::new().patient(Duration::from_secs(600));
    // Only the kernel's own devices take part as peers, because no other peer's program can be found.
    let script = format!(
        r#"
        modprobe -a nbd loop dm-crypt
        mkdir programs images
        for program in fio cryptsetup; do ln -s "$(command -v $program)" programs; done
        PATH=$PWD/programs {} servers --quick --rounds 1 --runtime 0.2 --size 64M --dir /dev/shm --json --report report > answer
        echo loops: $(losetup --list --noheadings | wc -l)
        echo mappings: $(ls /dev/mapper | grep -vx control | wc -l)
        echo attached: $(ls /sys/block/nbd*/pid 2> /dev/null | wc -l)
        echo left: $(ls /dev/shm /tmp | grep -c nbdcrypt-bench)
        "#,
        bench_binary().display()
    );
    let output = kernel.expect(&script);
    assert_eq!(output, "loops: 0\nmappings: 0\nattached: 0\nleft: 0\n");
    let answer: Value = serde_json::from_slice(&std::fs::read(kernel.dir().join("answer")).unwrap()).unwrap();
    let sections = answer["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 4, "{answer:#}");
    for section in sections {
        let median = |contestant: &str| {
            let results = section["results"].as_array().unwrap();
            let turns = results.iter().find(|turns| turns["contestant"] == contestant);
            turns.unwrap_or_else(|| panic!("no {contestant}: {answer:#}"))["median"].clone()
        };
        for contestant in ["nbdcrypt", "dm-crypt", "attached-nbd"] {
            let sample = median(contestant);
            for figure in ["mb_per_s", "iops", "p99_us"] {
                assert!(sample[figure].as_f64().is_some_and(|value| value > 0.0), "{contestant}, {figure}: {sample}");
            }
        }
        // The CPU time of the kernel's threads belongs to no process. This server's CPU time belongs to its process.
        assert!(median("dm-crypt")["server_cpu_s_per_gb"].is_null());
        assert!(median("attached-nbd")["server_cpu_s_per_gb"].is_number());
    }
    let report = std::fs::read_to_string(kernel.dir().join("report/servers.md")).unwrap();
    for row in [
        "| dm-crypt |",
        "| nbdcrypt on /dev/nbd |",
        "cryptsetup open",
        "--filename=DEVICE",
        "block device with direct I/O: dm-crypt, nbdcrypt on /dev/nbd",
        "threads of the kernel",
        "- cryptsetup: cryptsetup 2",
    ] {
        assert!(report.contains(row), "{row}: {report}");
    }
}

/// Runs a bench as a terminal's foreground job, in a session and a process group of its own.
const FUNCTIONS: &str = r#"
modprobe -a nbd loop dm-crypt
mkdir programs
for program in fio cryptsetup; do ln -s "$(command -v $program)" programs; done
begin() {
  PATH=$PWD/programs:$PATH setsid $bench_program servers --rounds 1 --runtime 1 --size 64M --dir /dev/shm > /dev/null & bench=$!
}
until_seen() { for _ in $(seq 1200); do if "$@" > /dev/null 2>&1; then return; fi; sleep 0.05; done; echo "never: $*"; exit 1; }
attached() { ls /sys/block/nbd*/pid; }
left() {
  echo "$1: $(attached 2> /dev/null | wc -l) attached, $(ls /dev/mapper | grep -vcx control) mapped," \
    "$(losetup --list --noheadings | wc -l) loops, $(ls /dev/shm /tmp | grep -c nbdcrypt-bench) left"
}
# The output of the bench is not part of the test.
ended() { if wait $bench; then echo "$1: it succeeded"; exit 1; fi 2> /dev/null; left "$1"; }
"#;

/// Runs the steps. Each must leave nothing behind.
fn expect_nothing_left(steps: &str, names: &[&str]) {
    let kernel = Kernel::new().patient(Duration::from_secs(600));
    let script = format!(
        "exec 2> said\nnbdcrypt={}\nbench_program={}\n{FUNCTIONS}{steps}",
        binary().display(),
        bench_binary().display()
    );
    let finished = kernel.run(&script);
    let said = std::fs::read_to_string(kernel.dir().join("said")).unwrap_or_default();
    let clean: String = names.iter().map(|name| format!("{name}: 0 attached, 0 mapped, 0 loops, 0 left\n")).collect();
    assert_eq!((finished.code, finished.output.as_str()), (Some(0), clean.as_str()), "{said}\n{}", finished.console);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and fio: run `make test`")]
fn no_mapping_is_left_after_a_signal_or_a_failure() {
    let steps = r#"
        real=$(readlink programs/cryptsetup); rm programs/cryptsetup
        # The program has mapped the volume and has not ended yet.
        printf '#!/bin/bash\n%s "$@" || exit\nif [ "$1" = open ]; then touch %s; sleep 2; fi\n' "$real" "$PWD/opened" > programs/cryptsetup
        chmod +x programs/cryptsetup
        begin; until_seen test -e opened
        ls /dev/mapper/nbdcrypt-bench-* > /dev/null; kill -HUP -- -$bench; ended "mapping, hangup"
        printf '#!/bin/bash\n%s "$@" || exit\ntest "$1" != open\n' "$real" > programs/cryptsetup
        begin; until_seen pgrep fio
        kill -TERM $bench; ended "mapped, failed"
    "#;
    expect_nothing_left(steps, &["mapping, hangup", "mapped, failed"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux: run `make test`")]
fn each_signal_detaches_the_device() {
    let steps = r#"
        printf ThisIs-a-SecretPassword > key; chmod 600 key
        truncate -s 64M disk
        $nbdcrypt format --type luks1 --pbkdf-force-iterations 1000 --key-file key disk > /dev/null
        for signal in HUP INT TERM; do
          $bench_program attached --key-file key disk > device & bench=$!
          until_seen test -s device; attached > /dev/null
          kill -$signal $bench; wait $bench
          left "$signal"
        done
    "#;
    expect_nothing_left(steps, &["HUP", "INT", "TERM"]);
}
