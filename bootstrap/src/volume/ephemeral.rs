//! Volumes whose data need not survive: how long a volume lasts, and which disks may become such a volume again, unattended.

use anyhow::Result;
use engine::luks::luks2;
use engine::raid;
use engine::signature::{self, Content, Kind, Survey};
use engine::store::BlockStore;

use super::content::{self, Look, seed};

/// How long a volume must be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// For good. Only a blank disk becomes a new volume.
    #[default]
    Lasting,
    /// As long as its disks and its key are there (`ephemeral = true`).
    OfDisks,
    /// As long as the server that made it, because only this server has the key (`source = "ephemeral"`).
    OfServer,
}

impl Lifetime {
    /// Returns whether the data of the volume need not survive.
    pub fn is_ephemeral(self) -> bool {
        self != Self::Lasting
    }
}

/// What an ephemeral volume has left on a disk, without its key or without its other disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// The header of an ephemeral volume.
    Mark,
    /// Ciphertext without a header.
    Noise,
    /// A superblock of an ephemeral volume's array.
    Member,
}

impl Leftover {
    /// Names what was found, as the end of "it holds …".
    pub fn name(self) -> &'static str {
        match self {
            Self::Mark => "the mark of an earlier ephemeral volume",
            Self::Noise => "noise, as ciphertext without a header",
            Self::Member => "a member of an ephemeral volume's array",
        }
    }
}

/// The host in the name of an ephemeral volume's array, which `mdadm --examine` shows. It marks each member as expendable, because
/// the volume's header is on only one of them.
const HOST: &str = "nbdcrypt-ephemeral:";
/// Bytes that an array's name can have.
const NAME_LEN: usize = 32;

/// Returns the name of the array of the volume `volume`.
pub fn array_name(volume: &str, lifetime: Lifetime) -> String {
    let host = if lifetime.is_ephemeral() { HOST } else { "" };
    format!("{host}{}", &volume[..volume.floor_char_boundary(NAME_LEN - host.len())])
}

/// Returns what an ephemeral volume has left on a disk on which `look` has found `content`. Returns `None` if the disk holds
/// anything else, or nothing.
///
/// # Errors
/// The error of the disk or of the operating system's source of randomness.
pub fn leftover(disk: &dyn BlockStore, content: &Content, look: Look<'_>) -> Result<Option<Leftover>> {
    match content {
        Content::Blank | Content::Unfinished => return Ok(None),
        // A run that was cut off when it began a new volume has left its marker beside the second header.
        Content::Known(found)
            if content::is_luks(content)
                && found.iter().all(|mark| mark.name.starts_with("LUKS2") || mark.kind == Kind::Unfinished) =>
        {
            return Ok(luks2::is_ephemeral(disk)?.then_some(Leftover::Mark));
        }
        // A run that was cut off has left the marker of an unfinished format beside the superblock.
        Content::Known(found)
            if found.iter().any(|mark| mark.name == content::MD)
                && found.iter().all(|mark| mark.name == content::MD || mark.kind == Kind::Unfinished) =>
        {
            let superblock = raid::read_member(disk)?.superblock;
            let is_ours = superblock.is_ok_and(|superblock| superblock.name.to_string().starts_with(HOST));
            return Ok(is_ours.then_some(Leftover::Member));
        }
        Content::Known(_) | Content::Within { .. } | Content::Unknown { .. } => {}
    }
    let is_noise = match look {
        Look::Ends => signature::ends_read_as_noise(disk)?,
        Look::All(overwritten) => signature::reads_as_noise(disk, &Survey { seed: seed()?, overwritten })?,
    };
    Ok(is_noise.then_some(Leftover::Noise))
}
