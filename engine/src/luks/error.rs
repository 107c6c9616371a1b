//! Why a volume could not be opened or made.

use std::fmt;
use std::io;

use super::luks2::RefusedCopy;
use super::printable;
use crate::key::VolumeKeyError;
use crate::signature::Signature;
use crate::text::{bytes, human};

/// Why a volume could not be opened or made. The text says what was found. What to do about it depends on the program that
/// uses this crate, so the text names no command and no option of one.
#[derive(Debug, thiserror::Error)]
pub enum LuksError {
    /// The disk does not begin with a LUKS header.
    #[error("there is no LUKS header")]
    NotLuks,
    /// The disk carries the marker of an unfinished format.
    #[error("formatting was never finished, so there is no volume")]
    Unfinished,
    /// The marker of an unfinished format is gone.
    #[error(
        "the mark of the unfinished volume is gone, so another program has written to the disk; nbdcrypt leaves the disk as it \
         is"
    )]
    Overwritten,
    /// nbdcrypt does not know this LUKS version.
    #[error("the header has LUKS version {0}, which nbdcrypt does not support")]
    Version(u16),
    /// The header contradicts the specification.
    #[error("the LUKS header is corrupt: {field} is {found}")]
    Corrupt {
        /// The field, as the specification names it.
        field: String,
        /// The value of the field.
        found: String,
    },
    /// The header contradicts the specification, and the correct value is unknown.
    #[error("the LUKS header is corrupt and cannot be repaired: {field} is {found}")]
    BeyondRepair {
        /// The field, as the specification names it.
        field: String,
        /// The value of the field.
        found: String,
    },
    /// The header is valid, but asks for something that nbdcrypt does not support.
    #[error("the volume {0}")]
    Unsupported(Unsupported),
    /// The header asks for more work than is allowed.
    #[error("the header asks for {found} iterations in {field}, but the limit is {limit}")]
    TooManyIterations {
        /// The field that holds the excessive value.
        field: String,
        /// The number of iterations.
        found: u32,
        /// The limit.
        limit: u32,
    },
    /// The header asks for more memory, passes or lanes of Argon2 than is allowed.
    #[error(
        "the header asks for {field} of {}, but the limit is {}",
        of_field(field, *found),
        of_field(field, *limit)
    )]
    TooExpensive {
        /// The field that holds the excessive value.
        field: String,
        /// The cost.
        found: u32,
        /// The limit.
        limit: u32,
    },
    /// The keyslots together ask for more work than is allowed.
    #[error(
        "keyslot {keyslot} and those after it were not tried, because the keyslots before it ask for as much work as is \
         allowed for all together"
    )]
    TooMuchWork {
        /// The first keyslot that is not tried.
        keyslot: usize,
    },
    /// An option has a value that the format does not allow.
    #[error("cannot use {option} {found}: {rule}")]
    Impossible {
        /// The option.
        option: &'static str,
        /// Its value.
        found: String,
        /// Which values are possible.
        rule: String,
    },
    /// There is not enough memory for Argon2.
    #[error(
        "keyslot {keyslot} needs {} of memory and several threads, which this process cannot get",
        human(u64::from(*kib) << 10)
    )]
    OutOfMemory {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The memory in KiB.
        kib: u32,
    },
    /// The header is detached from the data.
    #[error("this is a detached header, and its data is on another disk")]
    Detached,
    /// The passphrase opens no keyslot, and all were tried.
    #[error("no keyslot opens with this passphrase")]
    WrongPassphrase,
    /// The passphrase opens none of the keyslots that were tried. At least one keyslot was not tried, because it is set to
    /// be ignored unless the caller names it.
    #[error(
        "no keyslot that was tried opens with this passphrase; keyslot {ignored} is set to be ignored unless it is named"
    )]
    WrongPassphraseBesideIgnored {
        /// The first ignored keyslot, from 0.
        ignored: usize,
    },
    /// The passphrase does not open the keyslot that was named, and no other was tried.
    #[error("this passphrase does not open keyslot {0}, and no other keyslot was tried")]
    WrongPassphraseFor(usize),
    /// No keyslot is in use: the key was erased.
    #[error("no keyslot is in use: the volume key was erased, and the data is lost for good")]
    NoKeyslot,
    /// The volume is ephemeral (see [`crate::luks::luks2::Ephemeral`]), so it has no keyslot.
    #[error(
        "the volume is ephemeral: its key exists only in the memory of the server that made it, so no secret opens it"
    )]
    Ephemeral,
    /// No keyslot was tried: each of them is tried only if it is named.
    #[error("every keyslot is set to be ignored unless it is named")]
    AllIgnored {
        /// The first keyslot, from 0.
        keyslot: usize,
    },
    /// A keyslot cannot be tried with any passphrase.
    #[error("keyslot {keyslot} {fault}, and no other keyslot {others}")]
    Keyslot {
        /// The keyslot, from 0. If there are several, the first one.
        keyslot: usize,
        /// What is wrong with the keyslot.
        #[source]
        fault: KeyslotFault,
        /// What is known about the other keyslots.
        others: Others,
    },
    /// The volume's key is not a key for AES-XTS.
    #[error(transparent)]
    Key(#[from] VolumeKeyError),
    /// The disk ends before the data begins.
    #[error("the disk has {}, and the volume needs at least {}", bytes(*available), bytes(*needed))]
    TooSmall {
        /// The bytes that the volume needs.
        needed: u64,
        /// The bytes that the disk has.
        available: u64,
    },
    /// The keyslot that was named holds no key.
    #[error("there is no key in keyslot {0}")]
    NoSuchKeyslot(usize),
    /// The state of a LUKS1 keyslot is damaged, so nbdcrypt does not know whether it is in use.
    #[error(
        "the state of keyslot {keyslot} is damaged: {state:#010x} is neither \"enabled\" nor \"disabled\", so this keyslot is not \
         used"
    )]
    UndecidedKeyslot {
        /// The keyslot, from 0.
        keyslot: usize,
        /// The damaged state.
        state: u32,
    },
    /// The keyslot that was named already holds a key.
    #[error("keyslot {0} holds a key already")]
    KeyslotInUse(usize),
    /// The format has no more keyslots, or the disk has no room for their key material.
    #[error("there is no room for another key")]
    NoRoomForKey,
    /// There is no room for the new key beside the old one.
    #[error(
        "the key in keyslot {0} cannot be changed safely: the header has no room for the new key beside the old one, so the \
         new key would be written over it, and after a crash in between neither passphrase would open the keyslot"
    )]
    NoRoomToChange(usize),
    /// The keyslot holds the only key.
    #[error("keyslot {0} holds the last key; without it, nobody can ever read the data again")]
    LastKeyslot(usize),
    /// The volume key belongs to another volume.
    #[error("the volume key does not belong to this volume")]
    WrongVolumeKey,
    /// One copy of the header is whole. The other copy has a correct checksum, but its contents are refused.
    #[error(
        "{0}. Nothing was written, because the {copy} copy may be the right one",
        copy = .0.copy
    )]
    CopyNotUnderstood(Box<RefusedCopy>),
    /// A restore would lose a copy of a header that is refused, but that another program would use.
    #[error("{header}: {refused}. {why}")]
    BackupBesideRefused {
        /// Which header: "the backup" or "the header on the disk".
        header: &'static str,
        /// The copy that is refused.
        refused: Box<RefusedCopy>,
        /// What a restore would do to it.
        why: &'static str,
    },
    /// Both copies of the header are whole and have the same sequence number, but their contents differ.
    #[error(
        "both copies of the header are valid and have the sequence number {0}, but they differ. Nothing was written, because \
         it is unknown which one is right"
    )]
    CopiesDiffer(u64),
    /// The first copy of the header is gone, and the disk holds something else.
    #[error(
        "there is no LUKS header at the start of the disk, but something else: {0}. Nothing was written, because that may be \
         in use"
    )]
    AnotherOwner(Signature),
    /// The JSON can be read, but nbdcrypt would change it by writing it back.
    #[error(
        "the header holds {0}, which nbdcrypt cannot write back unchanged; so the volume opens, but nbdcrypt does not change \
         the header"
    )]
    NotWritable(&'static str),
    /// The text in the header's UUID field is not a UUID.
    #[error("the UUID in the header is damaged: \"{0}\" is not a UUID")]
    DamagedUuid(String),
    /// The passphrase opens only a keyslot that holds a key other than the volume key.
    #[error(
        "this passphrase opens only keyslot {0}, which is unbound: the key in it is not this volume's, so it does not open the \
         volume"
    )]
    OpensUnbound(usize),
    /// The keyslot that was named holds a key other than the volume key.
    #[error("keyslot {0} is unbound: the key in it is not this volume's, so it does not open the volume")]
    UnboundKeyslot(usize),
    /// The JSON does not fit into its area.
    #[error(
        "the metadata would take {}, and its area has {}",
        bytes(*needed as u64),
        bytes(*available as u64)
    )]
    MetadataFull {
        /// The bytes that the JSON takes.
        needed: usize,
        /// The bytes that the area has.
        available: usize,
    },
    /// The token that was named does not exist.
    #[error("there is no token {0}")]
    NoSuchToken(u32),
    /// The number that was named belongs to another token.
    #[error("the header has a token {0} already")]
    TokenExists(u32),
    /// A token cannot be imported.
    #[error("the token cannot be imported: {0}")]
    Token(String),
    /// A LUKS1 volume was asked for something that only LUKS2 has.
    #[error("a LUKS1 volume has no {0}; only a LUKS2 volume has")]
    Luks2Only(&'static str),
    /// A header backup does not fit the disk.
    #[error("the backup does not fit the volume: {what} is {backup} in the backup, and {disk} on the disk")]
    BackupMismatch {
        /// What differs.
        what: &'static str,
        /// Its value in the backup.
        backup: String,
        /// Its value on the disk.
        disk: String,
    },
    /// A header backup is of another volume, or the disk has no header to compare it with.
    #[error("the backup may be of another volume: its {what} is {backup}, and {disk}")]
    BackupOfAnother {
        /// What differs.
        what: &'static str,
        /// Its value in the backup.
        backup: String,
        /// What is on the disk.
        disk: String,
    },
    /// A header backup holds another volume key than the disk.
    #[error(
        "the backup holds another volume key than the header on the disk, so after a restore all data on the disk would be \
         noise. The backup was made before the volume was reencrypted or formatted again, or it is of another volume (its UUID \
         is {backup}, the disk's is {disk}), or the header on the disk is damaged (then no passphrase opens it)"
    )]
    BackupOfOtherKey {
        /// The UUID in the backup.
        backup: String,
        /// The UUID on the disk.
        disk: String,
    },
    /// The digest of the volume key is damaged, in a header backup or in the header on the disk.
    #[error(
        "the digest of the volume key is damaged in the backup or in the header on the disk: {same} is the same in both, but \
         {differs} differs"
    )]
    BackupOfDamagedDigest {
        /// The field that is the same in both.
        same: &'static str,
        /// The field that is damaged in one of the two headers.
        differs: &'static str,
    },
    /// A header backup and the header on the disk cannot be compared, so they may have different volume keys.
    #[error(
        "{header} has no digest of the volume key that nbdcrypt supports, so nbdcrypt cannot check that the backup holds the key \
         of the data on the disk. With another key, all data on the disk would be noise after a restore"
    )]
    BackupNotComparable {
        /// Which header: "the backup" or "the header on the disk".
        header: &'static str,
    },
    /// A header backup or the disk's header belongs to a volume that is being reencrypted.
    #[error(
        "{header} says that the volume has the requirement {requirement}: part of the data may be encrypted with another key or \
         lie elsewhere, and would be noise after a restore"
    )]
    BackupOfUnfinished {
        /// Which header: "the backup" or "the header on the disk".
        header: &'static str,
        /// The requirement.
        requirement: String,
    },
    /// The source of randomness failed.
    #[error("cannot get random bytes: {0}")]
    Random(#[source] io::Error),
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] io::Error),
}

/// Returns the text of an Argon2 cost. In a header, memory is in KiB.
fn of_field(field: &str, cost: u32) -> String {
    match field.ends_with(".memory") {
        true => format!("{cost} KiB ({})", human(u64::from(cost) << 10)),
        false => cost.to_string(),
    }
}

/// Why a keyslot cannot be tried with any passphrase.
#[derive(Debug, thiserror::Error)]
pub enum KeyslotFault {
    /// Its key material was overwritten.
    #[error("is damaged (sector {sector} of the disk is not key material)")]
    Overwritten {
        /// The 512-byte sector of the disk that was overwritten.
        sector: u64,
    },
    /// Its key material cannot be read.
    #[error("cannot be read ({0})")]
    Unreadable(#[source] io::Error),
    /// Its key derivation has no iterations, in a LUKS1 header.
    #[error("is damaged: it has 0 iterations, so no passphrase can be tried on it")]
    NoIterations,
    /// It uses something that nbdcrypt does not support.
    #[error(transparent)]
    Unsupported(Unsupported),
}

impl KeyslotFault {
    /// Returns the error that the passphrase opens no keyslot, and this one could not be tried.
    pub(super) fn of(self, keyslot: usize) -> LuksError {
        LuksError::Keyslot { keyslot, fault: self, others: Others::DoNotOpen }
    }
}

/// What is known about the keyslots besides one that cannot be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// The passphrase opens none of them.
    DoNotOpen,
    /// None of them was tried, because the one that cannot be tried was named.
    Untried,
}

impl fmt::Display for Others {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DoNotOpen => "opens with this passphrase",
            Self::Untried => "was tried",
        })
    }
}

/// Something in a header that nbdcrypt does not support.
#[derive(Debug, thiserror::Error)]
#[error("uses the {what} {found}, which nbdcrypt does not support ({supported})")]
pub struct Unsupported {
    /// The kind of thing, such as "cipher" or "hash".
    pub what: &'static str,
    /// Its name.
    pub found: String,
    /// What nbdcrypt supports instead.
    pub supported: &'static str,
}

impl LuksError {
    /// Turns an error about all keyslots into an error about the named keyslot, the only one that was tried.
    pub(super) fn of_named_keyslot(self, keyslot: usize) -> Self {
        match self {
            Self::WrongPassphrase => Self::WrongPassphraseFor(keyslot),
            Self::Keyslot { keyslot, fault, .. } => Self::Keyslot { keyslot, fault, others: Others::Untried },
            Self::Unsupported(unsupported) => {
                Self::Keyslot { keyslot, fault: KeyslotFault::Unsupported(unsupported), others: Others::Untried }
            }
            other => other,
        }
    }

    pub(super) fn unsupported(what: &'static str, found: impl Into<String>, supported: &'static str) -> Self {
        Self::Unsupported(Unsupported { what, found: found.into(), supported })
    }

    pub(super) fn corrupt(field: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Corrupt { field: printable(&field.into()), found: printable(&found.into()) }
    }

    /// Turns an error into the error which says that a repair is not possible.
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
