//! What a path is given: a run of data units, and the numbers that their tweaks are made of.

use cipher::inout::InOutBuf;

use crate::sector::{Lba512, SectorSize};

/// Bytes in an AES block.
pub(super) const BLOCK: usize = 16;

/// A run of whole sectors, each one data unit, read from one buffer and written to the same or another one.
pub(super) struct Run<'i, 'o> {
    sector_size: SectorSize,
    numbers: UnitNumbers,
    data: InOutBuf<'i, 'o, u8>,
}

impl<'i, 'o> Run<'i, 'o> {
    /// A run whose first data unit has the number `first`.
    ///
    /// # Panics
    /// When `data` is not a whole number of sectors.
    pub(super) fn new(sector_size: SectorSize, first: u128, data: InOutBuf<'i, 'o, u8>) -> Self {
        assert!(
            data.len().is_multiple_of(sector_size.bytes()),
            "{} bytes are no run of whole {sector_size}-byte sectors",
            data.len()
        );
        Self { sector_size, numbers: UnitNumbers::new(first, sector_size.lba_step()), data }
    }

    /// The same run with its units numbered one by one, and not by the 512-byte units that they span.
    ///
    /// # Panics
    /// When the first does not begin on such a unit, or they go past the last number: dm-crypt counts 512-byte units, and
    /// after the last of 2⁶⁴ it has the first, whose number is no successor.
    pub(super) fn numbered_by_sectors(mut self) -> Self {
        let UnitNumbers { low, step, .. } = self.numbers;
        let units = (self.data.len() / self.sector_size.bytes()) as u64;
        assert!(low.is_multiple_of(step), "512-byte unit {low} begins no sector of {step} units");
        assert!(units <= (u64::MAX - low) / step + 1, "sectors beyond 2⁶⁴ units of 512 bytes");
        self.numbers.low /= self.numbers.step;
        self.numbers.step = 1;
        self
    }

    /// The parts of a run, or of what remains of one, put together.
    pub(super) fn from_parts(sector_size: SectorSize, numbers: UnitNumbers, data: InOutBuf<'i, 'o, u8>) -> Self {
        Self { sector_size, numbers, data }
    }

    pub(super) fn into_parts(self) -> (SectorSize, UnitNumbers, InOutBuf<'i, 'o, u8>) {
        (self.sector_size, self.numbers, self.data)
    }
}

/// The numbers of the data units that follow one another: the low 64 bits advance, and wrap, as dm-crypt's `plain64` IV
/// does; the high ones stay. LUKS leaves the high ones zero; test vectors set them.
#[derive(Clone, Copy)]
pub(super) struct UnitNumbers {
    pub(super) low: u64,
    pub(super) high: u64,
    pub(super) step: u64,
}

impl UnitNumbers {
    fn new(first: u128, step: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of a number")]
        let (low, high) = (first as u64, (first >> 64) as u64);
        Self { low, high, step }
    }

    /// The numbers after the next `count` ones.
    pub(super) fn skipping(self, count: usize) -> Self {
        let mut rest = self;
        // Modulo 2⁶⁴, as advancing step by step would be.
        rest.low = self.low.wrapping_add(self.step.wrapping_mul(count as u64));
        rest
    }

    /// The next number. Its little-endian bytes, encrypted with the second key, are the tweak.
    pub(super) fn advance(&mut self) -> u128 {
        let number = u128::from(self.high) << 64 | u128::from(self.low);
        self.low = self.low.wrapping_add(self.step);
        number
    }
}

impl From<Lba512> for u128 {
    fn from(lba: Lba512) -> Self {
        Self::from(lba.0)
    }
}
