//! The licences of the libraries in the programs. Cargo says which libraries there are and where their sources are, and the
//! sources of each contain its licences.
//!
//! A library is left out if it only helps to build the programs: build scripts, procedural macros, and what these use. The list
//! may name a library too many: Cargo unites the features of all crates in the workspace here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The crates of the programs that packages hold.
const PROGRAMS: [&str; 2] = ["nbdcrypt", "nbdcrypt-benches"];

/// A library whose code is in the programs.
struct Library {
    name: String,
    version: String,
    /// The licences, as an SPDX expression such as `MIT OR Apache-2.0`.
    licence: String,
    repository: String,
    /// The folder with the sources.
    folder: PathBuf,
}

/// Returns the list of libraries with the texts of their licences. A text that several libraries share is there once.
///
/// # Errors
/// Fails if Cargo does not answer, if sources cannot be read, or if a library has neither a licence file nor the licence MIT.
pub(crate) fn list() -> Result<String> {
    let libraries = libraries(&metadata()?)?;
    let mut texts: Vec<String> = Vec::new();
    let mut list = format!(
        "The licences of the libraries in nbdcrypt and nbdcrypt-bench\n\n\
         The programs contain the {} libraries below, and Rust's standard library.\n\
         The texts of the licences are at the end, by number.\n\n\
         Rust's standard library\n  licence: MIT OR Apache-2.0, and others for its parts: see rust-library.html\n  \
         source:  https://github.com/rust-lang/rust\n",
        libraries.len()
    );
    for library in &libraries {
        let mut numbers = Vec::new();
        for text in library.texts()? {
            let same = |other: &String| other.split_whitespace().eq(text.split_whitespace());
            let number = texts.iter().position(same).unwrap_or_else(|| {
                texts.push(text);
                texts.len() - 1
            });
            if !numbers.contains(&(number + 1)) {
                numbers.push(number + 1);
            }
        }
        let numbers: Vec<_> = numbers.iter().map(usize::to_string).collect();
        list += &format!(
            "\n{} {}\n  licence: {}\n  texts:   {}\n  source:  {}\n",
            library.name,
            library.version,
            library.licence,
            numbers.join(", "),
            library.repository
        );
    }
    for (number, text) in texts.iter().enumerate() {
        list += &format!("\n{}\nText {}\n\n{}\n", "=".repeat(80), number + 1, text.trim_matches(['\n', '\r']));
    }
    Ok(list)
}

/// Returns the page with the licences of Rust's standard library and its parts. Some distributions ship Rust without it.
pub(crate) fn of_the_standard_library() -> Option<Vec<u8>> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let folder = String::from_utf8(rustc.args(["--print", "sysroot"]).output().ok()?.stdout).ok()?;
    fs::read(Path::new(folder.trim_end()).join("share/doc/rust/COPYRIGHT-library.html")).ok()
}

/// Asks Cargo for all crates of this workspace, and for what each depends on.
fn metadata() -> Result<Value> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let host = rustc.args(["--print", "host-tuple"]).output().context("cannot run rustc")?.stdout;
    let host = String::from_utf8(host)?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--locked", "--format-version", "1", "--filter-platform", host.trim_end()]);
    cargo.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
    let output = cargo.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata wrote something that is not JSON")
}

/// Returns the libraries that the programs contain, in the order of their names.
fn libraries(metadata: &Value) -> Result<Vec<Library>> {
    let by_id = |list: &'static str, inside: &'static str| -> Result<BTreeMap<&str, &Value>> {
        let values = metadata.pointer(list).and_then(Value::as_array).context("cargo metadata lists no crates")?;
        values.iter().map(|value| Ok((text(value, inside)?, value))).collect()
    };
    let crates = by_id("/packages", "id")?;
    let nodes = by_id("/resolve/nodes", "id")?;
    let is_program = |value: &Value| value["source"].is_null() && PROGRAMS.iter().any(|name| value["name"] == *name);
    let mut to_do: Vec<_> = crates.iter().filter(|(_, value)| is_program(value)).map(|(id, _)| *id).collect();
    let mut seen: BTreeSet<_> = to_do.iter().copied().collect();
    let mut libraries = Vec::new();
    while let Some(id) = to_do.pop() {
        let value = crates.get(id).with_context(|| format!("cargo metadata does not describe {id}"))?;
        if !value["source"].is_null() {
            let manifest = Path::new(text(value, "manifest_path")?);
            libraries.push(Library {
                name: text(value, "name")?.to_owned(),
                version: text(value, "version")?.to_owned(),
                licence: value["license"].as_str().unwrap_or("see the texts").replace('/', " OR ").replace("  ", " "),
                repository: value["repository"].as_str().unwrap_or("https://crates.io").to_owned(),
                folder: manifest.parent().context("a manifest is in a folder")?.to_owned(),
            });
        }
        for used in nodes.get(id).and_then(|node| node["deps"].as_array()).into_iter().flatten() {
            let is_in_program = used["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null());
            let used = text(used, "pkg")?;
            if is_in_program && !crates.get(used).is_some_and(|value| is_macro(value)) && seen.insert(used) {
                to_do.push(used);
            }
        }
    }
    libraries.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    Ok(libraries)
}

/// Returns whether a crate is a procedural macro, which runs in the compiler only.
fn is_macro(value: &Value) -> bool {
    let targets = value["targets"].as_array().into_iter().flatten();
    targets.flat_map(|target| target["kind"].as_array().into_iter().flatten()).any(|kind| kind == "proc-macro")
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value[name].as_str().with_context(|| format!("cargo metadata gives a crate without `{name}`"))
}

impl Library {
    /// Returns the texts of the licence files in the sources, also of parts that the library has taken from others.
    fn texts(&self) -> Result<Vec<String>> {
        let mut files = Vec::new();
        find_licences(&self.folder, &mut files)
            .with_context(|| format!("cannot read the sources of {} in {}", self.name, self.folder.display()))?;
        let mut texts = Vec::new();
        for file in files {
            let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            texts.push(String::from_utf8_lossy(&bytes).replace("\r\n", "\n"));
        }
        // Some crates are published without the file. The words of the MIT licence are known, and who wrote the crate is not.
        if texts.is_empty() {
            let is_mit = self.licence.split(" OR ").any(|licence| licence.trim() == "MIT");
            if !is_mit {
                bail!("the sources of {} in {} have no licence file", self.name, self.folder.display());
            }
            let authors = format!("Copyright (c) The authors of {}", self.name);
            texts.push(include_str!("../../LICENSE-MIT").replace("Copyright (c) 2026 The nbdcrypt authors", &authors));
        }
        Ok(texts)
    }
}

/// Adds the licence files in `folder` and the folders below it to `files`, in the order of their names. Tests are left out: they
/// are in no program.
fn find_licences(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    const BEGINNINGS: [&str; 6] = ["licence", "license", "copying", "copyright", "notice", "unlicense"];
    let mut entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if entry.file_type()?.is_dir() {
            if name != "tests" {
                find_licences(&entry.path(), files)?;
            }
        } else if BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)) && !name.ends_with(".rs") {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks Cargo in another way which libraries the programs contain. Each must be in the list, with a licence text.
    #[test]
    fn every_library_of_the_programs_has_its_licence_in_the_list() {
        let list = list().unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["tree", "--locked", "--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"]);
        cargo.args(PROGRAMS.iter().flat_map(|name| ["--package", name])).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = cargo.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8(output.stdout).unwrap();
        let mut seen = BTreeSet::new();
        // `aes v0.8.4`, or `nbdcrypt v0.1.0 (/its/folder)` for the crates of this workspace.
        for line in tree.lines().filter(|line| !line.is_empty() && !line.contains(" (/")) {
            let (name, version) = line.split_once(" v").unwrap_or_else(|| panic!("{line}"));
            let version = version.split(' ').next().unwrap();
            let entry =
                list.split_once(&format!("\n\n{name} {version}\n")).unwrap_or_else(|| panic!("{line} is missing")).1;
            let entry = entry.split("\n\n").next().unwrap();
            let texts = entry.lines().find_map(|line| line.trim_start().strip_prefix("texts:")).unwrap();
            for number in texts.split(',') {
                let number: usize = number.trim().parse().unwrap_or_else(|_| panic!("{line}: {entry}"));
                assert!(list.contains(&format!("=\nText {number}\n\n")), "{line}: {entry}");
            }
            seen.insert(line.to_owned());
        }
        assert!(seen.len() > 100, "{seen:?}");
        assert!(!list.contains("\nsyn 2."), "a library of procedural macros is in the list");
        // ring contains code from fiat-crypto, whose licence is deeper in ring's sources.
        assert!(list.contains("fiat-crypto"), "the parts of libraries are missing");
    }
}
