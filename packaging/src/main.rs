//! `nbdcrypt-pages FOLDER`: writes the man pages, the shell completions and the libraries' licences of both programs into FOLDER.
//!
//! This is a program of its own, so that the programs that users run carry nothing that only a package needs.
//!
//! ```text
//! FOLDER/man1/   one page for each command of nbdcrypt, and one for nbdcrypt-bench
//! FOLDER/man5/   nbdcrypt.toml(5)
//! FOLDER/bash/   FOLDER/zsh/   FOLDER/fish/
//! FOLDER/licences/   of the libraries in the programs, and of Rust's standard library
//! ```

mod commands;
mod configuration;
mod licences;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;

fn main() -> Result<()> {
    let folder: PathBuf = std::env::args_os().nth(1).context("usage: nbdcrypt-pages FOLDER")?.into();
    write_all(&folder).with_context(|| format!("cannot write the pages into {}", folder.display()))
}

/// Returns the command lines of both programs, without what is hidden in them.
fn programs() -> [Command; 2] {
    [bootstrap::cli::Cli::command(), nbdcrypt_benches::cli::Cli::command()].map(|program| commands::shown(&program))
}

fn write_all(folder: &Path) -> Result<()> {
    for name in ["man1", "man5", "bash", "zsh", "fish", "licences"] {
        fs::create_dir_all(folder.join(name))?;
    }
    let [nbdcrypt, bench] = programs();
    for (name, page) in commands::pages(&nbdcrypt)? {
        fs::write(folder.join("man1").join(name), page)?;
    }
    fs::write(folder.join("man1/nbdcrypt-bench.1"), commands::bench_page(&bench)?)?;
    for program in [nbdcrypt, bench] {
        let name = program.get_name().to_owned();
        // Each file has the name under which its shell looks for it.
        for (shell, path) in [
            (Shell::Bash, format!("bash/{name}")),
            (Shell::Zsh, format!("zsh/_{name}")),
            (Shell::Fish, format!("fish/{name}.fish")),
        ] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut program.clone(), &name, &mut script);
            fs::write(folder.join(path), script)?;
        }
    }
    fs::write(folder.join("man5/nbdcrypt.toml.5"), configuration::page()?)?;
    fs::write(folder.join("licences/libraries.txt"), licences::list()?)?;
    if let Some(page) = licences::of_the_standard_library() {
        fs::write(folder.join("licences/rust-library.html"), page)?;
    }
    Ok(())
}
