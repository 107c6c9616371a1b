//! The segments: where the data lies, and how it is encrypted.

use super::field::Field;
use crate::luks::LuksError;
use crate::sector::LBA_UNIT;

/// A segment of the disk that holds data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSegment {
    /// The type: `crypt`, or `linear` while the volume is being converted.
    pub kind: String,
    /// The offset in bytes from the start of the disk.
    pub offset: u64,
    /// The length in bytes. `None` means up to the end of the disk.
    pub size: Option<u64>,
    /// The IV of the first sector.
    pub iv_tweak: u64,
    /// The cipher, such as `aes-xts-plain64`.
    pub encryption: String,
    /// The sector size in bytes.
    pub sector_size: u32,
    /// The name of the integrity algorithm, if there is one.
    pub integrity: Option<String>,
    /// Flags such as `backup-previous`.
    pub flags: Vec<String>,
}

impl DataSegment {
    pub(super) fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        let size = field.get("size");
        let kind = field.get("type").name()?.to_owned();
        let is_crypt = kind == "crypt";
        let segment = Self {
            offset: field.get("offset").long()?,
            size: if size.text()? == "dynamic" { None } else { Some(size.long()?) },
            iv_tweak: if is_crypt { field.get("iv_tweak").long()? } else { 0 },
            encryption: if is_crypt { field.get("encryption").name()?.to_owned() } else { String::new() },
            sector_size: if is_crypt { field.get("sector_size").integer()? } else { 512 },
            integrity: match field.optional("integrity") {
                None => None,
                Some(integrity) => {
                    integrity.get("journal_encryption").name()?;
                    integrity.get("journal_integrity").name()?;
                    Some(integrity.get("type").name()?.to_owned())
                }
            },
            flags: field.optional("flags").map_or(Ok(Vec::new()), |field| field.texts())?,
            kind,
        };
        if !matches!(segment.sector_size, 512 | 1024 | 2048 | 4096) {
            return Err(field.get("sector_size").corrupt(segment.sector_size.to_string()));
        }
        if !segment.offset.is_multiple_of(LBA_UNIT) {
            return Err(field.get("offset").corrupt(segment.offset.to_string()));
        }
        // dm-crypt: "Invalid iv_offset sector".
        if !segment.iv_tweak.is_multiple_of(u64::from(segment.sector_size) / LBA_UNIT) {
            return Err(field.get("iv_tweak").corrupt(segment.iv_tweak.to_string()));
        }
        if segment.size.is_some_and(|size| size == 0 || !size.is_multiple_of(u64::from(segment.sector_size))) {
            return Err(size.corrupt(format!("{}, not whole sectors", size.text()?)));
        }
        Ok(segment)
    }

    /// Returns whether the segment is only a record of the layout before or after a reencryption.
    pub(in crate::luks) fn is_backup(&self) -> bool {
        self.flags.iter().any(|flag| flag.starts_with("backup-"))
    }
}
