//! The input of every path: a run of data units, and the numbers from which their tweaks are computed.

use cipher::inout::InOutBuf;

use crate::sector::{Lba512, SectorSize};

/// Bytes in an AES block.
pub(super) const BLOCK: usize = 16;

/// A run of whole sectors. Each sector is one data unit. The input and the output are the same buffer or two different ones.
///
/// Every function that passes a run on is inlined, up to the function that is compiled for an instruction set. Otherwise
/// the run would be a value in memory, written in small parts and read in larger parts. Each call would then wait until the
/// stores of the previous call are done. On Zen 5 this costs a request of one sector a tenth of its time.
pub(super) struct Run<'i, 'o> {
    pub(super) sector_size: SectorSize,
    /// The number of the first data unit.
    pub(super) first: UnitNumber,
    /// The difference between the numbers of two consecutive units.
    pub(super) step: u64,
    pub(super) data: InOutBuf<'i, 'o, u8>,
}

impl<'i, 'o> Run<'i, 'o> {
    /// Returns a run whose first data unit has the number `first`.
    ///
    /// # Panics
    /// Panics if `data` is not a whole number of sectors.
    #[inline(always)]
    pub(super) fn new(sector_size: SectorSize, first: u128, data: InOutBuf<'i, 'o, u8>) -> Self {
        assert!(
            data.len().is_multiple_of(sector_size.bytes()),
            "{} bytes are not a run of whole {sector_size}-byte sectors",
            data.len()
        );
        Self { sector_size, first: UnitNumber::new(first), step: sector_size.lba_step(), data }
    }

    /// Returns the same run with its units numbered one by one instead of by the 512-byte units that they span.
    ///
    /// # Panics
    /// Panics if the first unit does not begin on a multiple of the sector size, or if the run goes past the last number.
    /// After the last number, dm-crypt would continue with unit 0, whose sector number does not follow the last one.
    #[inline(always)]
    pub(super) fn numbered_by_sectors(mut self) -> Self {
        let (low, step) = (self.first.low, self.step);
        let units = (self.data.len() / self.sector_size.bytes()) as u64;
        assert!(low.is_multiple_of(step), "512-byte unit {low} is not the start of a sector of {step} units");
        assert!(units <= (u64::MAX - low) / step + 1, "the run goes past 2⁶⁴ units of 512 bytes");
        self.first.low /= step;
        self.step = 1;
        self
    }
}

/// The number of a data unit. The low 64 bits advance and wrap, as dm-crypt's `plain64` IV does. The high 64 bits stay. LUKS
/// leaves them zero; test vectors set them.
///
/// A number is two words, so that it is passed in registers. In memory, it would be written in two halves and read as a
/// whole. Every call would then wait until all stores of the previous call are done.
#[derive(Clone, Copy)]
pub(super) struct UnitNumber {
    pub(super) low: u64,
    pub(super) high: u64,
}

impl UnitNumber {
    fn new(number: u128) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of a number")]
        let (low, high) = (number as u64, (number >> 64) as u64);
        Self { low, high }
    }

    /// Returns the number of the unit `count` units further on, where consecutive numbers are `step` apart.
    pub(super) fn after(self, count: usize, step: u64) -> Self {
        // Wraps at 2⁶⁴, as advancing step by step would.
        Self { low: self.low.wrapping_add(step.wrapping_mul(count as u64)), ..self }
    }

    /// Returns the number as a whole. Its little-endian bytes, encrypted with the second key, are the tweak.
    pub(super) fn whole(self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }
}

impl From<Lba512> for u128 {
    fn from(lba: Lba512) -> Self {
        Self::from(lba.0)
    }
}
