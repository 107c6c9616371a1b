//! Tests of `make install` and `make uninstall`, into a folder that stands for /. Small programs and pages stand for what
//! `make build` builds.

use std::fs;
use std::path::Path;
use std::process::Command;

use harness::architecture::top;
use harness::nbdcrypt::told;

/// Runs `make` with these arguments, which must succeed.
#[track_caller]
fn make(built: &Path, arguments: &[&str]) {
    let mut make = Command::new("make");
    // If `make test` runs these tests, its own variables must not reach this `make`.
    make.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("MAKELEVEL").env("CARGO_TARGET_DIR", built);
    let output = make.arg("--silent").arg("-C").arg(top()).args(arguments).output().expect("make can be started");
    assert!(output.status.success(), "{arguments:?}: {}", told(&output));
}

/// Makes a folder like the one that `make build` leaves.
fn built() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("release")).unwrap();
    for program in ["nbdcrypt", "nbdcrypt-bench"] {
        fs::copy("/bin/true", dir.path().join("release").join(program)).unwrap();
    }
    for page in [
        "man1/nbdcrypt.1",
        "man5/nbdcrypt.toml.5",
        "bash/nbdcrypt",
        "zsh/_nbdcrypt",
        "fish/nbdcrypt.fish",
        "licences/libraries.txt",
    ] {
        let page = dir.path().join("pages").join(page);
        fs::create_dir_all(page.parent().unwrap()).unwrap();
        fs::write(page, "a page\n").unwrap();
    }
    dir
}

/// Returns the paths of all files and folders below `folder`, sorted.
fn below(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(below(&path));
        }
        all.push(path.to_str().unwrap().to_owned());
    }
    all.sort();
    all
}

#[test]
fn uninstall_removes_exactly_what_install_made() {
    let built = built();
    for (folder, variables) in
        [("usr/local", &[][..]), ("opt/nbdcrypt", &["PREFIX=/opt/nbdcrypt", "SYSCONFDIR=/opt/nbdcrypt/etc"][..])]
    {
        let root = tempfile::tempdir().unwrap();
        // Somebody else's folders and files stay.
        fs::create_dir_all(root.path().join("usr/local/share/man")).unwrap();
        fs::create_dir_all(root.path().join("opt")).unwrap();
        fs::write(root.path().join("opt/file"), "mine").unwrap();
        let before = below(root.path());
        let dest = format!("DESTDIR={}", root.path().display());
        let with = |what| [&[what, &*dest], variables].concat();
        make(built.path(), &with("install"));
        let installed = below(root.path());
        for path in [
            "bin/nbdcrypt",
            "bin/nbdcrypt-bench",
            "share/man/man1/nbdcrypt.1.gz",
            "share/doc/nbdcrypt/licences/libraries.txt",
            "lib/udev/rules.d/61-nbdcrypt.rules",
            "lib/systemd/system/nbdcrypt-serve@.service",
            "lib/systemd/system/nbdcrypt-serve@.socket",
        ] {
            assert!(root.path().join(folder).join(path).exists(), "{path} is missing: {installed:#?}");
        }
        assert!(installed.iter().any(|path| path.ends_with("/etc/nbdcrypt/nbdcrypt.toml.example")), "{installed:#?}");
        // A second installation changes nothing, and one removal still removes everything.
        make(built.path(), &with("install"));
        assert_eq!(below(root.path()), installed);
        make(built.path(), &with("uninstall"));
        assert_eq!(below(root.path()), before);
    }
}

/// What the user put into /etc/nbdcrypt may be a key or a header, of which there is no other copy.
#[test]
fn uninstall_keeps_what_the_user_made() {
    let built = built();
    let root = tempfile::tempdir().unwrap();
    let dest = format!("DESTDIR={}", root.path().display());
    make(built.path(), &["install", &dest]);
    let header = root.path().join("etc/nbdcrypt/scratch.header");
    fs::write(&header, "the only copy").unwrap();
    make(built.path(), &["uninstall", &dest]);
    assert_eq!(fs::read_to_string(&header).unwrap(), "the only copy");
    assert!(!root.path().join("usr").exists());
}
