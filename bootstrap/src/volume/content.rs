//! Examines what a disk or a volume contains, so that nothing is overwritten by mistake.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use engine::layout::Segment;
use engine::luks;
use engine::signature::{self, Content, Kind, Signature, Survey, UNTOUCHED_LEN, Untouched};
use engine::store::{BlockStore, Medium, read_unaligned};
use engine::volume::Volume;

use super::data_disks::DataDisks;
use crate::machine::random;

/// The name of the signature of an array's member that `up` opens.
pub const MD: &str = "Linux md RAID (1.2)";

/// How closely to examine a disk.
#[derive(Clone, Copy, Debug)]
pub enum Look<'a> {
    /// The two ends, where volumes are recognised. This is quick, but does not show whether the rest is blank.
    Ends,
    /// Samples of the whole disk, and every byte of these ranges, which are about to be overwritten.
    All(&'a [Range<u64>]),
}

impl Look<'_> {
    /// Returns what this examination finds on the disk.
    ///
    /// # Errors
    /// The error of the disk or of the operating system's source of randomness.
    pub fn at(self, disk: &dyn BlockStore) -> Result<Content> {
        Ok(match self {
            Self::Ends => signature::examine(disk)?,
            Self::All(overwritten) => signature::survey(disk, &Survey { seed: seed()?, overwritten })?,
        })
    }
}

/// Returns a random seed for a survey. Nobody can predict the seed, so nobody can place data where the survey misses
/// it.
///
/// # Errors
/// The error of the operating system's source of randomness.
pub fn seed() -> Result<u64> {
    let mut bytes = [0; 8];
    random::fill(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What the plaintext of an open volume contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plaintext {
    /// Data with these signatures, at the volume's two ends.
    Holds(Vec<Signature>),
    /// Data was written, but the volume as a whole has no known format.
    Unknown(Content),
    /// Nothing was ever written. Where the disk would hold ciphertext, a survey finds only zeros, or only what the disk
    /// held before `nbdcrypt format --wipe` made the volume.
    NeverWritten,
}

/// Returns what the open volume contains.
///
/// # Errors
/// The error of the disk or of the operating system's source of randomness.
pub fn of_plaintext(volume: &Volume, segment: Segment) -> Result<Plaintext> {
    let disk = volume.store().as_ref();
    let is_written = |from: u64, len: u64| -> Result<bool> {
        let mut ciphertext = vec![0; usize::try_from(len)?];
        read_unaligned(disk, &mut ciphertext, segment.offset + from)?;
        Ok(ciphertext.iter().any(|byte| *byte != 0))
    };
    let mut found = Vec::new();
    for mark in signature::probe(volume)? {
        // Sectors that were never written decrypt to noise, in which a magic number of two bytes can appear by chance.
        let sector = segment.sector_size.bytes_u64();
        if is_written(mark.offset - mark.offset % sector, sector)? {
            found.push(mark);
        }
    }
    if !found.is_empty() {
        return Ok(Plaintext::Holds(found));
    }
    let ciphertext = segment.offset..segment.offset + segment.len;
    if segment.len >= UNTOUCHED_LEN as u64 {
        let mut start = [0; UNTOUCHED_LEN];
        volume.read(0, &mut start)?;
        if let Some(mark) = Untouched::parse(&start)
            && mark.is_true(disk, ciphertext.clone())?
        {
            return Ok(Plaintext::NeverWritten);
        }
    }
    Ok(match signature::first_written(disk, ciphertext, &Survey { seed: seed()?, overwritten: &[] })? {
        Some(offset) => Plaintext::Unknown(signature::name(volume, offset)?),
        None => Plaintext::NeverWritten,
    })
}

/// Returns whether the disk is recognised as a LUKS volume, whatever else is on it.
pub fn is_luks(content: &Content) -> bool {
    matches!(content, Content::Known(found)
        if found.iter().any(|mark| mark.kind == Kind::Encryption && mark.name.starts_with("LUKS")))
}

/// Checks that a disk may be formatted: it is blank, or contains only an unfinished format by nbdcrypt.
///
/// # Errors
/// If the disk contains anything else. The text names it and says what to do.
pub fn refuse_unless_free(path: &Path, disk: &dyn BlockStore, look: Look<'_>) -> Result<()> {
    match look.at(disk)? {
        Content::Blank | Content::Unfinished => Ok(()),
        content if is_too_small(disk) => Err(wrong_file(path.display(), disk, &content)),
        content => {
            let at = path.display();
            Err(anyhow!(
                "{}. Nothing was changed. To destroy everything on it and make the volume, run `nbdcrypt format --wipe {at}` \
                 with the same options; otherwise choose another device",
                not_blank(&at, &content)
            ))
        }
    }
}

/// Checks that a file that was made for a new volume is still empty. If it is not, another program must have written to it.
///
/// # Errors
/// If the file contains anything. The text names it.
pub fn refuse_to_remove(path: &Path, disk: &dyn BlockStore) -> Result<()> {
    match Look::All(&[]).at(disk)? {
        Content::Blank | Content::Unfinished => Ok(()),
        content => Err(anyhow!("{}, which was made, is not removed: by now it holds {content}", path.display())),
    }
}

/// Checks that a disk may hold the data of a new volume whose header is elsewhere: the disk is blank, or contains only
/// the remains of a format that nbdcrypt undid. Unknown content is refused, because it may be the data of a volume
/// whose header is in another file.
///
/// # Errors
/// If the disk contains anything else. The text names it and says what to do.
pub fn refuse_unless_blank(disks: &DataDisks, disk: &dyn BlockStore, look: Look<'_>) -> Result<()> {
    match look.at(disk)? {
        Content::Blank => Ok(()),
        // A caller that looks only at the ends has examined the whole disk before.
        Content::Unfinished if matches!(look, Look::Ends) || luks::is_abandoned(disk)? => Ok(()),
        content => Err(refusal(disks, disk, &content).context(
            "the header is blank, so a new one would be made with a new key; but the disk for the data is not blank",
        )),
    }
}

/// Checks that nothing was written to an array.
///
/// # Errors
/// If the array contains anything. The text names it and says what to do.
pub fn refuse_unless_blank_array(disks: &DataDisks, array: &dyn BlockStore, look: Look<'_>) -> Result<()> {
    match look.at(array)? {
        Content::Blank => Ok(()),
        content => Err(refusal(disks, array, &content)),
    }
}

/// Returns the error of `up` for a disk, or an array, that is not blank. `up` destroys nothing, so the text says how to empty it.
pub fn refusal(disks: &DataDisks, disk: &dyn BlockStore, content: &Content) -> anyhow::Error {
    if is_too_small(disk) {
        return wrong_file(disks, disk, content);
    }
    let Some(path) = disks.single() else {
        let members: Vec<_> = disks.paths().map(|path| format!("`blkdiscard {}`", path.display())).collect();
        return anyhow!(
            "{}. Nothing was changed: a volume is made only on a blank array. If everything on it may be destroyed, empty its \
             disks with {} and try again; otherwise name other devices",
            not_blank(disks, content),
            members.join(", ")
        );
    };
    let at = path.display();
    // In a file, holes read as zeros, so they count as blank.
    let is_file =
        matches!(disk.medium(), Medium::File { file, .. } if file.metadata().is_ok_and(|file| file.is_file()));
    let empty = match is_file {
        true => format!("`fallocate --punch-hole --offset 0 --length {} {at}`", disk.len()),
        false => format!(
            "`blkdiscard {at}` (seconds on an SSD or an instance store) or, if the disk does not support that or is not blank \
             afterwards, with `blkdiscard --zeroout {at}` (which writes the whole disk and may take hours),"
        ),
    };
    anyhow!(
        "{}. Nothing was changed: a volume is made only on a blank disk. If everything on it may be destroyed, empty it with \
         {empty} and try again; otherwise name another device",
        not_blank(disks, content)
    )
}

/// Returns whether the disk is too small for a volume and for a header. If it is, it is probably another file, such as a key
/// file that was given by mistake. The error must then not say how to empty it.
fn is_too_small(disk: &dyn BlockStore) -> bool {
    const LEAST: u64 = 64 << 10;
    disk.len() < LEAST
}

fn wrong_file(disks: impl fmt::Display, disk: &dyn BlockStore, content: &Content) -> anyhow::Error {
    anyhow!(
        "{}, and its {} are too few for a volume. Nothing was changed. Is it another file than you meant, such as the key file?",
        not_blank(disks, content),
        engine::text::bytes(disk.len())
    )
}

fn not_blank(disks: impl fmt::Display, content: &Content) -> String {
    format!("{disks} is not blank: it holds {content}")
}
