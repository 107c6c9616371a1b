//! The LUKS on-disk formats: header bytes to keys, and keys to header bytes.

use crate::sector::{Lba512, SectorSize};

/// Where a volume's data lies on its disk, and how it is encrypted there: what a LUKS header says beside the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the disk to the first encrypted sector.
    pub offset: u64,
    /// The length of the data in bytes.
    pub len: u64,
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// The IV of the first sector.
    pub iv_start: Lba512,
}
