//! nbdcrypt recognises the signatures that real programs write to a disk, under the names that blkid gives them.

use std::path::Path;

use engine::luks::HashAlgorithm;
use engine::signature::{Content, Kind, examine, probe};
use harness::luks::{Workbench, begin_luks1, format_luks1, key, open, run, store, try_run};

const MIB: u64 = 1 << 20;

/// The command that makes something on a disk, nbdcrypt's name for it, and blkid's name.
struct Maker {
    command: &'static [&'static str],
    name: &'static str,
    blkid: &'static str,
}

const MAKERS: &[Maker] = &[
    Maker { command: &["mkfs.ext2", "-qF"], name: "ext2", blkid: "ext2" },
    Maker { command: &["mkfs.ext3", "-qF"], name: "ext3", blkid: "ext3" },
    Maker { command: &["mkfs.ext4", "-qF"], name: "ext4", blkid: "ext4" },
    Maker { command: &["mkfs.xfs", "-q"], name: "xfs", blkid: "xfs" },
    Maker { command: &["mkfs.minix", "-1"], name: "minix", blkid: "minix" },
    Maker { command: &["mkfs.minix", "-2"], name: "minix", blkid: "minix" },
    Maker { command: &["mkfs.minix", "-3"], name: "minix", blkid: "minix" },
    Maker { command: &["mkfs.bfs"], name: "bfs", blkid: "bfs" },
    Maker { command: &["mkswap", "-q"], name: "swap", blkid: "swap" },
    Maker { command: &["mkswap", "-q", "--pagesize", "16384"], name: "swap", blkid: "swap" },
    Maker { command: &luks_format("luks1"), name: "LUKS1", blkid: "crypto_LUKS" },
    Maker { command: &luks_format("luks2"), name: "LUKS2", blkid: "crypto_LUKS" },
];

const fn luks_format(format: &'static str) -> [&'static str; 8] {
    let iterations = "--pbkdf-force-iterations=1000";
    ["cryptsetup", "luksFormat", "-q", "--type", format, "--pbkdf=pbkdf2", iterations, "--key-file=key"]
}

fn names(disk: &Path) -> Vec<&'static str> {
    probe(store(disk).as_ref()).unwrap().into_iter().map(|signature| signature.name).collect()
}

/// Returns blkid's name for what is on the disk, or nothing if blkid recognises nothing.
fn blkid(disk: &Path) -> String {
    let output = try_run("blkid", ["-p", "-o", "value", "-s", "TYPE", disk.to_str().unwrap()]);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs mkfs, mkswap, cryptsetup, blkid: run `make test`")]
fn signatures_have_the_names_that_blkid_gives_them() {
    let bench = Workbench::new();
    for Maker { command, name, blkid: expected } in MAKERS {
        let disk = bench.disk("disk", 320 * MIB);
        let (program, arguments) = command.split_first().unwrap();
        bench.run(program, arguments.iter().copied().chain([disk.to_str().unwrap()]));
        assert_eq!(blkid(&disk), *expected, "{command:?}");
        let found = names(&disk);
        assert_eq!(found.first(), Some(name), "{command:?}: {found:?}");
        assert!(matches!(examine(store(&disk).as_ref()).unwrap(), Content::Known(_)), "{command:?}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup, wipefs: run `make test`")]
fn a_luks2_volume_without_its_first_header_is_recognised() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 64 * MIB);
    let format = luks_format("luks2");
    bench.run(format[0], format[1..].iter().copied().chain([disk.to_str().unwrap()]));
    store(&disk).write_at(&[0; 4096], 0).unwrap();
    assert_eq!(names(&disk), ["LUKS2 (secondary header)"]);
    run("wipefs", ["-qa", disk.to_str().unwrap()]);
    assert_eq!(names(&disk), [""; 0]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs mkfs.ext4: run `make test`")]
fn the_filesystem_within_a_volume_is_named() {
    let bench = Workbench::new();
    let (disk, plain) = (bench.disk("disk", 32 * MIB), bench.disk("plain", 16 * MIB));
    format_luks1(&disk, HashAlgorithm::Sha256, key(64));
    let volume = open(&disk);
    run("mkfs.ext4", ["-qF", plain.to_str().unwrap()]);
    let mut data = std::fs::read(plain).unwrap();
    volume.write(0, &mut data).unwrap();
    let found = probe(&volume).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].name, found[0].kind), ("ext4", Kind::Filesystem));
    assert_eq!(names(&disk), ["LUKS1"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup, blkid, wipefs: run `make test`")]
fn blkid_recognises_nothing_in_an_unfinished_format() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 32 * MIB);
    let pending = begin_luks1(&disk, HashAlgorithm::Sha256, key(64));
    assert_eq!(blkid(&disk), "");
    assert_eq!(run("wipefs", [&disk]), "");
    assert!(!try_run("cryptsetup", ["isLuks", disk.to_str().unwrap()]).status.success());
    assert_eq!(examine(store(&disk).as_ref()).unwrap(), Content::Unfinished);
    pending.commit(store(&disk).as_ref()).unwrap();
    assert_eq!(blkid(&disk), "crypto_LUKS");
}
