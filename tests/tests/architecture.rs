//! The rules of the house that ARCHITECTURE.md draws, held against the source as it stands.

use std::fs;
use std::path::{Path, PathBuf};

/// A Rust source file of one of the crates.
struct Source {
    /// From the repository's top, such as `engine/src/xts/mod.rs`.
    path: String,
    text: String,
}

fn sources(crates: &[&str]) -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders: Vec<PathBuf> = crates.iter().map(|name| top.join(name).join("src")).collect();
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
                all.push(Source { path, text });
            }
        }
    }
    assert!(all.len() > 5, "the sources of {crates:?}");
    all
}

impl Source {
    /// The lines of code that are compiled outside tests, by number. (Tests stand at the end of a file, or in one of
    /// their own.)
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_test = self.path.ends_with("/tests.rs") || self.path.contains("/tests/");
        let code = if is_test { "" } else { self.text.split("\n#[cfg(test)]\n").next().unwrap() };
        code.lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// The rooms of its own crate that the file names.
    fn rooms(&self) -> Vec<(usize, String)> {
        let mut rooms = Vec::new();
        for (number, line) in self.code() {
            for rest in line.split("crate::").skip(1) {
                let names = rest.strip_prefix('{').map_or(rest, |list| list.split('}').next().unwrap());
                let several = rest.starts_with('{');
                for name in names.split(',').take(if several { usize::MAX } else { 1 }) {
                    let room: String = name
                        .trim()
                        .chars()
                        .take_while(|c| c.is_ascii_lowercase() || *c == '_' || c.is_ascii_digit())
                        .collect();
                    if !room.is_empty() {
                        rooms.push((number, room));
                    }
                }
            }
        }
        rooms
    }
}

/// Files under `place` name only these rooms of their crate, besides their own.
#[track_caller]
fn may_name(place: &str, allowed: &[&str]) {
    let crate_name = place.split('/').next().unwrap();
    let files: Vec<Source> =
        sources(&[crate_name]).into_iter().filter(|source| source.path.starts_with(place)).collect();
    assert!(!files.is_empty(), "there is no {place}");
    for source in files {
        for (number, room) in source.rooms() {
            assert!(
                allowed.contains(&room.as_str()),
                "{}:{number} names `{room}`; {place} may name {allowed:?} alone (ARCHITECTURE.md)",
                source.path
            );
        }
    }
}

/// No code but that under `places` has one of these words.
#[track_caller]
fn only_in(places: &[&str], crates: &[&str], words: &[&str]) {
    for source in sources(crates) {
        if places.iter().any(|place| source.path.starts_with(place)) {
            continue;
        }
        for (number, line) in source.code() {
            for word in words {
                assert!(
                    !line.contains(word),
                    "{}:{number} has `{word}`, which belongs into {places:?} alone",
                    source.path
                );
            }
        }
    }
}

#[test]
fn the_engine_imports_downwards() {
    may_name("engine/src/sector", &[]);
    may_name("engine/src/key", &[]);
    may_name("engine/src/buffer", &[]);
    may_name("engine/src/layout", &[]);
    may_name("engine/src/xts", &["key", "sector", "xts"]);
    may_name("engine/src/store", &["buffer", "store"]);
    may_name("engine/src/signature", &["store", "signature"]);
    may_name("engine/src/luks", &["buffer", "key", "sector", "signature", "store", "luks", "xts"]);
    may_name(
        "engine/src/volume",
        &["buffer", "key", "layout", "luks", "sector", "signature", "store", "volume", "xts"],
    );
}

#[test]
fn the_protocol_is_a_pure_core() {
    may_name("nbd-server/src/proto", &["proto"]);
    only_in(
        &["nbd-server/src/session", "nbd-server/src/server", "nbd-server/src/shutdown", "nbd-server/src/tls"],
        &["nbd-server"],
        &["tokio::", "std::net", "std::os", "async fn", "rustix::"],
    );
}

#[test]
fn libraries_read_no_environment_and_print_nothing() {
    only_in(&[], &["engine", "nbd-server"], &["std::env", "env::var", "println!", "eprintln!", "print!"]);
    // Nor does the engine know a clock, a runtime, a socket or randomness.
    let words = ["std::time::Instant", "SystemTime", "tokio", "std::net", "getrandom", "rand::", "std::thread"];
    only_in(&[], &["engine"], &words);
}

#[test]
fn unsafe_has_its_rooms() {
    only_in(
        &["engine/src/xts/x86_64", "engine/src/store/mapping", "nbd-server/src/session/uring/ring.rs"],
        &["engine", "nbd-server", "bootstrap"],
        &["unsafe ", "unsafe_code"],
    );
}

#[test]
fn aws_has_one_room() {
    only_in(
        &["bootstrap/src/keys/aws"],
        &["engine", "nbd-server", "bootstrap"],
        &["aws_sdk", "aws_config", "aws_smithy"],
    );
}

#[test]
fn every_library_has_its_reason_written_down() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let manifest = fs::read_to_string(top.join("Cargo.toml")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let table = fs::read_to_string(top.join("ARCHITECTURE.md")).unwrap();
    let named: Vec<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .flat_map(|cell| cell.split(", "))
        .collect();
    let libraries = section.lines().filter(|line| !line.contains("path = "));
    for library in libraries.filter_map(|line| line.split_once(" = ")).map(|(name, _)| name) {
        assert!(named.contains(&library), "ARCHITECTURE.md, \"Libraries\", says nothing of {library}");
    }
}

#[test]
fn crates_depend_downwards() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let needs = |of: &str, on: &str| {
        let manifest = fs::read_to_string(top.join(of).join("Cargo.toml")).unwrap();
        manifest.lines().any(|line| line.starts_with(on) && line[on.len()..].starts_with([' ', '.']))
    };
    for (of, on) in [("engine", "nbd-server"), ("engine", "nbdcrypt"), ("engine", "tokio"), ("nbd-server", "nbdcrypt")]
    {
        assert!(!needs(of, on), "{of} may not depend on {on}");
    }
    assert!(needs("nbd-server", "engine") && needs("bootstrap", "nbd-server"));
    // What measures and tests sees all, and is seen by none.
    for of in ["engine", "nbd-server", "bootstrap"] {
        for on in ["nbdcrypt-tests", "nbdcrypt-benches", "harness"] {
            assert!(!needs(of, on), "{of} may not depend on {on}");
        }
    }
}
