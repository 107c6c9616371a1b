//! A LUKS2 header, changed: the next number of the sequence, written over one copy, flushed, then over the other.
//!
//! Cut off anywhere, one copy is whole, and holds what was before or what is now. That needs both copies whole and the
//! same to begin with: [`Update::open`] makes them so, from the newer one that is whole. Without that, an update that was
//! cut off, and a second one after it, could fall back on a header from before both, whose key material is gone.

use serde_json::Value;

use super::header::{self, BINARY_LEN, BinaryHeader, Copy, SALT_LEN};
use super::{Header, Metadata, ReadyDigest, data_segment, read_whole};
use crate::key::VolumeKey;
use crate::luks::{Limits, LuksError, Random};
use crate::store::{BlockStore, write_unaligned};

/// Objects and lists within each other, at most: cryptsetup reads 32 levels (json-c's `JSON_TOKENER_DEFAULT_DEPTH`).
const MAX_DEPTH: usize = 30;

/// Updates that a header must have numbers left for. Nobody counts that far: a header that is there is hostile, and after the
/// last number comes 0, which is older.
const NUMBERS_LEFT: u64 = 1 << 32;

/// A header whose copies are whole and the same, to be changed.
pub(super) struct Update<'s, 'r> {
    pub(super) store: &'s dyn BlockStore,
    pub(super) random: &'r mut dyn FnMut(&mut [u8]) -> std::io::Result<()>,
    pub(super) binary: BinaryHeader,
    pub(super) metadata: Metadata,
}

/// Which copies of a header had to be written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// The one at the start of the disk.
    pub primary: bool,
    /// The one behind it.
    pub secondary: bool,
}

/// Writes a copy of the header that is broken or old anew, from the other one.
///
/// # Errors
/// As [`super::read_header`] has them, with the disk untouched, where neither is whole; else what the disk said.
pub fn repair(store: &dyn BlockStore, random: Random<'_>) -> Result<Repaired, LuksError> {
    Update::with_repaired(store, random).map(|(_, repaired)| repaired)
}

impl<'s, 'r> Update<'s, 'r> {
    /// Reads the header, and repairs what an update that was cut off has left.
    pub(super) fn open(store: &'s dyn BlockStore, random: Random<'r>) -> Result<Self, LuksError> {
        if let Some((binary, area)) = header::read(store)?.first()
            && let Err(error) = Metadata::parse(binary, area)
        {
            // A program that knows more than this one may have written it. The older copy is enough to open the volume.
            return Err(LuksError::NotUnderstood(Box::new(error)));
        }
        let (update, _) = Self::with_repaired(store, random)?;
        if let Some(requirement) = update.metadata.config.requirements.first() {
            let supported = "it knows none, and changes no header that it does not understand";
            return Err(LuksError::Unsupported { what: "requirement", found: requirement.clone(), supported });
        }
        if update.binary.sequence_id > u64::MAX - NUMBERS_LEFT {
            return Err(LuksError::corrupt("seqid", update.binary.sequence_id.to_string()));
        }
        Ok(update)
    }

    fn with_repaired(store: &'s dyn BlockStore, random: Random<'r>) -> Result<(Self, Repaired), LuksError> {
        let (Header { binary, metadata }, area) = read_whole(store)?;
        let (primary, secondary) = header::read_copies(store);
        let is_good = |copy: Result<(BinaryHeader, Vec<u8>), LuksError>| {
            copy.is_ok_and(|it| it == (binary.clone(), area.clone()))
        };
        let repaired = Repaired { primary: !is_good(primary), secondary: !is_good(secondary) };
        let mut update = Self { store, random, binary, metadata };
        if repaired.primary {
            update.write_copy(Copy::Primary, &area)?;
        }
        if repaired.secondary {
            update.write_copy(Copy::Secondary(update.binary.header_size), &area)?;
        }
        Ok((update, repaired))
    }

    /// Makes `json` the volume's metadata.
    ///
    /// # Errors
    /// [`LuksError::MetadataFull`] or [`LuksError::Corrupt`], with the disk untouched; else what the disk said.
    pub(super) fn commit(&mut self, json: &Value) -> Result<(), LuksError> {
        let mut area = json.to_string().into_bytes();
        // No truncation: a header is of 4 MiB at most.
        let available = usize::try_from(self.binary.header_size).unwrap_or(0) - BINARY_LEN;
        if area.len() >= available {
            return Err(LuksError::MetadataFull { needed: area.len() + 1, available });
        }
        if depth(json) > MAX_DEPTH {
            return Err(LuksError::Token(format!("it has objects within each other more than {MAX_DEPTH} deep")));
        }
        area.resize(available, 0);
        // What is written can be read again.
        let metadata = Metadata::parse(&self.binary, &area)?;
        self.binary.sequence_id += 1;
        self.write_copy(Copy::Primary, &area)?;
        self.write_copy(Copy::Secondary(self.binary.header_size), &area)?;
        self.metadata = metadata;
        Ok(())
    }

    /// The digest that `key` belongs to, of the volume's data.
    ///
    /// # Errors
    /// [`LuksError::WrongVolumeKey`], or what is not done here.
    pub(super) fn digest_of(&self, key: &VolumeKey, limits: &Limits) -> Result<u32, LuksError> {
        let (segment, _) = data_segment(&self.metadata)?;
        let digest = self.metadata.digests.iter().find(|(_, digest)| digest.segments.contains(&segment));
        let Some((id, digest)) = digest else {
            return Err(LuksError::corrupt("digests", format!("without one for segment {segment}")));
        };
        let is_right = ReadyDigest::new(*id, digest, limits)?.is_of(key.expose());
        if is_right { Ok(*id) } else { Err(LuksError::WrongVolumeKey) }
    }

    fn write_copy(&mut self, copy: Copy, area: &[u8]) -> Result<(), LuksError> {
        let mut salt = [0; SALT_LEN];
        (self.random)(&mut salt).map_err(LuksError::Random)?;
        let offset = match copy {
            Copy::Primary => 0,
            Copy::Secondary(offset) => offset,
        };
        write_unaligned(self.store, &self.binary.to_bytes(copy, salt, area), offset)?;
        self.store.flush()?;
        Ok(())
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(values) => 1 + values.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
