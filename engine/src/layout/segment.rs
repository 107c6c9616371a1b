//! The part of a disk that holds a volume's data.

use crate::sector::{Lba512, SectorSize};

/// Where a volume's data lies on its disk and how it is encrypted: everything that a LUKS header says
/// except the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the data disk to the first encrypted sector.
    pub offset: u64,
    /// The length of the data in bytes.
    pub len: u64,
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// The IV of the first sector.
    pub iv_start: Lba512,
}

impl Segment {
    /// Returns where on the disk the `len` bytes at `offset` of the volume lie, or `None` if they reach past the end of the
    /// volume.
    pub fn locate(&self, offset: u64, len: u64) -> Option<u64> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| self.offset + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_past_the_end_are_not_located() {
        let segment = Segment { offset: 4096, len: 1024, sector_size: SectorSize::B512, iv_start: Lba512(0) };
        assert_eq!(segment.locate(0, 1024), Some(4096));
        assert_eq!(segment.locate(1024, 0), Some(5120));
        assert_eq!(segment.locate(1023, 2), None);
        assert_eq!(segment.locate(u64::MAX, 1), None);
    }
}
