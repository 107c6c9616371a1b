//! What a disk or a volume holds already, so that nothing is ever made over it.

use std::path::Path;

use anyhow::{Result, anyhow};
use engine::luks::Segment;
use engine::signature::{self, Content, Kind, Signature};
use engine::store::{BlockStore, read_unaligned};
use engine::volume::Volume;

/// Bytes at the start of the data that a volume of which nothing was ever written has as zeros on its disk.
const BLANK: u64 = 1 << 20;

/// What the plaintext of an open volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plaintext {
    /// These, by their signatures.
    Holds(Vec<Signature>),
    /// Something was written, but nothing that is known.
    Unknown,
    /// Nothing was ever written: the disk has zeros where its ciphertext would begin.
    NeverWritten,
}

/// What the open volume holds.
///
/// # Errors
/// What the disk said.
pub fn of_plaintext(volume: &Volume, segment: Segment) -> Result<Plaintext> {
    let disk = volume.store().as_ref();
    let is_written = |from: u64, len: u64| -> Result<bool> {
        let mut ciphertext = vec![0; usize::try_from(len)?];
        read_unaligned(disk, &mut ciphertext, segment.offset + from)?;
        Ok(ciphertext.iter().any(|byte| *byte != 0))
    };
    let mut found = Vec::new();
    for mark in signature::probe(volume)? {
        // What nobody wrote decrypts to noise, in which a magic number of two bytes turns up soon enough.
        let sector = segment.sector_size.bytes_u64();
        if is_written(mark.offset - mark.offset % sector, sector)? {
            found.push(mark);
        }
    }
    if !found.is_empty() {
        return Ok(Plaintext::Holds(found));
    }
    Ok(if is_written(0, BLANK.min(segment.len))? { Plaintext::Unknown } else { Plaintext::NeverWritten })
}

/// Whether the disk is known as a LUKS volume, whatever else is on it.
pub fn is_luks(content: &Content) -> bool {
    matches!(content, Content::Known(found)
        if found.iter().any(|mark| mark.kind == Kind::Encryption && mark.name.starts_with("LUKS")))
}

/// Fails unless a disk may be formatted: it is blank, or was begun by nbdcrypt and never finished.
///
/// # Errors
/// What is on it, by name, and what to do.
pub fn refuse_unless_free(path: &Path, disk: &dyn BlockStore) -> Result<()> {
    match signature::examine(disk)? {
        Content::Blank | Content::Unfinished => Ok(()),
        content => Err(refusal(path, &content)),
    }
}

/// Fails where a file that was made for a new volume holds something all the same, which somebody else must have put there.
///
/// # Errors
/// What is in it, by name.
pub fn refuse_to_remove(path: &Path, disk: &dyn BlockStore) -> Result<()> {
    match signature::examine(disk)? {
        Content::Blank | Content::Unfinished => Ok(()),
        content => Err(anyhow!("{}, which was made, is not removed: by now it holds {content}", path.display())),
    }
}

/// Fails unless a disk is to hold data whose header is elsewhere: it is blank. What is not known may be the data of a volume
/// whose header is in another file.
///
/// # Errors
/// What is on it, by name, and what to do.
pub fn refuse_unless_blank(path: &Path, disk: &dyn BlockStore) -> Result<()> {
    match signature::examine(disk)? {
        Content::Blank => Ok(()),
        content => Err(refusal(path, &content).context(
            "the header is blank, so that a new one would be made, and with it a new key; but the data's disk is not",
        )),
    }
}

/// The words for a disk that holds something.
pub fn refusal(path: &Path, content: &Content) -> anyhow::Error {
    let at = path.display();
    anyhow!(
        "{at} is not blank. On it was found: {content}. Nothing was changed. If that may be destroyed, `nbdcrypt format \
         --wipe {at}` does so; otherwise choose another device"
    )
}
