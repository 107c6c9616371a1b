//! The two units of the disk: the encryption sector, and the 512-byte unit in which LUKS counts the IV.

use std::fmt;

/// Bytes of the unit in which LUKS and dm-crypt count. It does not depend on the sector size.
pub const LBA_UNIT: u64 = 512;

/// The encryption unit: 512, 1024, 2048 or 4096 bytes. Each sector is one XTS data unit with its own tweak.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorSize(u16);

impl SectorSize {
    /// 512 bytes: the only size of LUKS1, and the default of plain dm-crypt.
    pub const B512: Self = Self(512);
    /// 1024 bytes.
    pub const B1024: Self = Self(1024);
    /// 2048 bytes.
    pub const B2048: Self = Self(2048);
    /// 4096 bytes: one page, one block of most filesystems.
    pub const B4096: Self = Self(4096);
    /// All sizes, the smallest first.
    pub const ALL: [Self; 4] = [Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// Returns the sector size of `bytes` bytes, or `None` if it is not one of [`SectorSize::ALL`].
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|size| u64::from(size.0) == bytes)
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> usize {
        usize::from(self.0)
    }

    /// Returns the size in bytes, in the type of offsets.
    pub fn bytes_u64(self) -> u64 {
        u64::from(self.0)
    }

    /// Returns how many 512-byte units one sector spans. The IV advances by this number from one sector to the next.
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

/// A position counted in 512-byte units. The `plain64` IV counts these units even if sectors are larger (cryptsetup
/// never sets dm-crypt's `iv_large_sectors` for LUKS).
///
/// Arithmetic wraps at 2⁶⁴, as dm-crypt's does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba512(pub u64);

impl Lba512 {
    /// Returns the position that lies `units` 512-byte units further on.
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
