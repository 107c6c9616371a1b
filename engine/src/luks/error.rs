//! Why a volume could not be opened or made.

use std::io;

use super::printable;
use crate::key::VolumeKeyError;

/// Why a volume could not be opened or made: what was found, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LuksError {
    /// The disk does not begin as a LUKS volume does.
    #[error("there is no LUKS header on it")]
    NotLuks,
    /// Formatting began here and did not end.
    #[error("formatting it was begun and never finished, so it holds no volume; format it again")]
    Unfinished,
    /// Something else is where a volume was being made.
    #[error("the mark of the unfinished volume is gone, so something else was written there; it was left as it is now")]
    Overwritten,
    /// A LUKS version that is not known here.
    #[error("its header is of LUKS version {0}, which nbdcrypt does not read")]
    Version(u16),
    /// The header contradicts the specification.
    #[error(
        "its LUKS header is corrupt: {field} is {found}; try `nbdcrypt header repair`, or restore the header from a backup"
    )]
    Corrupt {
        /// The field, as the specification names it.
        field: String,
        /// What stands there.
        found: String,
    },
    /// The header contradicts the specification, and what should stand there is not known.
    #[error("its LUKS header is corrupt, and cannot be repaired: {field} is {found}; restore the header from a backup")]
    BeyondRepair {
        /// The field, as the specification names it.
        field: String,
        /// What stands there.
        found: String,
    },
    /// The header is in order, but asks for something that nbdcrypt does not do.
    #[error("it uses the {what} {found}, which nbdcrypt does not do ({supported}); open it with cryptsetup")]
    Unsupported {
        /// What kind of thing: cipher, hash.
        what: &'static str,
        /// Its name.
        found: String,
        /// What would be understood.
        supported: &'static str,
    },
    /// The header asks for more work than is allowed.
    #[error(
        "its header asks for {found} iterations in {field}, more than the {limit} allowed; raise the limit if you trust it"
    )]
    TooManyIterations {
        /// The field that asks.
        field: String,
        /// How many it asks for.
        found: u32,
        /// How many are allowed.
        limit: u32,
    },
    /// The header asks for more memory, passes or lanes of Argon2 than is allowed.
    #[error("its header asks for {field} of {found}, more than the {limit} allowed; raise the limit if you trust it")]
    TooExpensive {
        /// The field that asks.
        field: String,
        /// How much it asks for.
        found: u32,
        /// How much is allowed.
        limit: u32,
    },
    /// The keyslots together ask for more work than is allowed.
    #[error(
        "the keyslots tried before keyslot {keyslot} ask for as much work as is allowed for all: it and those after it are \
         not tried unless they are named (--key-slot); raise the limits if you trust the header"
    )]
    TooMuchWork {
        /// The first that is not tried.
        keyslot: usize,
    },
    /// A volume cannot be made as it was asked for.
    #[error("no volume can be made with {option} {found}: {rule}")]
    Impossible {
        /// What was asked for.
        option: &'static str,
        /// Its value.
        found: String,
        /// What would be possible.
        rule: String,
    },
    /// There is not so much memory as Argon2 needs.
    #[error("keyslot {keyslot} needs {kib} KiB of memory to open, which are not to be had")]
    OutOfMemory {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The memory in KiB.
        kib: u32,
    },
    /// The header stands apart from the data.
    #[error("it is a detached header, whose data is on another disk: name that disk, and give this one with --header")]
    Detached,
    /// The passphrase opens none of the keyslots, all of which were tried.
    #[error("the passphrase is wrong: it opens none of the volume's keyslots")]
    WrongPassphrase,
    /// The passphrase opens none of the keyslots that were tried, and there is one that is not tried unless it is named.
    #[error(
        "the passphrase is wrong: it opens none of the keyslots that are tried; keyslot {ignored} is set to be ignored unless \
         it is named (`nbdcrypt key priority --key-slot {ignored} DEVICE normal` has it tried again)"
    )]
    WrongPassphraseBesideIgnored {
        /// The first ignored keyslot, from 0.
        ignored: usize,
    },
    /// The passphrase does not open the keyslot that was named, and no other was tried.
    #[error("the passphrase is wrong: it does not open keyslot {0}; without --key-slot every keyslot is tried")]
    WrongPassphraseFor(usize),
    /// No keyslot is in use: the key was erased.
    #[error("no keyslot is in use: the volume's key was erased, and its data is gone for good")]
    NoKeyslot,
    /// There are keyslots, and none that is tried without being named.
    #[error(
        "each of its keyslots is set to be ignored unless it is named (`nbdcrypt serve --key-slot {keyslot}`); \
         `nbdcrypt key priority --key-slot {keyslot} DEVICE normal` has one tried again"
    )]
    AllIgnored {
        /// The first keyslot, from 0.
        keyslot: usize,
    },
    /// A keyslot's key material was overwritten, and no whole keyslot opens.
    #[error(
        "keyslot {keyslot} is damaged (sector {sector} of the disk is no key material), and the passphrase opens no other; restore the header from a backup"
    )]
    DamagedKeyslot {
        /// The first damaged keyslot, from 0.
        keyslot: usize,
        /// The 512-byte sector of the disk that was overwritten.
        sector: u64,
    },
    /// A keyslot's key material cannot be read, and no other keyslot opens.
    #[error(
        "keyslot {keyslot} cannot be read ({source}), and the passphrase opens no other; restore the header from a backup"
    )]
    UnreadableKeyslot {
        /// The first such keyslot, from 0.
        keyslot: usize,
        /// What the disk said.
        source: io::Error,
    },
    /// The keyslot that was named cannot be tried, and no other was.
    #[error("keyslot {keyslot} {fault}; no other keyslot was tried: without --key-slot each of them is")]
    NamedKeyslot {
        /// The keyslot, from 0.
        keyslot: usize,
        /// What is wrong with it.
        fault: KeyslotFault,
    },
    /// The key that the volume was made with is no key for AES-XTS.
    #[error(transparent)]
    Key(#[from] VolumeKeyError),
    /// The disk ends before the data begins.
    #[error("the disk has {available} bytes, and the volume needs at least {needed}")]
    TooSmall {
        /// Bytes there should be.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// The keyslot that was named holds no key.
    #[error("there is no key in keyslot {0}; `nbdcrypt key list` shows those that there are")]
    NoSuchKeyslot(usize),
    /// The keyslot that was named holds a key already.
    #[error("keyslot {0} holds a key already: choose another, or remove it first")]
    KeyslotInUse(usize),
    /// The format has no more keyslots, or the disk no room for their key material.
    #[error("there is no room for another key: remove one first")]
    NoRoomForKey,
    /// The key is the only one.
    #[error("keyslot {0} holds the last key: without it nobody can ever read the data again; use --force to mean it")]
    LastKeyslot(usize),
    /// The volume key is another volume's.
    #[error("the volume key does not belong to this volume")]
    WrongVolumeKey,
    /// The newer copy of the header is whole, and says what is not understood here.
    #[error(
        "the newer copy of its header is whole, but {0}; nothing is written in its place: look at it with cryptsetup, or use \
         `nbdcrypt header repair` to give it up for the older copy"
    )]
    NotUnderstood(Box<LuksError>),
    /// The JSON would not fit in its area.
    #[error("the metadata would take {needed} bytes, and its area has {available}; remove a token or a keyslot first")]
    MetadataFull {
        /// Bytes it would take.
        needed: usize,
        /// Bytes there are.
        available: usize,
    },
    /// The token that was named is not there.
    #[error("there is no token {0}; `nbdcrypt token list` shows those that there are")]
    NoSuchToken(u32),
    /// A token cannot be imported.
    #[error("the token cannot be imported: {0}")]
    Token(String),
    /// A LUKS1 volume was asked for what LUKS2 alone has.
    #[error("a LUKS1 volume has no {0}: LUKS2 has")]
    Luks2Only(&'static str),
    /// A header backup does not fit the disk.
    #[error("the backup does not fit the volume: {what} is {backup} in it, and {disk} on the disk")]
    BackupMismatch {
        /// What differs.
        what: &'static str,
        /// In the backup.
        backup: String,
        /// On the disk.
        disk: String,
    },
    /// A header backup is another volume's, as far as can be told.
    #[error(
        "the backup may be another volume's: its {what} is {backup}, and {disk}; use --force to restore it all the same"
    )]
    BackupOfAnother {
        /// What differs.
        what: &'static str,
        /// In the backup.
        backup: String,
        /// What there is on the disk.
        disk: String,
    },
    /// No randomness was to be had.
    #[error("no random bytes to be had: {0}")]
    Random(#[source] io::Error),
    /// What the disk said.
    #[error(transparent)]
    Store(#[from] io::Error),
}

/// Why a keyslot cannot be tried, whatever the passphrase.
#[derive(Debug, thiserror::Error)]
pub enum KeyslotFault {
    /// Its key material was overwritten.
    #[error("is damaged (sector {sector} of the disk is no key material)")]
    Overwritten {
        /// The 512-byte sector of the disk that was overwritten.
        sector: u64,
    },
    /// Its key material cannot be read.
    #[error("cannot be read ({0})")]
    Unreadable(#[source] io::Error),
    /// It uses what nbdcrypt does not do.
    #[error("uses the {what} {found}, which nbdcrypt does not do ({supported})")]
    Unsupported {
        /// What kind of thing: cipher, key derivation.
        what: &'static str,
        /// Its name.
        found: String,
        /// What would be understood.
        supported: &'static str,
    },
}

impl LuksError {
    /// What stands in the way of the one keyslot that was tried, since it was named.
    pub(super) fn of_named_keyslot(self, keyslot: usize) -> Self {
        let fault = match self {
            Self::WrongPassphrase => return Self::WrongPassphraseFor(keyslot),
            Self::DamagedKeyslot { sector, .. } => KeyslotFault::Overwritten { sector },
            Self::UnreadableKeyslot { source, .. } => KeyslotFault::Unreadable(source),
            Self::Unsupported { what, found, supported } => KeyslotFault::Unsupported { what, found, supported },
            other => return other,
        };
        Self::NamedKeyslot { keyslot, fault }
    }

    pub(super) fn corrupt(field: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Corrupt { field: printable(&field.into()), found: printable(&found.into()) }
    }

    /// What is wrong with a header, once it was tried to repair it.
    pub(super) fn beyond_repair(self) -> Self {
        match self {
            Self::Corrupt { field, found } => Self::BeyondRepair { field, found },
            other => other,
        }
    }

    pub(super) fn impossible(option: &'static str, found: impl ToString, rule: impl Into<String>) -> Self {
        Self::Impossible { option, found: found.to_string(), rule: rule.into() }
    }
}
