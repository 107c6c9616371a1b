//! Explains why a volume did not open, from what is known about this machine and the key file.

use engine::key::Passphrase;
use engine::luks::{LuksError, luks2};
use engine::store::BlockStore;
use engine::text::human;

use crate::config::{KeyConfig, KeyFile};
use crate::machine::memory;
use crate::text;
use crate::volume::data_disks::DataDisks;

/// Returns whether the error means that the passphrase is wrong.
pub fn is_wrong_passphrase(error: &LuksError) -> bool {
    matches!(
        error,
        LuksError::WrongPassphrase | LuksError::WrongPassphraseFor(_) | LuksError::WrongPassphraseBesideIgnored { .. }
    )
}

/// What happens to a header after it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It stays as it is.
    Stays,
    /// It is changed. Before that, a broken copy is rewritten.
    Changes,
}

/// Logs a warning if one of the two copies of the LUKS2 header on `store` is broken, or if another program would use the copy
/// that nbdcrypt refuses.
pub fn warn_of_copies(header: &DataDisks, store: &dyn BlockStore, then: Then) {
    let at = header;
    if let Some(broken) = luks2::broken(store) {
        let (copy, whole, reason) = (broken.copy, broken.copy.other(), broken.reason);
        let cure = match then {
            Then::Stays => format!("`nbdcrypt header repair {at}` rewrites the {copy} copy from the {whole} copy"),
            Then::Changes => format!("The next change of the header rewrites the {copy} copy"),
        };
        tracing::warn!(
            "{at}: the {copy} copy of the LUKS2 header is broken: {reason}. The {whole} copy is used. If it \
             breaks, too, the data is lost. {cure}"
        );
    }
    // Before a change, a refused copy is an error.
    if let Some(refused) = luks2::overlooked(store).filter(|_| then == Then::Stays) {
        let (copy, whole) = (refused.copy, refused.copy.other());
        tracing::warn!(
            "{at}: {refused}. Another program, such as cryptsetup, may use the {copy} copy. Keys that were added there are missing \
             here, and keys that were removed there may still open. nbdcrypt changes nothing in such a header. Save both copies \
             with `nbdcrypt header backup {at} FILE`; then `nbdcrypt header repair --from {whole} {at}` writes the {whole} copy \
             over the {copy} copy"
        );
    }
}

/// Returns the configured key file, if the secret is in one.
pub fn key_file_of(key: &KeyConfig) -> Option<&KeyFile> {
    match key {
        KeyConfig::File(file) => Some(file),
        _ => None,
    }
}

/// Adds what else is known about an error. Perhaps a keyslot would open if the key file had another line end, or a memory
/// limit of this machine is too low. `opens` tries another passphrase in the same way. It is called at most twice, and only
/// for a wrong passphrase from a file.
pub fn explained(
    error: LuksError,
    file: Option<&KeyFile>,
    passphrase: &Passphrase,
    opens: impl Fn(&Passphrase) -> Result<usize, LuksError>,
) -> anyhow::Error {
    if let Some(error) = too_little_memory(&error) {
        return error.into();
    }
    match file.filter(|_| is_wrong_passphrase(&error)).and_then(|file| newline_hint(file, passphrase, opens)) {
        Some(hint) => anyhow::Error::msg(format!("{error}. {hint}")),
        None => error.into(),
    }
}

/// Returns advice if a keyslot opens with the key file's content when its newline at the end is added or removed.
pub fn newline_hint(
    file: &KeyFile,
    passphrase: &Passphrase,
    opens: impl Fn(&Passphrase) -> Result<usize, LuksError>,
) -> Option<String> {
    let found = Ending::others(passphrase.expose()).into_iter().find_map(|ending| {
        let other = ending.apply(passphrase.expose())?;
        opens(&other).ok().map(|keyslot| (ending, keyslot))
    });
    let (ending, keyslot) = found?;
    let what = match file {
        KeyFile::Stdin => "standard input".to_owned(),
        KeyFile::Path(path) => text::path(path),
    };
    let how = match (ending, file) {
        (Ending::Without(1), _) => "without the newline",
        (Ending::Without(_), _) => "without the line end (carriage return and newline, or newlines)",
        (Ending::WithNewline, _) => "with a newline",
    };
    let cure = match (ending, file) {
        (Ending::Without(_), KeyFile::Stdin) => {
            "write the passphrase with `printf %s`, which adds no newline, instead of `echo`".to_owned()
        }
        (Ending::WithNewline, KeyFile::Stdin) => "write the passphrase with `echo`, which adds a newline".to_owned(),
        (Ending::Without(count), KeyFile::Path(_)) => {
            format!("make such a file with `head -c -{count} {what} > {what}.new`")
        }
        (Ending::WithNewline, KeyFile::Path(_)) => {
            format!("make such a file with `{{ cat {what}; echo; }} > {what}.new`")
        }
    };
    Some(format!(
        "{what} {how} at its end would open keyslot {keyslot}, but every byte of a key file counts, as with `cryptsetup \
         --key-file`: {cure}"
    ))
}

/// A change to the end of a key file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Removes this many bytes.
    Without(usize),
    /// Adds a newline.
    WithNewline,
}

impl Ending {
    /// Returns the changes that editors and shells may have caused. There are at most two, since each costs a key
    /// derivation.
    fn others(bytes: &[u8]) -> Vec<Self> {
        let line_ends = bytes.iter().rev().take_while(|byte| matches!(byte, b'\n' | b'\r')).count();
        match (bytes.last(), line_ends) {
            (Some(b'\n'), 1) => vec![Self::Without(1)],
            (Some(b'\n'), several) => vec![Self::Without(several), Self::Without(1)],
            _ => vec![Self::WithNewline],
        }
    }

    fn apply(self, bytes: &[u8]) -> Option<Passphrase> {
        let mut other = Vec::with_capacity(bytes.len() + 1);
        match self {
            Self::Without(count) => other.extend_from_slice(bytes.get(..bytes.len().checked_sub(count)?)?),
            Self::WithNewline => {
                other.extend_from_slice(bytes);
                other.push(b'\n');
            }
        }
        (!other.is_empty()).then(|| Passphrase::new(other))
    }
}

/// Argon2 needs more memory for a keyslot than this machine or control group has. The header itself is fine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "keyslot {keyslot} needs {} of memory for its key derivation (Argon2), and {}: {}",
    human(u64::from(*needed_kib) << 10),
    limit.source.says(limit.kib),
    limit.source.cure()
)]
pub struct TooLittleMemory {
    /// The keyslot.
    pub keyslot: String,
    /// The memory in KiB that Argon2 needs.
    pub needed_kib: u32,
    /// The memory that there is.
    pub limit: memory::Limit,
}

/// Returns the error to show instead if the memory of this machine or control group is the limit that the keyslot exceeds.
fn too_little_memory(error: &LuksError) -> Option<TooLittleMemory> {
    let LuksError::TooExpensive { field, found, limit } = error else { return None };
    let keyslot = field.strip_prefix("keyslots.")?.strip_suffix(".kdf.memory")?;
    let memory = memory::limit();
    // If the two limits differ, the user has set the limit that was exceeded.
    let is_of_machine = u64::from(*limit) == memory.kib.min(u64::from(u32::MAX));
    is_of_machine.then(|| TooLittleMemory { keyslot: keyslot.to_owned(), needed_kib: *found, limit: memory })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use super::*;

    /// Returns the hint for a key file with the content `given` if keyslot 3 opens with `right`, and the number of tries.
    fn hint(file: &KeyFile, given: &[u8], right: &[u8]) -> (Option<String>, usize) {
        let tried = RefCell::new(0);
        let opens = |passphrase: &Passphrase| {
            *tried.borrow_mut() += 1;
            if passphrase.expose() == right { Ok(3) } else { Err(LuksError::WrongPassphrase) }
        };
        let hint = newline_hint(file, &Passphrase::new(given.to_vec()), opens);
        (hint, tried.into_inner())
    }

    #[test]
    fn a_key_file_that_needs_another_end_is_explained() {
        let file = KeyFile::Path(PathBuf::from("/etc/key"));
        for (given, right, words) in [
            (&b"secret\n"[..], &b"secret"[..], "/etc/key without the newline at its end would open keyslot 3"),
            (b"secret", b"secret\n", "with a newline at its end would open keyslot 3"),
            (b"secret\r\n", b"secret", "head -c -2 /etc/key"),
            (b"secret\n\n", b"secret\n", "head -c -1 /etc/key"),
            (b"secret\n\n", b"secret", "head -c -2 /etc/key"),
        ] {
            let (said, tried) = hint(&file, given, right);
            assert!(said.as_ref().is_some_and(|said| said.contains(words)), "{given:?}: {said:?}");
            assert!(tried <= 2, "each try costs a key derivation");
        }
        assert!(hint(&KeyFile::Stdin, b"secret\n", b"secret").0.unwrap().contains("printf %s"));
    }

    #[test]
    fn a_wrong_key_is_tried_at_most_twice() {
        let file = KeyFile::Path(PathBuf::from("/etc/key"));
        for (given, most) in [(&b"secret"[..], 1), (b"secret\n", 1), (b"secret\n\n\n", 2), (b"\n", 0), (b"\n\n", 1)] {
            let (said, tried) = hint(&file, given, b"another");
            assert_eq!(said, None, "{given:?}");
            assert!(tried <= most, "{given:?}: {tried}");
        }
    }

    #[test]
    fn memory_of_the_machine_is_named_as_the_limit() {
        let limit = u32::try_from(memory::limit().kib).unwrap_or(u32::MAX);
        let error =
            |limit| LuksError::TooExpensive { field: "keyslots.2.kdf.memory".to_owned(), found: u32::MAX, limit };
        let said = too_little_memory(&error(limit)).unwrap().to_string();
        assert!(said.starts_with("keyslot 2 needs 4.0 TiB of memory") && !said.contains("trust"), "{said}");
        assert_eq!(too_little_memory(&error(limit - 1)), None, "a limit that the user set");
    }
}
