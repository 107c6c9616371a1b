//! What `nbdcrypt format` is told, as cryptsetup sees it on the disk.

use std::process::{Command, Output};

use harness::luks::{PASSPHRASE, Workbench, unlock};
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
fn what_is_asked_for_is_on_the_disk() {
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

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn unasked_it_is_luks2_with_large_sectors_and_argon2id_and_half_the_memory_at_most() {
    let bench = Workbench::new();
    let dump = formatted(&bench, &["--size", "32M", "--iter-time", "50", "disk"]);
    for line in ["Version:       \t2", "\tsector: 4096 [bytes]", "\tPBKDF:      argon2id", "\tKey:        512 bits"] {
        assert!(dump.lines().any(|found| found == line), "{line:?} in {dump}");
    }
    let memory: u64 = dump.lines().find_map(|line| line.strip_prefix("\tMemory:     ")).unwrap().parse().unwrap();
    assert!((32 << 10..=1 << 20).contains(&memory), "{memory}");
    let most = bootstrap::memory::argon2_ceiling_kib();
    let half = format(&bench, &["--wipe", "--pbkdf-memory", "4194304", "--iter-time", "1", "disk"]);
    assert!(half.status.success(), "{}", told(&half));
    assert!(u64::from(most) * 2 <= bootstrap::memory::limit_kib() + 1);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn argon2_takes_as_little_memory_as_asked_for_and_as_many_passes_as_the_time_allows() {
    let bench = Workbench::new();
    let little = ["--pbkdf-memory", "512", "--pbkdf-parallel", "1", "--iter-time", "500"];
    let is_little = |dump: &str| {
        let number = |name: &str| -> u32 {
            dump.lines().find_map(|line| line.strip_prefix(&format!("\t{name}"))).unwrap().trim().parse().unwrap()
        };
        assert_eq!(number("Memory:"), 512, "{dump}");
        // More than over the most memory: over so little, they take no longer.
        assert!(number("Time cost:") > 100, "{dump}");
        assert!(unlock(&bench.path("disk"), PASSPHRASE).is_ok());
    };
    is_little(&formatted(&bench, &[&["--size", "32M"], &little[..], &["disk"]].concat()));
    bench.run("cryptsetup", [&["luksFormat", "-q", "--key-file", "key"], &little[..], &["disk"]].concat());
    is_little(&bench.run("cryptsetup", ["luksDump", "disk"]));
}

#[test]
fn what_cannot_be_is_refused_by_name_and_leaves_no_file() {
    let bench = Workbench::new();
    for (arguments, words) in [
        (&["--type", "luks1", "--label", "x"][..], "LUKS1 has no --label"),
        (&["--type", "luks1", "--pbkdf", "argon2id"], "LUKS1 has no other key derivation"),
        (&["--type", "luks1", "--offset", "8"], "at least 2068480"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "10"], "1000 to 100000000 iterations, not 10"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "100000001"], "iterations, not 100000001"),
        (&["--pbkdf-force-iterations", "10000"], "Argon2 makes 4 to "),
        (&["--pbkdf-force-iterations", "3", "--pbkdf-memory", "64"], "64 KiB, not 3"),
        (&["--pbkdf-memory", "32", "--pbkdf-parallel", "5"], "5 lanes and 32 KiB"),
        (&["--pbkdf", "pbkdf2", "--pbkdf-memory", "64"], "Argon2's"),
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

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_header_that_asks_for_much_is_opened_by_who_allows_it() {
    let bench = Workbench::new();
    let dump = formatted(&bench, &["--size", "32M", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "8192", "disk"]);
    assert!(dump.contains("Memory:     8192"));
    let serve = |limit: &str| {
        let arguments =
            ["serve", "--key-file", "key", "--socket", "/nowhere/socket", "--max-kdf-memory", limit, "disk"];
        let output = Command::new(binary()).args(arguments).current_dir(bench.path(".")).output().unwrap();
        told(&output)
    };
    let refused = serve("4M");
    assert!(refused.contains("keyslots.0.kdf.memory of 8192, more than the 4096 allowed"), "{refused}");
    // Opened: what fails now is to listen where there is no folder.
    let opened = serve("8M");
    assert!(opened.contains("could not listen on /nowhere/socket"), "{opened}");
}
