//! Passphrases as they are given: in a file, on standard input, or typed where no file is named.

use std::path::Path;

use anyhow::{Result, bail};
use engine::key::Passphrase;

use crate::config::KeyFile;
use crate::keys::{FileKey, KeySource, Prompt};

/// Where `--key-file` points to.
fn key_file(path: &Path) -> KeyFile {
    if path == Path::new("-") { KeyFile::Stdin } else { KeyFile::Path(path.to_owned()) }
}

/// In `file`, or typed.
///
/// # Errors
/// Why there is none.
pub(super) fn existing(file: Option<&Path>, of: &Path) -> Result<Passphrase> {
    Ok(match file {
        Some(file) => FileKey::new(key_file(file)).passphrase()?,
        None => Prompt::existing(format!("Passphrase of {}: ", of.display()), "--key-file")?.passphrase()?,
    })
}

/// In `file`, or typed twice. `option` is what names the file.
///
/// # Errors
/// Why there is none.
pub(super) fn new(file: Option<&Path>, of: &Path, option: &'static str) -> Result<Passphrase> {
    Ok(match file {
        Some(file) => FileKey::new(key_file(file)).passphrase()?,
        None => Prompt::new_passphrase(format!("New passphrase of {}: ", of.display()), option)?.passphrase()?,
    })
}

/// Standard input holds one passphrase.
///
/// # Errors
/// Where both shall be there.
pub(super) fn refuse_both_on_standard_input(file: Option<&Path>, new: Option<&Path>) -> Result<()> {
    let is_stdin = |file: Option<&Path>| file == Some(Path::new("-"));
    if is_stdin(file) && is_stdin(new) {
        bail!("standard input holds one passphrase: give `-` to --key-file or to --new-key-file, not to both");
    }
    Ok(())
}
