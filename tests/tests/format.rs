//! The options of `nbdcrypt format`, checked with cryptsetup on the disk that results.

use std::process::{Command, Output};

use harness::luks::{PASSPHRASE, Workbench, store, unlock};
use harness::nbdcrypt::{binary, told};

fn format(bench: &Workbench, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(["format", "--key-file", "key"]).args(arguments).current_dir(bench.path(".")).output().unwrap()
}

#[track_caller]
fn formatted(bench: &Workbench, arguments: &[&str]) -> String {
    let output = format(bench, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", told(&output));
    let disk = arguments.last().unwrap();
    bench.run("cryptsetup", ["open", "--test-passphrase", "--key-file", "key", disk]);
    bench.run("cryptsetup", ["luksDump", disk])
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn the_options_are_applied_on_the_disk() {
    let bench = Workbench::new();
    let uuid = "b0a5a5a5-0001-4002-8003-00000000c0de";
    let all = [
        ["--size", "40M"],
        ["--pbkdf", "argon2i"],
        ["--pbkdf-memory", "2048"],
        ["--pbkdf-parallel", "2"],
        ["--pbkdf-force-iterations", "5"],
        ["--hash", "sha512"],
        ["--key-size", "256"],
        ["--sector-size", "2048"],
        ["--label", "a label"],
        ["--subsystem", "a subsystem"],
        ["--uuid", uuid],
        ["--luks2-metadata-size", "64K"],
        ["--luks2-keyslots-size", "4M"],
        ["--offset", "20480"],
    ];
    let dump = formatted(&bench, &[&all.concat()[..], &["disk"]].concat());
    for line in [
        "Metadata area: \t65536 [bytes]",
        "Keyslots area: \t4194304 [bytes]",
        &format!("UUID:          \t{uuid}"),
        "Label:         \ta label",
        "Subsystem:     \ta subsystem",
        "\toffset: 10485760 [bytes]",
        "\tsector: 2048 [bytes]",
        "\tKey:        256 bits",
        "\tPBKDF:      argon2i",
        "\tTime cost:  5",
        "\tMemory:     2048",
        "\tThreads:    2",
        "\tAF hash:    sha512",
    ] {
        assert!(dump.lines().any(|found| found == line), "{line:?} in {dump}");
    }
}

/// Argon2id takes at most half of the machine's memory.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn the_defaults_are_luks2_large_sectors_and_argon2id() {
    let bench = Workbench::new();
    let dump = formatted(&bench, &["--size", "32M", "--iter-time", "50", "disk"]);
    for line in ["Version:       \t2", "\tsector: 4096 [bytes]", "\tPBKDF:      argon2id", "\tKey:        512 bits"] {
        assert!(dump.lines().any(|found| found == line), "{line:?} in {dump}");
    }
    let memory: u64 = dump.lines().find_map(|line| line.strip_prefix("\tMemory:     ")).unwrap().parse().unwrap();
    assert!((32 << 10..=1 << 20).contains(&memory), "{memory}");
    let most = bootstrap::machine::memory::argon2_ceiling_kib();
    let half = format(&bench, &["--wipe", "--pbkdf-memory", "4194304", "--iter-time", "1", "disk"]);
    assert!(half.status.success(), "{}", told(&half));
    assert!(u64::from(most) * 2 <= bootstrap::machine::memory::limit_kib() + 1);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn argon2_takes_as_little_memory_as_requested() {
    let bench = Workbench::new();
    let little = ["--pbkdf-memory", "512", "--pbkdf-parallel", "1", "--iter-time", "500"];
    let is_little = |dump: &str| {
        let number = |name: &str| -> u32 {
            dump.lines().find_map(|line| line.strip_prefix(&format!("\t{name}"))).unwrap().trim().parse().unwrap()
        };
        assert_eq!(number("Memory:"), 512, "{dump}");
        // The number of passes depends on this machine's load. `kdf_args` has a test with a clock of its own.
        assert!(number("Time cost:") >= 4, "{dump}");
        assert!(unlock(&bench.path("disk"), PASSPHRASE).is_ok());
    };
    is_little(&formatted(&bench, &[&["--size", "32M"], &little[..], &["disk"]].concat()));
    bench.run("cryptsetup", [&["luksFormat", "-q", "--key-file", "key"], &little[..], &["disk"]].concat());
    is_little(&bench.run("cryptsetup", ["luksDump", "disk"]));
}

const MIB: u64 = 1 << 20;

/// The error says what was found, and where.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs mkfs.ext4 and cryptsetup: run `make test`")]
fn a_disk_with_data_behind_a_blank_start_is_refused() {
    let bench = Workbench::new();
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let refused = |words: &[&str]| {
        let before = std::fs::read(bench.path("disk")).unwrap();
        let output = format(&bench, &[&quick[..], &["disk"]].concat());
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        for words in words.iter().chain(&["not blank", "nbdcrypt format --wipe disk"]) {
            assert!(told(&output).contains(words), "{words}: {}", told(&output));
        }
        assert!(std::fs::read(bench.path("disk")).unwrap() == before, "the disk was changed");
    };
    // Partitions whose table was wiped: at sector 2048, at sector 63, and at a place where the second partition often
    // begins.
    for (offset, words) in [
        (MIB, "ext4 filesystem beginning at byte 1048576 (1 MiB)"),
        (63 * 512, "ext4 filesystem beginning at byte 32256 (31.5 KiB)"),
        (129 * MIB, "ext4 filesystem beginning at byte 135266304 (129 MiB)"),
    ] {
        bench.disk("disk", 300 * MIB);
        bench.run("mkfs.ext4", ["-qF", "-E", &format!("offset={offset}"), "disk", "64M"]);
        store(&bench.path("disk")).write_at(&vec![0; usize::try_from(offset).unwrap()], 0).unwrap();
        refused(&[words]);
    }
    // A disk whose first half was wiped, as a sparse file and as a file without holes.
    for has_holes in [true, false] {
        let disk = store(&bench.disk("disk", 160 * MIB));
        if !has_holes {
            (0..80).for_each(|mib| disk.write_at(&[0; 1 << 20], mib * MIB).unwrap());
        }
        disk.write_at(&vec![0xa7; 40 << 20], 80 * MIB).unwrap();
        refused(&["byte 83886080, at 80 MiB, is not zero"]);
    }
    // Written zeros are as blank as holes.
    let disk = store(&bench.disk("disk", 100 * MIB));
    (0..100).for_each(|mib| disk.write_at(&[0; 1 << 20], mib * MIB).unwrap());
    formatted(&bench, &[&quick[..], &["disk"]].concat());
    // If the header is detached, the data's disk must be blank and so must the header's file.
    let far = store(&bench.disk("disk", 64 * MIB));
    far.write_at(b"a diary", 40 * MIB).unwrap();
    let output = format(&bench, &[&quick[..], &["--header", "header", "disk"]].concat());
    assert!(told(&output).contains("disk is not blank") && !bench.path("header").exists(), "{}", told(&output));
    bench.disk("disk", 64 * MIB);
    let header = store(&bench.disk("header", 16 * MIB));
    header.write_at(b"a diary", 9 * MIB).unwrap();
    let output = format(&bench, &[&quick[..], &["--header", "header", "disk"]].concat());
    assert!(told(&output).contains("header is not blank"), "{}", told(&output));
    // --wipe destroys the old content.
    formatted(&bench, &[&quick[..], &["--wipe", "disk"]].concat());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_blank_sparse_file_of_100_gib_is_formatted() {
    let bench = Workbench::new();
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    bench.disk("disk", 100 << 30);
    formatted(&bench, &[&quick[..], &["disk"]].concat());
    // With one byte anywhere, the disk is not blank.
    store(&bench.disk("disk", 100 << 30)).write_at(b"x", 77_777_777_777).unwrap();
    let output = format(&bench, &[&quick[..], &["disk"]].concat());
    assert!(told(&output).contains("byte 77777777777, at 72.4 GiB"), "{}", told(&output));
}

#[test]
fn impossible_options_are_refused_and_leave_no_file() {
    let bench = Workbench::new();
    for (arguments, words) in [
        (&["--type", "luks1", "--label", "x"][..], "LUKS1 has no --label"),
        (&["--type", "luks1", "--pbkdf", "argon2id"], "LUKS1 has no key derivation other than pbkdf2"),
        (&["--type", "luks1", "--offset", "8"], "at least 2068480"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "10"], "1000 to 100000000 iterations, not 10"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "100000001"], "iterations, not 100000001"),
        (&["--pbkdf-force-iterations", "10000"], "Argon2 needs 4 to "),
        (&["--pbkdf-force-iterations", "3", "--pbkdf-memory", "64"], "64 KiB of memory, not 3"),
        (&["--pbkdf-memory", "32", "--pbkdf-parallel", "5"], "32 KiB of memory are too little for 5 lanes"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-memory", "64"], "for Argon2 only"),
        (&["--pbkdf-force-iterations", "4", "--luks2-metadata-size", "20K"], "metadata size of 20480"),
        (&["--pbkdf-force-iterations", "4", "--offset", "9"], "multiple of 4096"),
        (
            &[
                "--pbkdf-force-iterations",
                "4",
                "--label",
                "a label that is longer than forty-seven bytes, which is too much",
            ],
            "47",
        ),
    ] {
        let all = [&["--size", "32M", "--header", "header"], arguments, &["disk"]].concat();
        let output = format(&bench, &all);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", told(&output));
        assert!(told(&output).contains(words), "{arguments:?}: {}", told(&output));
        assert!(!bench.path("disk").exists() && !bench.path("header").exists(), "{arguments:?}");
    }
    let odd = format(&bench, &["--hash", "md5", "disk"]);
    assert_eq!(odd.status.code(), Some(2), "{}", told(&odd));
}

/// Starts a `format` that takes half a minute or more, and waits until it has made its files.
fn slow_format(bench: &Workbench) -> std::process::Child {
    let child = harness::nbdcrypt::interruptible()
        .args(["format", "--key-file", "key", "--size", "32M", "--header", "header", "--pbkdf", "pbkdf2"])
        // The highest number that is allowed. It takes half a minute or more on any machine.
        .args(["--pbkdf-force-iterations", "100000000", "disk"])
        .current_dir(bench.path("."))
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let start = std::time::Instant::now();
    while !bench.path("header").exists() {
        assert!(start.elapsed() < std::time::Duration::from_secs(60), "no file was made");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    child
}

#[test]
fn an_interrupted_format_removes_the_files_that_it_made() {
    use rustix::process::{Pid, Signal, kill_process};
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let bench = Workbench::new();
        let child = slow_format(&bench);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", told(&output));
        assert!(told(&output).contains("interrupted; disk was removed again"), "{}", told(&output));
        assert!(!bench.path("disk").exists() && !bench.path("header").exists());
    }
}

#[test]
fn a_killed_format_can_be_repeated() {
    let bench = Workbench::new();
    let mut child = slow_format(&bench);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(bench.path("disk").metadata().unwrap().len(), 32 << 20);
    let again =
        ["--size", "32M", "--header", "header", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "disk"];
    // The file has another size, so it is not the file that the killed run made.
    let other = format(&bench, &[&["--size", "64M"], &again[2..]].concat());
    assert!(told(&other).contains("disk exists already"), "{}", told(&other));
    let output = format(&bench, &again);
    assert!(output.status.success(), "{}", told(&output));
    // The same command never formats a disk that holds something.
    let twice = format(&bench, &["--size", "32M", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "header"]);
    assert_eq!(twice.status.code(), Some(1), "{}", told(&twice));
}

#[test]
fn no_file_is_made_in_dev() {
    let bench = Workbench::new();
    let output = format(&bench, &["--size", "32M", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "disk"]);
    assert!(output.status.success(), "{}", told(&output));
    let missing = "/dev/nbdcrypt-no-such-disk";
    for arguments in [
        &["format", "--key-file", "key", "--size", "32M", missing][..],
        &["format", "--key-file", "key", "--size", "32M", "--header", missing, "other"],
        &["header", "backup", "disk", missing],
        &["header", "backup", "disk", "/proc/self/backup"],
    ] {
        let output = Command::new(binary()).args(arguments).current_dir(bench.path(".")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", told(&output));
        assert!(told(&output).contains("no file is made there"), "{arguments:?}: {}", told(&output));
        assert!(!std::path::Path::new(missing).exists() && !bench.path("other").exists(), "{arguments:?}");
    }
    // A file in memory is made, and the program says so.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let backup = folder.path().join("backup");
    let output =
        Command::new(binary()).args(["header", "backup"]).arg(bench.path("disk")).arg(&backup).output().unwrap();
    assert!(output.status.success() && backup.exists(), "{}", told(&output));
    assert!(told(&output).contains("is made in memory (tmpfs)"), "{}", told(&output));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_header_that_needs_much_memory_must_be_allowed() {
    let bench = Workbench::new();
    let dump = formatted(&bench, &["--size", "32M", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "8192", "disk"]);
    assert!(dump.contains("Memory:     8192"));
    let test = |limit: &str| {
        let arguments = ["key", "test", "--key-file", "key", "--max-kdf-memory", limit, "disk"];
        let output = Command::new(binary()).args(arguments).current_dir(bench.path(".")).output().unwrap();
        told(&output)
    };
    let refused = test("4M");
    assert!(
        refused.contains("keyslots.0.kdf.memory of 8192 KiB (8 MiB), but the limit is 4096 KiB (4 MiB)"),
        "{refused}"
    );
    let opened = test("8M");
    assert!(opened.contains("opens keyslot 0"), "{opened}");
}
