//! Gets a passphrase from a file, from standard input, or from the terminal if no file is named.

use std::path::Path;

use anyhow::{Result, bail};
use engine::key::Passphrase;

use crate::config::KeyFile;
use crate::keys::{FileKey, KeySource, Prompt};
use crate::text;

/// Returns what the argument of `--key-file` stands for.
pub(super) fn key_file(path: &Path) -> KeyFile {
    if path == Path::new("-") { KeyFile::Stdin } else { KeyFile::Path(path.to_owned()) }
}

/// Reads a passphrase from `file`, or asks the user for it. `of` is the disk or file with the volume. The question names it.
///
/// # Errors
/// Fails if the file cannot be read, or if there is no terminal to ask at.
pub(super) fn existing(file: Option<&Path>, of: &Path) -> Result<Passphrase> {
    asked_as(file, format!("Passphrase of {}: ", text::path(of)))
}

/// Reads a passphrase from `file`, or asks `question`.
///
/// # Errors
/// Fails if the file cannot be read, or if there is no terminal to ask at.
pub(super) fn asked_as(file: Option<&Path>, question: String) -> Result<Passphrase> {
    Ok(match file {
        Some(file) => FileKey::new(key_file(file)).passphrase()?,
        None => Prompt::existing(question, "--key-file")?.passphrase()?,
    })
}

/// Reads a new passphrase from `file`, or asks for it twice. `option` is the name of the option that names the file.
///
/// # Errors
/// Fails if the file cannot be read, if there is no terminal to ask at, or if the two answers differ.
pub(super) fn new(file: Option<&Path>, of: &Path, option: &'static str) -> Result<Passphrase> {
    Ok(match file {
        Some(file) => FileKey::new(key_file(file)).passphrase()?,
        None => Prompt::new_passphrase(format!("New passphrase of {}: ", text::path(of)), option)?.passphrase()?,
    })
}

/// Refuses to read both passphrases from standard input, which holds only one.
///
/// # Errors
/// Fails if both files are `-`.
pub(super) fn refuse_both_on_standard_input(file: Option<&Path>, new: Option<&Path>) -> Result<()> {
    let is_stdin = |file: Option<&Path>| file == Some(Path::new("-"));
    if is_stdin(file) && is_stdin(new) {
        bail!("standard input holds one passphrase: give `-` to --key-file or to --new-key-file, not to both");
    }
    Ok(())
}
