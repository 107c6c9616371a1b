//! The two units of the disk: the encryption sector, and the 512-byte unit in which LUKS counts the IV.

use std::fmt;

/// Bytes in the unit that LUKS and dm-crypt count in, whatever the sector size.
pub const LBA_UNIT: u64 = 512;

/// The encryption unit: 512, 1024, 2048 or 4096 bytes. Each sector is one XTS data unit with a tweak of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorSize(u16);

impl SectorSize {
    /// 512 bytes: the only size of LUKS1 and of plain dm-crypt's default.
    pub const B512: Self = Self(512);
    /// 1024 bytes.
    pub const B1024: Self = Self(1024);
    /// 2048 bytes.
    pub const B2048: Self = Self(2048);
    /// 4096 bytes: one page, one block of most filesystems.
    pub const B4096: Self = Self(4096);
    /// Every size there is, smallest first.
    pub const ALL: [Self; 4] = [Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// The sector size of so many bytes, if it is one of [`SectorSize::ALL`].
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|size| u64::from(size.0) == bytes)
    }

    /// The size in bytes.
    pub fn bytes(self) -> usize {
        usize::from(self.0)
    }

    /// The size in bytes, as an offset.
    pub fn bytes_u64(self) -> u64 {
        u64::from(self.0)
    }

    /// How many 512-byte units one sector spans: what the IV advances by from a sector to the next.
    pub fn lba_step(self) -> u64 {
        u64::from(self.0) / LBA_UNIT
    }
}

impl fmt::Debug for SectorSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

impl fmt::Display for SectorSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A position counted in 512-byte units, which is what the `plain64` IV holds even where sectors are larger
/// (cryptsetup never sets dm-crypt's `iv_large_sectors` for LUKS).
///
/// Arithmetic wraps at 2⁶⁴, as dm-crypt's does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba512(pub u64);

impl Lba512 {
    /// The position `units` 512-byte units further on.
    #[must_use]
    pub fn advanced_by(self, units: u64) -> Self {
        Self(self.0.wrapping_add(units))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_four_sizes_of_luks_are_sector_sizes() {
        for bytes in 0..=8192u64 {
            let expected = [512, 1024, 2048, 4096].contains(&bytes);
            assert_eq!(SectorSize::from_bytes(bytes).is_some(), expected, "{bytes}");
        }
    }

    #[test]
    fn the_iv_advances_by_eight_over_a_4096_byte_sector() {
        assert_eq!(SectorSize::B512.lba_step(), 1);
        assert_eq!(SectorSize::B4096.lba_step(), 8);
        assert_eq!(Lba512(u64::MAX).advanced_by(2), Lba512(1));
    }
}
