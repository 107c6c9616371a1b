//! What to do about an error. The errors themselves say only what was found, because the code that returns them does not
//! know which command is in use and which options it has.

use std::error::Error;

use engine::luks::{LuksError, Others};

use crate::keys::NoTokenSecret;
use crate::keys::opening::TooLittleMemory;
use crate::keys::rewrap::RewrapError;

/// How the command in use gets the settings that advice may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settings {
    /// From a configuration, as `up` does.
    Configuration,
    /// From options of the command line.
    Options {
        /// Whether the command opens the keyslot that `--key-slot` names. `key add`, for example, gives that option another
        /// meaning.
        key_slot: bool,
    },
}

/// Returns advice for the first cause of the error that there is advice for.
pub(super) fn about(error: &anyhow::Error, settings: Settings) -> Option<String> {
    error.chain().find_map(|cause| match (luks_error(cause), cause.downcast_ref()) {
        (Some(error), _) => about_luks(error, settings),
        (None, Some(error)) => Some(about_memory(error, settings)),
        (None, None) => None,
    })
}

/// Returns the engine's error, if `cause` is one or wraps one. A transparent error shows the text of the error inside it as
/// its own, and leaves that error out of the chain of causes. So this function looks inside transparent errors.
fn luks_error<'e>(cause: &'e (dyn Error + 'static)) -> Option<&'e LuksError> {
    match (cause.downcast_ref(), cause.downcast_ref()) {
        (Some(NoTokenSecret::Luks(error)), _) => Some(error),
        (_, Some(RewrapError::Luks(error) | RewrapError::Token(NoTokenSecret::Luks(error)))) => Some(error),
        _ => cause.downcast_ref(),
    }
}

/// Returns what to do about an error of the engine: the rest of a sentence, without a full stop at its end.
fn about_luks(error: &LuksError, settings: Settings) -> Option<String> {
    let has_key_slot = settings == Settings::Options { key_slot: true };
    let priority = |keyslot: &usize| {
        format!("`nbdcrypt key priority --key-slot {keyslot} DEVICE normal` lets nbdcrypt try it again")
    };
    let advice = match error {
        LuksError::Unfinished => "format the disk again",
        LuksError::Corrupt { .. } => {
            "try `nbdcrypt header repair`, or restore the header from a backup (`nbdcrypt header restore`)"
        }
        LuksError::BeyondRepair { .. } | LuksError::Keyslot { others: Others::DoNotOpen, .. } => {
            "restore the header from a backup (`nbdcrypt header restore`)"
        }
        LuksError::Unsupported(_) => "open it with cryptsetup",
        LuksError::TooManyIterations { .. } => return Some(raise(&["max-kdf-iterations"], settings)),
        LuksError::TooExpensive { field, .. } => match field.rsplit('.').next() {
            Some("memory") => return Some(raise(&["max-kdf-memory"], settings)),
            Some("time") => return Some(raise(&["max-kdf-passes"], settings)),
            _ => "open it with cryptsetup",
        },
        LuksError::TooMuchWork { .. } => {
            let raise = raise(&["max-kdf-memory", "max-kdf-iterations", "max-kdf-passes"], settings);
            return Some(if has_key_slot { format!("name a keyslot with --key-slot, or {raise}") } else { raise });
        }
        LuksError::OutOfMemory { .. } => {
            "check the limits of this process (`ulimit -v`, `ulimit -u`) and those of its control group (memory.max, pids.max)"
        }
        LuksError::Detached => match settings {
            Settings::Configuration => "name that disk as `devices`, and this one as `header`, both under [volume]",
            Settings::Options { .. } => "name that disk, and give this one with --header",
        },
        LuksError::WrongPassphrase | LuksError::NoSuchKeyslot(_) | LuksError::UnboundKeyslot(_) => {
            "`nbdcrypt key list DEVICE` shows the keyslots"
        }
        LuksError::WrongPassphraseBesideIgnored { ignored } if has_key_slot => {
            return Some(format!("--key-slot {ignored} tries it, and {}", priority(ignored)));
        }
        LuksError::WrongPassphraseBesideIgnored { ignored } => return Some(priority(ignored)),
        LuksError::AllIgnored { keyslot } if has_key_slot => {
            return Some(format!("--key-slot {keyslot} tries the first one, and {}", priority(keyslot)));
        }
        LuksError::AllIgnored { keyslot } => return Some(priority(keyslot)),
        LuksError::WrongPassphraseFor(_) | LuksError::Keyslot { .. } if has_key_slot => {
            "without --key-slot every keyslot is tried"
        }
        LuksError::UndecidedKeyslot { .. } => {
            "`nbdcrypt header repair` decides by its key material whether it holds a key"
        }
        LuksError::KeyslotInUse(_) => "choose another keyslot, or remove that key first (`nbdcrypt key remove`)",
        LuksError::NoRoomForKey => "remove a key first (`nbdcrypt key remove`)",
        LuksError::NoRoomToChange(_) => {
            "remove another key first (`nbdcrypt key remove`), or save the header (`nbdcrypt header backup`) and use --force"
        }
        LuksError::LastKeyslot(_) => "use --force to remove it anyway",
        LuksError::CopyNotUnderstood(refused) => {
            let (copy, whole) = (refused.copy, refused.copy.other());
            return Some(format!(
                "save both copies first (`nbdcrypt header backup`), then look at the {copy} copy with `cryptsetup luksDump`, which \
                 may write it over the {whole} copy, or write the {whole} copy over it with `nbdcrypt header repair --from {whole}`"
            ));
        }
        LuksError::CopiesDiffer(_) => {
            "`nbdcrypt header repair --from primary` keeps the copy at the start of the disk, which `nbdcrypt dump` shows; \
             `nbdcrypt header repair --from secondary` keeps the other copy"
        }
        LuksError::AnotherOwner(_) => {
            "if you need only the LUKS volume, erase the other signature first: `wipefs DEVICE` shows its offset, `wipefs \
             --backup --offset OFFSET DEVICE` saves and erases it"
        }
        LuksError::NotWritable(_) => {
            "most likely a token holds it: remove that token with `cryptsetup token remove`, or change the header with \
             cryptsetup"
        }
        LuksError::MetadataFull { .. } => "remove a token or a keyslot first",
        LuksError::NoSuchToken(_) => "`nbdcrypt token list DEVICE` shows the tokens",
        LuksError::TokenExists(_) => "use --force to replace it",
        LuksError::BackupOfAnother { .. }
        | LuksError::BackupBesideRefused { .. }
        | LuksError::BackupNotComparable { .. } => "use --force to restore the backup anyway",
        LuksError::BackupOfOtherKey { .. } => "use --force only if the data was encrypted with the backup's key",
        LuksError::BackupOfDamagedDigest { .. } => {
            "if no passphrase opens the volume now (`nbdcrypt key test`), the header on the disk is damaged: restore the backup \
             with --force"
        }
        LuksError::BackupOfUnfinished { .. } => {
            "finish the reencryption with `cryptsetup reencrypt --resume-only` first, or use --force to restore the backup \
             anyway"
        }
        LuksError::Ephemeral => {
            "if no server has the volume (`nbdcrypt status`), its data is lost: `nbdcrypt up` makes a new volume there if the \
             configuration has `ephemeral = true` under [volume]"
        }
        // These are listed one by one, so that the compiler asks for a decision about each new error.
        LuksError::NotLuks
        | LuksError::Overwritten
        | LuksError::Version(_)
        | LuksError::Impossible { .. }
        | LuksError::WrongPassphraseFor(_)
        | LuksError::NoKeyslot
        | LuksError::Keyslot { .. }
        | LuksError::Key(_)
        | LuksError::TooSmall { .. }
        | LuksError::WrongVolumeKey
        | LuksError::DamagedUuid(_)
        | LuksError::OpensUnbound(_)
        | LuksError::Token(_)
        | LuksError::Luks2Only(_)
        | LuksError::BackupMismatch { .. }
        | LuksError::Random(_)
        | LuksError::Store(_) => return None,
    };
    Some(advice.to_owned())
}

/// Returns the advice to raise limits on key derivation.
fn raise(limits: &[&str], settings: Settings) -> String {
    let named = |mark: &str| limits.iter().map(|limit| format!("{mark}{limit}{mark}")).collect::<Vec<_>>().join(", ");
    match settings {
        Settings::Configuration => {
            format!("raise the limit under [volume] ({}) if you trust the header", named("`"))
        }
        Settings::Options { .. } => format!("raise the limit (--{}) if you trust the header", limits.join(", --")),
    }
}

fn about_memory(error: &TooLittleMemory, settings: Settings) -> String {
    let mib = u64::from(error.needed_kib).div_ceil(1 << 10);
    match settings {
        Settings::Configuration => format!("`max-kdf-memory = \"{mib}M\"` under [volume] lets nbdcrypt try it anyway"),
        Settings::Options { key_slot: true } => {
            format!("or name another keyslot with --key-slot; `--max-kdf-memory {mib}M` lets nbdcrypt try it anyway")
        }
        Settings::Options { key_slot: false } => format!("`--max-kdf-memory {mib}M` lets nbdcrypt try it anyway"),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use engine::luks::KeyslotFault;
    use engine::luks::luks2::{HeaderCopy, RefusedCopy};
    use engine::signature::{Kind, Signature};

    use super::super::Cli;
    use super::*;
    use crate::machine::memory;

    /// The errors that can occur in every command that opens a volume.
    fn of_opening() -> Vec<anyhow::Error> {
        let expensive =
            |field: &str| LuksError::TooExpensive { field: format!("keyslots.0.kdf.{field}"), found: 9, limit: 8 };
        let keyslot = |others| {
            let fault = KeyslotFault::Overwritten { sector: 8 };
            LuksError::Keyslot { keyslot: 1, fault, others }
        };
        let errors = [
            LuksError::Corrupt { field: "x".to_owned(), found: "y".to_owned() },
            LuksError::BeyondRepair { field: "x".to_owned(), found: "y".to_owned() },
            LuksError::TooManyIterations { field: "x".to_owned(), found: 9, limit: 8 },
            expensive("memory"),
            expensive("time"),
            expensive("cpus"),
            LuksError::TooMuchWork { keyslot: 1 },
            LuksError::OutOfMemory { keyslot: 1, kib: 1 },
            LuksError::Detached,
            LuksError::WrongPassphrase,
            LuksError::WrongPassphraseBesideIgnored { ignored: 3 },
            LuksError::WrongPassphraseFor(1),
            LuksError::AllIgnored { keyslot: 3 },
            keyslot(Others::DoNotOpen),
            keyslot(Others::Untried),
            LuksError::NoSuchKeyslot(1),
            LuksError::UndecidedKeyslot { keyslot: 1, state: 1 },
        ];
        let memory = TooLittleMemory { keyslot: "1".to_owned(), needed_kib: 1 << 30, limit: memory::limit() };
        errors.into_iter().map(anyhow::Error::from).chain([memory.into()]).collect()
    }

    /// More errors, which can occur in commands that change a header, such as `key add` and `header repair`.
    fn of_changing() -> Vec<anyhow::Error> {
        let refused = || RefusedCopy {
            copy: HeaderCopy::Primary,
            sequence_id: 4,
            whole_sequence_id: 3,
            reason: "no reason".to_owned(),
        };
        let errors = [
            LuksError::KeyslotInUse(1),
            LuksError::NoRoomForKey,
            LuksError::CopyNotUnderstood(Box::new(refused())),
            LuksError::CopiesDiffer(3),
            LuksError::AnotherOwner(Signature { name: "ext4", kind: Kind::Filesystem, offset: 1080 }),
            LuksError::NotWritable("a number"),
            LuksError::MetadataFull { needed: 2, available: 1 },
        ];
        errors.into_iter().map(anyhow::Error::from).collect()
    }

    /// The errors that can occur only in commands with `--force`.
    fn of_restoring() -> Vec<anyhow::Error> {
        let (backup, disk) = ("a".to_owned(), "b".to_owned());
        let errors = [
            LuksError::BackupOfAnother { what: "UUID", backup: backup.clone(), disk: disk.clone() },
            LuksError::BackupOfOtherKey { backup, disk },
            LuksError::BackupOfDamagedDigest { same: "its salt", differs: "the digest itself" },
            LuksError::BackupNotComparable { header: "the backup" },
            LuksError::BackupOfUnfinished { header: "the backup", requirement: "online-reencrypt".to_owned() },
        ];
        errors.into_iter().map(anyhow::Error::from).collect()
    }

    fn both(mut first: Vec<anyhow::Error>, second: Vec<anyhow::Error>) -> Vec<anyhow::Error> {
        first.extend(second);
        first
    }

    fn parsed(command: &str) -> Cli {
        Cli::try_parse_from(command.split(' ')).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Returns whether the command has the option, such as `--force`.
    fn has_option(command: &str, option: &str) -> bool {
        let mut found = Cli::command();
        for word in command.split(' ').skip(1) {
            let Some(inner) = found.find_subcommand(word) else { break };
            found = inner.clone();
        }
        found.get_arguments().any(|argument| argument.get_long() == option.strip_prefix("--"))
    }

    /// Checks advice for a command. Each complete nbdcrypt command in the advice must parse. Each option elsewhere in the
    /// advice must be an option of the command in use.
    fn check(command: &str, advice: &str) {
        for (index, part) in advice.split('`').enumerate() {
            if part.starts_with("nbdcrypt ") && index % 2 == 1 {
                // Commands that are named without arguments are not complete.
                if part.contains("--") {
                    let device = if part.contains("DEVICE") { "" } else { " DEVICE" };
                    parsed(&format!("{part}{device}"));
                }
            } else if !part.starts_with("cryptsetup ") && !part.starts_with("wipefs ") {
                let words = part.split([' ', ',', ';', '(', ')']);
                for option in words.filter(|word| word.starts_with("--")) {
                    assert!(has_option(command, option), "{command} has no {option}: {advice}");
                }
            }
        }
        assert!(!advice.ends_with('.'), "{advice}");
    }

    #[test]
    fn advice_names_only_options_of_the_command_in_use() {
        let mut checked = 0;
        for (command, errors) in [
            ("nbdcrypt up CONFIG", of_opening()),
            ("nbdcrypt plan CONFIG", of_opening()),
            ("nbdcrypt key verify CONFIG", of_opening()),
            ("nbdcrypt key rewrap DEVICE --config CONFIG", both(of_opening(), of_changing())),
            ("nbdcrypt serve DEVICE --socket SOCKET", of_opening()),
            ("nbdcrypt key test DEVICE", of_opening()),
            ("nbdcrypt key add DEVICE", both(of_opening(), of_changing())),
            ("nbdcrypt key remove DEVICE", both(of_opening(), vec![LuksError::LastKeyslot(1).into()])),
            ("nbdcrypt key change DEVICE", both(of_opening(), vec![LuksError::NoRoomToChange(1).into()])),
            ("nbdcrypt token import DEVICE", both(of_changing(), vec![LuksError::TokenExists(1).into()])),
            ("nbdcrypt header repair DEVICE", of_changing()),
            ("nbdcrypt header restore DEVICE FILE", both(of_changing(), of_restoring())),
        ] {
            let settings = parsed(command).command.settings();
            for error in errors {
                if let Some(advice) = about(&error, settings) {
                    check(command, &advice);
                    checked += 1;
                }
            }
        }
        assert!(checked > 100, "{checked}");
    }

    #[test]
    fn advice_depends_on_where_the_settings_are() {
        let error = || anyhow::Error::from(LuksError::AllIgnored { keyslot: 3 }).context("disk");
        let with_option = about(&error(), Settings::Options { key_slot: true }).unwrap();
        let without = about(&error(), Settings::Configuration).unwrap();
        assert!(with_option.starts_with("--key-slot 3 tries"), "{with_option}");
        assert_eq!(without, "`nbdcrypt key priority --key-slot 3 DEVICE normal` lets nbdcrypt try it again");
        let many = || LuksError::TooManyIterations { field: "x".to_owned(), found: 9, limit: 8 }.into();
        assert!(about(&many(), Settings::Configuration).unwrap().contains("`max-kdf-iterations`"));
        assert!(about(&many(), Settings::Options { key_slot: false }).unwrap().contains("--max-kdf-iterations"));
    }

    /// A transparent error shows the text of the error inside it as its own, and leaves that error out of the chain of
    /// causes.
    #[test]
    fn advice_is_found_inside_transparent_errors() {
        let inner = || LuksError::WrongPassphrase;
        let token = || NoTokenSecret::Luks(inner());
        let errors: [anyhow::Error; 4] = [
            token().into(),
            RewrapError::Luks(inner()).into(),
            RewrapError::Token(token()).into(),
            RewrapError::Opens(inner()).into(),
        ];
        for error in errors {
            let advice = about(&error, Settings::Configuration);
            assert_eq!(advice.as_deref(), Some("`nbdcrypt key list DEVICE` shows the keyslots"), "{error:?}");
        }
    }
}
