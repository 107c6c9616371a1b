//! The shortest runs of `nbdcrypt bench device` and `nbdcrypt-bench servers`: their reports are complete, and they leave
//! nothing behind.

use std::path::Path;
use std::process::{Command, Output};

use harness::nbdcrypt::{bench_binary, binary, told};
use serde_json::Value;

/// Runs `program` with images in `folder`. If `path` is given, `program` finds other programs only there.
fn bench(program: &Path, folder: &Path, path: Option<&Path>, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).args(["--size", "64M", "--runtime", "0.1", "--quick", "--json", "--dir"]);
    command.arg(folder).env("TMPDIR", folder);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    command.output().unwrap()
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", told(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn assert_empty(folder: &Path) {
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Checks that every figure of a sample is there and above zero. The CPU time may be zero, because such a short run may
/// take less than a clock tick.
#[track_caller]
fn assert_complete(sample: &Value) {
    for figure in ["mb_per_s", "iops", "p99_us"] {
        assert!(sample[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {sample}");
    }
    assert!(sample["server_cpu_s_per_gb"].is_number(), "{sample}");
}

#[test]
fn the_server_is_measured_without_other_programs() {
    let folder = tempfile::tempdir().unwrap();
    let answer = json(&bench(binary(), folder.path(), Some(folder.path()), &["bench", "device"]));
    let rows = answer["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "{answer:#}");
    rows.iter().for_each(assert_complete);
    for subject in ["encrypted", "plaintext"] {
        assert_eq!(rows.iter().filter(|row| row["subject"] == subject).count(), 4);
    }
    assert_empty(folder.path());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs fio with its nbd engine: run `make test`")]
fn peers_are_compared_and_missing_ones_named() {
    let folder = tempfile::tempdir().unwrap();
    // fio is the only program that can be found.
    let programs = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/fio", programs.path().join("fio")).unwrap();
    let report = tempfile::tempdir().unwrap();
    let arguments = ["servers", "--rounds", "1", "--report", report.path().to_str().unwrap()];
    let answer = json(&bench(bench_binary(), folder.path(), Some(programs.path()), &arguments));
    let reason = |contestant: &str| {
        let missing = answer["missing"].as_array().unwrap().iter().find(|missing| missing["contestant"] == contestant);
        missing.unwrap_or_else(|| panic!("{contestant}: {answer:#}"))["reason"].as_str().unwrap().to_owned()
    };
    for (contestant, program) in [("nbdkit-luks", "nbdkit"), ("qemu-nbd-luks", "qemu-nbd")] {
        assert!(reason(contestant).contains(&format!("{program} is not installed")), "{}", reason(contestant));
    }
    assert!(reason("dm-crypt").contains("kernel"), "{}", reason("dm-crypt"));
    let sections = answer["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 4);
    for results in sections.iter().map(|section| section["results"].as_array().unwrap()) {
        let names: Vec<&str> = results.iter().map(|turns| turns["contestant"].as_str().unwrap()).collect();
        assert_eq!(names, ["nbdcrypt", "nbdcrypt-plaintext", "yardstick", "null"]);
        for median in results.iter().map(|turns| &turns["median"]) {
            assert_complete(median);
            assert!(median["peak_rss_mib"].as_f64().is_some_and(|value| value > 0.0), "{median}");
        }
    }
    for (file, holds) in [("servers.md", "### Bars"), ("large.svg", "</svg>"), ("small.svg", "</svg>")] {
        let content = std::fs::read_to_string(report.path().join(file)).unwrap();
        assert!(content.contains(holds), "{file}: {content}");
    }
    assert_empty(folder.path());
}

#[test]
fn without_fio_the_error_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(bench_binary(), folder.path(), Some(folder.path()), &["servers"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("apt-get install fio"), "{}", told(&output));
    assert_empty(folder.path());
}
