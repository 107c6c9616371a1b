//! Tests that the source keeps the rules of ARCHITECTURE.md about imports, `unsafe` and libraries.

use std::fs;

use harness::architecture::{Source, sources, top};

/// A module of a crate, and the other modules that it may name. What no rule allows is forbidden.
type Rule = (&'static str, &'static [&'static str]);

const ENGINE: &[Rule] = &[
    ("buffer", &[]),
    ("key", &[]),
    ("layout", &["sector"]),
    ("limits", &[]),
    ("luks", &["buffer", "key", "layout", "sector", "signature", "store", "text", "xts"]),
    ("raid", &["layout", "sector", "signature", "store", "text"]),
    ("sector", &[]),
    ("signature", &["sector", "store"]),
    ("store", &["buffer", "sector", "text", "xts"]),
    ("text", &[]),
    ("volume", &["buffer", "key", "layout", "sector", "store", "text", "xts"]),
    ("xts", &["key", "sector"]),
];

const NBD_SERVER: &[Rule] = &[
    ("export", &["failures", "proto", "statistics"]),
    ("failures", &[]),
    ("proto", &[]),
    ("server", &["export", "proto", "session", "shutdown", "tls"]),
    ("session", &["export", "proto", "shutdown", "statistics", "threads"]),
    ("shutdown", &[]),
    ("statistics", &[]),
    ("threads", &[]),
    ("tls", &["proto"]),
];

/// The floors of the program, the lowest first. A floor may name the floors below it.
const FLOORS: &[&str] = &["text", "machine", "volume", "attach", "config", "keys", "steps", "service", "bench", "cli"];

fn floors() -> Vec<Rule> {
    (0..FLOORS.len()).map(|floor| (FLOORS[floor], &FLOORS[..floor])).collect()
}

/// Returns one line for each breach of the rules of a crate.
fn breaches(sources: &[Source], rules: &[Rule]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let module = source.module();
        // The crate's root may name everything.
        let Some(own) = module.first() else { continue };
        let Some((_, allowed)) = rules.iter().find(|(name, _)| name == own) else {
            found.push(format!("{}: there is no rule for the module `{own}`", source.path));
            continue;
        };
        for named in source.names() {
            match named.first() {
                Some(other) if other == own || allowed.contains(&other.as_str()) => {}
                _ => found.push(format!(
                    "{} names `crate::{}`; `{own}` may name only {allowed:?}",
                    source.path,
                    named.join("::")
                )),
            }
        }
    }
    found
}

/// Returns one line for each line of code that has one of these words and lies outside `rooms`.
fn strays(sources: &[Source], rooms: &[&str], words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| !rooms.iter().any(|room| source.path.starts_with(room))) {
        for (number, line) in source.code() {
            for word in words.iter().filter(|word| line.contains(*word)) {
                found.push(format!("{}:{number} has `{word}`, which belongs only in {rooms:?}", source.path));
            }
        }
    }
    found
}

#[track_caller]
fn assert_none(found: &[String]) {
    assert!(found.is_empty(), "see ARCHITECTURE.md:\n{}", found.join("\n"));
}

/// Fails if code outside `rooms` has one of these words.
#[track_caller]
fn only_in(rooms: &[&str], crates: &[&str], words: &[&str]) {
    assert_none(&strays(&sources(crates), rooms, words));
}

#[test]
fn crates_import_as_drawn() {
    assert_none(&breaches(&sources(&["engine"]), ENGINE));
    assert_none(&breaches(&sources(&["nbd-server"]), NBD_SERVER));
    assert_none(&breaches(&sources(&["bootstrap"]), &floors()));
}

/// Every module that a rule names exists. If a module is renamed, a rule with its old name would check nothing.
#[test]
fn rules_name_modules_that_exist() {
    let floors = floors();
    for (name, rules) in [("engine", ENGINE), ("nbd-server", NBD_SERVER), ("bootstrap", &floors[..])] {
        let modules: Vec<_> = sources(&[name]).iter().filter_map(|source| source.module().into_iter().next()).collect();
        for (module, _) in rules {
            assert!(modules.iter().any(|found| found == module), "{name} has no module `{module}`");
        }
    }
}

/// One planted breach of each kind, in text that the compiler would accept. Each is found, and the path is named.
#[test]
fn planted_breaches_are_found() {
    let planted = |path: &str, text: &str, rules: &[Rule]| {
        breaches(&[Source { path: path.to_owned(), text: text.to_owned() }], rules)
    };
    let found = |path: &str, text: &str, rules: &[Rule], named: &str| {
        let breaches = planted(path, text, rules);
        assert_eq!(breaches.len(), 1, "{text}: {breaches:?}");
        assert!(breaches[0].starts_with(&format!("{path} names `crate::{named}`;")), "{}", breaches[0]);
    };
    let floors = floors();
    // A plain `use`, a list over several lines, a list within a list, and a renamed import.
    found("engine/src/xts/mod.rs", "use crate::store::Store;", ENGINE, "store::Store");
    found(
        "bootstrap/src/keys/aws/kms.rs",
        "use crate::{\n    config::Config,\n    service::boot,\n};",
        &floors,
        "service::boot",
    );
    found(
        "bootstrap/src/volume/plain.rs",
        "use crate::{machine::{cpu, disk}, config::{\nKeyFile}};",
        &floors,
        "config::KeyFile",
    );
    found("bootstrap/src/config/mod.rs", "use crate::keys as secrets;", &floors, "keys");
    // `super::` that leads out of the module, from a file and from the root of a folder.
    found("engine/src/xts/cpu.rs", "use super::super::luks;", ENGINE, "luks");
    found("engine/src/store/mod.rs", "fn f() { super::volume::open() }", ENGINE, "volume::open");
    found(
        "nbd-server/src/proto/reply.rs",
        "use super::super::{\n    proto::x,\n    export::Export};",
        NBD_SERVER,
        "export::Export",
    );
    // A path in an expression, in a type, in a macro and in an attribute.
    found("bootstrap/src/attach/mod.rs", "\nfn f() {\n    crate::steps::run();\n}", &floors, "steps::run");
    found("bootstrap/src/machine/disk.rs", "struct S(Vec<crate::volume::plain::P>);", &floors, "volume::plain::P");
    found("bootstrap/src/machine/disk.rs", "fn f() { info!(\"{}\", crate::cli::x()) }", &floors, "cli::x");
    found("engine/src/key.rs", "#[serde(with = crate::text::x)]\nstruct S;", ENGINE, "text::x");
    // `use crate::*` does not say which module is meant.
    found("engine/src/key.rs", "use crate::*;", ENGINE, "");
    // A module without a rule.
    let without = planted("engine/src/parity/mod.rs", "", ENGINE);
    assert_eq!(without, ["engine/src/parity/mod.rs: there is no rule for the module `parity`"]);
    // Paths that are allowed, or that do not count.
    for (path, text) in [
        ("engine/src/xts/mod.rs", "use crate::{key::{self, VolumeKey}, sector::*};\nuse super::xts::cpu;"),
        (
            "engine/src/xts/cpu.rs",
            "use super::portable; // crate::volume\n/* crate::volume */ const S: &str = \"crate::volume\";",
        ),
        ("engine/src/xts/cpu.rs", "#[cfg(test)]\nmod tests {\n use crate::volume::Volume;\n}"),
        ("engine/src/xts/tests.rs", "use crate::volume::Volume;"),
        ("engine/src/lib.rs", "pub use crate::volume::Volume;"),
        ("engine/src/key.rs", "pub(crate) fn f() {}\npub(super) fn g() {}"),
    ] {
        assert_eq!(planted(path, text, ENGINE), [""; 0], "{text}");
    }
    let stray =
        [Source { path: "engine/src/key.rs".into(), text: "//! unsafe \nfn f() {\n    unsafe { g() }\n}\n".into() }];
    assert_eq!(strays(&stray, &["engine/src/xts"], &["unsafe "]).len(), 1);
    assert_eq!(strays(&stray, &["engine/src/key"], &["unsafe "]), [""; 0]);
    for text in ["it is there; use --force", "see `nbdcrypt key list`", "give this \\\n     DEVICE first", "(--header)"]
    {
        let text = format!("#[error(\"{text}\")]");
        assert_eq!(strays(&[Source { path: "engine/src/key.rs".into(), text }], &[], ADVICE).len(), 1);
    }
}

#[test]
fn the_nbd_protocol_uses_no_sockets_or_runtime() {
    only_in(
        &["nbd-server/src/session", "nbd-server/src/server", "nbd-server/src/shutdown", "nbd-server/src/tls"],
        &["nbd-server"],
        &["tokio::", "std::net", "std::os", "async fn", "rustix::"],
    );
}

#[test]
fn libraries_read_no_environment_and_print_nothing() {
    only_in(&[], &["engine", "nbd-server"], &["std::env", "env::var", "println!", "eprintln!", "print!"]);
    // The engine also uses no clock, runtime, socket or randomness.
    let words = ["std::time::Instant", "SystemTime", "tokio", "std::net", "getrandom", "rand::", "std::thread"];
    only_in(&[], &["engine"], &words);
}

/// Words of advice for users of the program. A crate does not know which program uses it, or which command is in use.
const ADVICE: &[&str] = &[" --", "(--", "`--", "\"--", "`nbdcrypt ", "`cryptsetup ", " DEVICE"];

#[test]
fn errors_of_the_libraries_name_no_command_or_option() {
    only_in(&[], &["engine", "nbd-server"], ADVICE);
}

#[test]
fn unsafe_stands_in_few_files() {
    only_in(
        &[
            "engine/src/xts/x86_64",
            "engine/src/store/mapping",
            "engine/src/limits",
            "nbd-server/src/session/uring/ring.rs",
        ],
        &["engine", "nbd-server", "bootstrap"],
        &["unsafe ", "unsafe_code"],
    );
}

/// `programs` decides which variables and descriptors of this process a child gets. The other places start this program
/// itself, a helper that needs the credentials, or a program that a benchmark compares it with.
#[test]
fn programs_are_started_in_one_place() {
    only_in(
        &[
            "bootstrap/src/machine/programs.rs",
            "bootstrap/src/cli/background.rs",
            // `programs` starts this code in a child process, which passes on the variables and descriptors that it
            // got.
            "bootstrap/src/cli/child.rs",
            "bootstrap/src/cli/demo.rs",
            "bootstrap/src/bench",
            "bootstrap/src/keys/aws",
            "bootstrap/src/machine/holders.rs",
        ],
        &["engine", "nbd-server", "bootstrap"],
        &["Command::new"],
    );
}

/// The steps reach the system only through their `outside`, so that a test can decide what the system is.
#[test]
fn steps_name_only_types_of_the_machine() {
    let types = [&["machine", "mounts"][..], &["machine", "selection", "Selection"]];
    for source in sources(&["bootstrap"]).iter().filter(|source| source.path.starts_with("bootstrap/src/steps/")) {
        for named in source.names().iter().filter(|named| named.first().is_some_and(|floor| floor == "machine")) {
            assert!(
                types.iter().any(|allowed| named.iter().take(allowed.len()).eq(allowed.iter())),
                "{}: {named:?}",
                source.path
            );
        }
    }
}

#[test]
fn only_one_module_uses_the_aws_sdk() {
    only_in(
        &["bootstrap/src/keys/aws"],
        &["engine", "nbd-server", "bootstrap"],
        &["aws_sdk", "aws_config", "aws_smithy"],
    );
}

#[test]
fn architecture_md_gives_a_reason_for_every_library() {
    let manifest = fs::read_to_string(top().join("Cargo.toml")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let table = fs::read_to_string(top().join("ARCHITECTURE.md")).unwrap();
    let named: Vec<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .flat_map(|cell| cell.split(", "))
        .collect();
    let libraries = section.lines().filter(|line| !line.contains("path = "));
    for library in libraries.filter_map(|line| line.split_once(" = ")).map(|(name, _)| name) {
        assert!(named.contains(&library), "ARCHITECTURE.md, \"Libraries\", gives no reason for {library}");
    }
}

#[test]
fn crates_depend_only_on_lower_ones() {
    let needs = |of: &str, on: &str| {
        let manifest = fs::read_to_string(top().join(of).join("Cargo.toml")).unwrap();
        manifest.lines().any(|line| line.starts_with(on) && line[on.len()..].starts_with([' ', '.']))
    };
    for (of, on) in [("engine", "nbd-server"), ("engine", "nbdcrypt"), ("engine", "tokio"), ("nbd-server", "nbdcrypt")]
    {
        assert!(!needs(of, on), "{of} may not depend on {on}");
    }
    assert!(needs("nbd-server", "engine") && needs("bootstrap", "nbd-server"));
    // The tests and benchmarks may use every crate. No crate may use them.
    for of in ["engine", "nbd-server", "bootstrap"] {
        for on in ["nbdcrypt-tests", "nbdcrypt-benches", "harness"] {
            assert!(!needs(of, on), "{of} may not depend on {on}");
        }
    }
}
