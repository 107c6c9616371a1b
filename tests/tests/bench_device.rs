//! `nbdcrypt bench device` and `bench compare`, as short as they can be: what they say is whole, and nothing is left behind.

use std::path::Path;
use std::process::{Command, Output};

use harness::nbdcrypt::{binary, told};
use serde_json::Value;

/// Runs `bench` with images in `folder`, finding programs in `path` alone if it is given.
fn bench(folder: &Path, path: Option<&Path>, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.arg("bench").args(arguments).args(["--size", "64M", "--runtime", "0.1", "--quick", "--json", "--dir"]);
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
fn is_empty(folder: &Path) {
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Every figure of a sample is there and above zero, but CPU time, which in so short a run may be no whole tick.
#[track_caller]
fn is_whole(sample: &Value) {
    for figure in ["mb_per_s", "iops", "p99_us", "peak_rss_mib"] {
        assert!(sample[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {sample}");
    }
    assert!(sample["server_cpu_s_per_gb"].is_number(), "{sample}");
}

#[test]
fn the_lean_client_measures_the_server_encrypted_and_plain() {
    let folder = tempfile::tempdir().unwrap();
    let answer = json(&bench(folder.path(), None, &["device", "--client", "lean"]));
    let rows = answer["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "{answer:#}");
    rows.iter().for_each(is_whole);
    for contestant in ["nbdcrypt", "nbdcrypt-plaintext"] {
        assert_eq!(rows.iter().filter(|row| row["contestant"] == contestant).count(), 4);
    }
    is_empty(folder.path());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs fio with its nbd engine: run `make test`")]
fn fio_measures_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let answer = json(&bench(folder.path(), None, &["device"]));
    let rows = answer["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "{answer:#}");
    rows.iter().for_each(is_whole);
    is_empty(folder.path());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs fio with its nbd engine: run `make test`")]
fn peers_are_compared_and_the_missing_are_named() {
    let folder = tempfile::tempdir().unwrap();
    // Of all programs, fio alone is to be found.
    let programs = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/fio", programs.path().join("fio")).unwrap();
    let report = tempfile::tempdir().unwrap();
    let arguments = ["compare", "--rounds", "1", "--report", report.path().to_str().unwrap()];
    let answer = json(&bench(folder.path(), Some(programs.path()), &arguments));
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
        results.iter().for_each(|turns| is_whole(&turns["median"]));
    }
    for (file, holds) in [("compare.md", "### Bars"), ("large.svg", "</svg>"), ("small.svg", "</svg>")] {
        let content = std::fs::read_to_string(report.path().join(file)).unwrap();
        assert!(content.contains(holds), "{file}: {content}");
    }
    is_empty(folder.path());
}

#[test]
fn without_fio_it_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let output = bench(folder.path(), Some(folder.path()), &["device"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("apt-get install fio"), "{}", told(&output));
    is_empty(folder.path());
}
