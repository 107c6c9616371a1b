//! What a path is given: a run of data units, and the numbers that their tweaks are made of.

use cipher::inout::InOutBuf;

use crate::sector::{Lba512, SectorSize};

/// Bytes in an AES block.
pub(super) const BLOCK: usize = 16;

/// A run of whole sectors, each one data unit, read from one buffer and written to the same or another one.
///
/// What hands on a run is inlined, down to the function that is compiled for an instruction set: as a value in memory it would be
/// copied in larger parts than it was written in, and then each call waits until the stores of the one before it are done.
/// That costs a request of one sector a tenth of its time (Zen 5).
pub(super) struct Run<'i, 'o> {
    pub(super) sector_size: SectorSize,
    /// The first data unit's number.
    pub(super) first: UnitNumber,
    /// From a unit's number to the next one's.
    pub(super) step: u64,
    pub(super) data: InOutBuf<'i, 'o, u8>,
}

impl<'i, 'o> Run<'i, 'o> {
    /// A run whose first data unit has the number `first`.
    ///
    /// # Panics
    /// When `data` is not a whole number of sectors.
    #[inline(always)]
    pub(super) fn new(sector_size: SectorSize, first: u128, data: InOutBuf<'i, 'o, u8>) -> Self {
        assert!(
            data.len().is_multiple_of(sector_size.bytes()),
            "{} bytes are no run of whole {sector_size}-byte sectors",
            data.len()
        );
        Self { sector_size, first: UnitNumber::new(first), step: sector_size.lba_step(), data }
    }

    /// The same run with its units numbered one by one, and not by the 512-byte units that they span.
    ///
    /// # Panics
    /// When the first does not begin on such a unit, or they go past the last number: dm-crypt counts 512-byte units, and
    /// after the last of 2⁶⁴ it has the first, whose number is no successor.
    #[inline(always)]
    pub(super) fn numbered_by_sectors(mut self) -> Self {
        let (low, step) = (self.first.low, self.step);
        let units = (self.data.len() / self.sector_size.bytes()) as u64;
        assert!(low.is_multiple_of(step), "512-byte unit {low} begins no sector of {step} units");
        assert!(units <= (u64::MAX - low) / step + 1, "sectors beyond 2⁶⁴ units of 512 bytes");
        self.first.low /= step;
        self.step = 1;
        self
    }
}

/// The number of a data unit: the low 64 bits advance, and wrap, as dm-crypt's `plain64` IV does; the high ones stay. LUKS
/// leaves the high ones zero; test vectors set them.
///
/// Two words, which are passed in registers: written to memory half by half and loaded as a whole, a number would keep
/// every call waiting until all stores of the one before it are done.
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

    /// The number of the unit after the next `count` ones, whose numbers are `step` apart.
    pub(super) fn after(self, count: usize, step: u64) -> Self {
        // Modulo 2⁶⁴, as advancing step by step would be.
        Self { low: self.low.wrapping_add(step.wrapping_mul(count as u64)), ..self }
    }

    /// As a whole. Its little-endian bytes, encrypted with the second key, are the tweak.
    pub(super) fn whole(self) -> u128 {
        u128::from(self.high) << 64 | u128::from(self.low)
    }
}

impl From<Lba512> for u128 {
    fn from(lba: Lba512) -> Self {
        Self::from(lba.0)
    }
}
