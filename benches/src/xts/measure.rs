//! Measures on a machine that may have other work. All contestants take a short turn in every round, so that a
//! disturbance affects neighbouring turns alike. Figures are medians. Ratios are medians of the ratios within each
//! round.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bootstrap::bench::statistics::{median, median_ratio};
use engine::buffer::AlignedBuffer;
use engine::sector::{Lba512, SectorSize};
use engine::xts::CpuPath;

use super::{Contestant, Op};

/// The approximate length of one turn.
const TURN: Duration = Duration::from_micros(400);

/// The number of bytes for which one call of [`CpuPath::aes256_rounds`] computes the rounds. It does not depend on the size
/// of the buffer. At this size, the cost of the call itself is negligible.
const LIMIT_BYTES: usize = 64 << 10;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// The operation.
    pub(super) op: Op,
    /// The size of the data unit.
    pub(super) sector_size: SectorSize,
    /// Bytes of each call.
    pub(super) buffer: usize,
}

/// The results of a case, round by round: one series for each contestant, then one for each limit.
#[derive(Clone, Debug)]
pub(super) struct Rounds {
    /// `series[who][round]`, in GB/s.
    series: Vec<Vec<f64>>,
}

impl Rounds {
    /// Returns the median rate of a series in GB/s (10⁹ bytes a second).
    pub(super) fn rate(&self, who: usize) -> f64 {
        median(self.series[who].iter().copied())
    }

    /// Returns the best rate of a series in GB/s, which is the rate of the least disturbed turn.
    pub(super) fn best(&self, who: usize) -> f64 {
        self.series[who].iter().copied().fold(f64::NAN, f64::max)
    }

    /// Returns the median, over all rounds, of the rate of the series `of` divided by the rate of the series `to`.
    pub(super) fn ratio(&self, of: usize, to: usize) -> f64 {
        median_ratio(&self.series[of], &self.series[to])
    }
}

/// Measures a case with `rounds` turns of every contestant and of every path in `limits`. For a limit, a turn computes
/// only the AES rounds, on registers. Each contestant has a page-aligned buffer of its own.
pub(super) fn rounds(case: Case, contestants: &mut [Box<dyn Contestant>], limits: &[CpuPath], rounds: usize) -> Rounds {
    let mut buffers: Vec<_> = contestants.iter().map(|_| AlignedBuffer::zeroed(case.buffer)).collect();
    let mut series = vec![Vec::with_capacity(rounds); contestants.len() + limits.len()];
    let mut calls = vec![1; series.len()];
    let buffers_len = buffers.len();
    let bytes = |who: usize| if who < buffers_len { case.buffer } else { LIMIT_BYTES };
    // The first round finds how many calls make a turn, and warms up the CPU and its caches.
    for round in 0..=rounds {
        for who in 0..series.len() {
            let started = Instant::now();
            for _ in 0..calls[who] {
                if let Some(contestant) = contestants.get_mut(who) {
                    contestant.run(case.op, case.sector_size, Lba512(0), black_box(&mut buffers[who]));
                } else {
                    black_box(limits[who - contestants.len()].aes256_rounds(LIMIT_BYTES));
                }
            }
            let took = started.elapsed().as_secs_f64();
            if round > 0 {
                #[expect(clippy::cast_precision_loss, reason = "the count is far below 2^52")]
                series[who].push((bytes(who) * calls[who]) as f64 / took / 1e9);
            } else {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "at least 0, and at most a turn divided by a nanosecond"
                )]
                let fit = (TURN.as_secs_f64() / took.max(1e-9)) as usize;
                calls[who] = fit.max(1);
            }
        }
    }
    Rounds { series }
}
