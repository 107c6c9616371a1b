//! Updates a LUKS2 header. The new header gets the next sequence number. It is written over the first copy, flushed,
//! written over the second copy, and flushed again.
//!
//! If this is interrupted at any point, one copy is whole and holds the old or the new header. This requires that both
//! copies are whole and equal at the start, so [`Update::open`] first copies the newer whole copy over the other copy.
//! Otherwise, after two interrupted updates in a row, the only whole header could be older than both updates, and its
//! key material could be overwritten already.

use serde_json::Value;

use super::header::{BINARY_LEN, BinaryHeader, Copies, Copy, Found, SALT_LEN, Whole};
use super::metadata::depth;
use super::{Header, Metadata, data_segment, key_digest};
use crate::key::VolumeKey;
use crate::luks::{Dump, Limits, LuksError, Random, dump};
use crate::signature::{self, Kind};
use crate::store::{BlockStore, write_unaligned};

/// The maximum nesting of objects and lists in a header that is changed. This is safely below the 32 levels that cryptsetup
/// reads (json-c's `JSON_TOKENER_DEFAULT_DEPTH`).
const MAX_DEPTH: usize = 30;

/// The number of updates that must still be possible before the sequence number overflows to 0, which counts as older.
/// No volume is updated 2³² times, so a header with a higher sequence number is malicious.
const NUMBERS_LEFT: u64 = 1 << 32;

/// An update of a header whose copies are whole and equal.
pub(super) struct Update<'s, 'r> {
    pub(super) store: &'s dyn BlockStore,
    pub(super) random: &'r mut dyn FnMut(&mut [u8]) -> std::io::Result<()>,
    pub(super) binary: BinaryHeader,
    pub(super) metadata: Metadata,
}

/// One of the two copies of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderCopy {
    /// The copy at the start of the disk.
    Primary,
    /// The copy after the primary copy.
    Secondary,
}

impl std::fmt::Display for HeaderCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        })
    }
}

impl HeaderCopy {
    /// Returns the other copy.
    pub fn other(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }
}

/// A copy of a header that has a correct checksum and is refused, while the other copy is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedCopy {
    /// The refused copy.
    pub copy: HeaderCopy,
    /// Its sequence number, which counts updates of the header.
    pub sequence_id: u64,
    /// The sequence number of the whole copy, with which the volume opens.
    pub whole_sequence_id: u64,
    /// Why it is refused.
    pub reason: String,
}

impl RefusedCopy {
    /// Returns whether a program that accepts this copy would open the volume with it. This is so if the copy is newer, or if
    /// both copies are equally old and this is the primary copy.
    pub fn would_be_used(&self) -> bool {
        match self.copy {
            HeaderCopy::Primary => self.sequence_id >= self.whole_sequence_id,
            HeaderCopy::Secondary => self.sequence_id > self.whole_sequence_id,
        }
    }
}

impl std::fmt::Display for RefusedCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { copy, sequence_id, whole_sequence_id, reason } = self;
        write!(
            f,
            "the {copy} copy of the header (sequence number {sequence_id}) has a correct checksum, but its contents are refused: \
             {reason}. The {} copy (sequence number {whole_sequence_id}) is valid, and the volume opens with it",
            copy.other()
        )
    }
}

/// Returns a copy of the header on `store` that nbdcrypt refuses, but that another program would use. Returns `None` if
/// there is no such copy. If there is one, nbdcrypt opens the volume with an older header. The older header may lack keys
/// that were added later, and may contain keys that were removed later.
pub fn overlooked(store: &dyn BlockStore) -> Option<RefusedCopy> {
    Copies::read(store).refused().filter(RefusedCopy::would_be_used)
}

/// A copy of a header that is broken or missing, while the other copy is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenCopy {
    /// The broken copy.
    pub copy: HeaderCopy,
    /// What is wrong with it.
    pub reason: String,
}

/// Returns the broken copy of the header on `store` if the volume opens with the other copy. If that copy breaks as well, the
/// data is lost.
pub fn broken(store: &dyn BlockStore) -> Option<BrokenCopy> {
    let broken = Copies::read(store).broken()?;
    // The secondary copy may be left over from an old volume whose first header was overwritten, for example by a LUKS1
    // volume.
    let is_used = broken.copy == HeaderCopy::Secondary || matches!(dump(store), Ok(Dump::Luks2(_)));
    is_used.then_some(broken)
}

/// Which copies of a header were rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// The copy at the start of the disk.
    pub primary: bool,
    /// The copy after the primary copy.
    pub secondary: bool,
}

/// Rewrites a broken or outdated copy of the header from the other copy.
///
/// A copy is broken if its checksum is wrong. It is outdated if the other copy has a higher sequence number. If the
/// checksum is correct, a program wrote the copy on purpose. So invalid contents are not a reason to replace the copy.
///
/// # Errors
/// The errors of [`super::read_header`] if neither copy is whole; [`LuksError::CopyNotUnderstood`] or
/// [`LuksError::CopiesDiffer`] if it is unknown which copy is correct. The disk is then unchanged. Otherwise the error
/// of the disk or of `random`.
pub fn repair(store: &dyn BlockStore, random: Random<'_>) -> Result<Repaired, LuksError> {
    Update::with_repaired(store, random).map(|(_, repaired)| repaired)
}

/// Overwrites the other copy with the copy named by `copy`, even if the other copy is whole.
///
/// # Errors
/// An error that says what is wrong with the named copy, or [`LuksError::AnotherOwner`]; the disk is then unchanged. Otherwise
/// the error of the disk or of `random`.
pub fn repair_from(store: &dyn BlockStore, copy: HeaderCopy, random: Random<'_>) -> Result<Repaired, LuksError> {
    let copies = Copies::read(store);
    // The volume may have been abandoned, and the start of the disk may be in use for something else.
    if copy == HeaderCopy::Secondary && matches!(copies.primary, Found::Broken(LuksError::NotLuks)) {
        let other = signature::probe(store)?.into_iter().find(|found| found.kind != Kind::Encryption);
        if let Some(other) = other {
            return Err(LuksError::AnotherOwner(other));
        }
    }
    let wanted = match copy {
        HeaderCopy::Primary => copies.primary,
        HeaderCopy::Secondary => copies.secondary,
    };
    match wanted {
        Found::Whole(whole) => Update::from_copy(store, *whole, random).map(|(_, repaired)| repaired),
        Found::Refused { error, .. } | Found::Broken(error) => Err(error),
    }
}

/// Makes both copies equal to the copy that [`super::read_header`] returns. A caller that is about to replace the
/// header uses this.
///
/// # Errors
/// The errors of [`super::read_header`]; the disk is then unchanged. Otherwise the error of the disk or of `random`.
pub(in crate::luks) fn make_copies_equal(store: &dyn BlockStore, random: Random<'_>) -> Result<(), LuksError> {
    let mut whole = Copies::read(store).whole(store)?;
    Update::from_copy(store, whole.swap_remove(0), random).map(|_| ())
}

impl<'s, 'r> Update<'s, 'r> {
    /// Reads the header, and repairs the copies if an update was interrupted.
    pub(super) fn open(store: &'s dyn BlockStore, random: Random<'r>) -> Result<Self, LuksError> {
        let (update, _) = Self::with_repaired(store, random)?;
        if let Some(requirement) = update.metadata.config.requirements.first() {
            let supported = "it supports none, and does not change a header with one";
            return Err(LuksError::unsupported("requirement", requirement, supported));
        }
        if let Some(oddity) = update.metadata.oddity {
            return Err(LuksError::NotWritable(oddity));
        }
        // This is checked here, because `commit` runs only after a caller has overwritten key material.
        if depth(&update.metadata.json) > MAX_DEPTH {
            return Err(LuksError::NotWritable("objects that are nested more than 30 levels deep"));
        }
        if update.binary.sequence_id > u64::MAX - NUMBERS_LEFT {
            return Err(LuksError::corrupt("seqid", update.binary.sequence_id.to_string()));
        }
        Ok(update)
    }

    fn with_repaired(store: &'s dyn BlockStore, random: Random<'r>) -> Result<(Self, Repaired), LuksError> {
        let copies = Copies::read(store);
        if let Some(refused) = copies.refused() {
            return Err(LuksError::CopyNotUnderstood(Box::new(refused)));
        }
        let mut whole = copies.whole(store)?;
        if let [first, second] = whole.as_slice()
            && first.header.binary.sequence_id == second.header.binary.sequence_id
            && !first.says_the_same_as(second)
        {
            return Err(LuksError::CopiesDiffer(first.header.binary.sequence_id));
        }
        Self::from_copy(store, whole.swap_remove(0), random)
    }

    /// Rewrites the copies that differ from `chosen`.
    fn from_copy(store: &'s dyn BlockStore, chosen: Whole, random: Random<'r>) -> Result<(Self, Repaired), LuksError> {
        let Copies { primary, secondary } = Copies::read(store);
        let is_good = |copy: Found| matches!(copy, Found::Whole(whole) if *whole == chosen);
        let repaired = Repaired { primary: !is_good(primary), secondary: !is_good(secondary) };
        let Whole { header: Header { binary, metadata }, area } = chosen;
        let mut update = Self { store, random, binary, metadata };
        if repaired.primary {
            update.write_copy(Copy::Primary, &area)?;
        }
        if repaired.secondary {
            update.write_copy(Copy::Secondary(update.binary.header_size), &area)?;
        }
        Ok((update, repaired))
    }

    /// Makes `json` the metadata of the volume.
    ///
    /// # Errors
    /// [`LuksError::MetadataFull`], [`LuksError::Token`] or [`LuksError::Corrupt`]; the disk is then unchanged. Otherwise the
    /// error of the disk or of `random`.
    pub(super) fn commit(&mut self, json: &Value) -> Result<(), LuksError> {
        let mut area = json.to_string().into_bytes();
        // No truncation: a header has at most 4 MiB.
        let available = usize::try_from(self.binary.header_size).unwrap_or(0) - BINARY_LEN;
        if area.len() >= available {
            return Err(LuksError::MetadataFull { needed: area.len() + 1, available });
        }
        if depth(json) > MAX_DEPTH {
            return Err(LuksError::Token(format!("its objects are nested more than {MAX_DEPTH} levels deep")));
        }
        area.resize(available, 0);
        // Only metadata that can be read back is written.
        let metadata = Metadata::parse(&self.binary, &area)?;
        self.binary.sequence_id += 1;
        self.write_copy(Copy::Primary, &area)?;
        self.write_copy(Copy::Secondary(self.binary.header_size), &area)?;
        self.metadata = metadata;
        Ok(())
    }

    /// Returns the number of the digest that confirms the data's key, after checking that `key` is that key.
    ///
    /// # Errors
    /// [`LuksError::WrongVolumeKey`] if it is not, or an error about a digest that nbdcrypt does not support.
    pub(super) fn digest_of(&self, key: &VolumeKey, limits: &Limits) -> Result<u32, LuksError> {
        let (segment, _) = data_segment(&self.metadata)?;
        let Some((id, digest)) = self.metadata.digest_of_segment(segment) else {
            return Err(LuksError::corrupt("digests", format!("without a digest for segment {segment}")));
        };
        let is_right = key_digest(id, digest, limits)?.is_of(key.expose());
        if is_right { Ok(id) } else { Err(LuksError::WrongVolumeKey) }
    }

    fn write_copy(&mut self, copy: Copy, area: &[u8]) -> Result<(), LuksError> {
        let mut salt = [0; SALT_LEN];
        (self.random)(&mut salt).map_err(LuksError::Random)?;
        write_unaligned(self.store, &self.binary.to_bytes(copy, salt, area), copy.offset())?;
        self.store.flush()?;
        Ok(())
    }
}
