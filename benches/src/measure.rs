//! Measuring on a machine that is not quiet: everyone takes a short turn in every round, so that what disturbs one disturbs
//! its neighbours too; figures are medians, and ratios are medians of the ratios within a round.

use std::hint::black_box;
use std::time::{Duration, Instant};

use engine::buffer::AlignedBuffer;
use engine::sector::{Lba512, SectorSize};
use engine::xts::CpuPath;

use crate::{Contestant, Op};

/// How long one turn takes, about.
const TURN: Duration = Duration::from_micros(400);

/// Bytes that the limit's loop is asked for in a call, whatever the buffer: enough that the call itself costs nothing.
const LIMIT_BYTES: usize = 64 << 10;

/// One thing to measure.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Encrypt or decrypt.
    pub op: Op,
    /// The data unit.
    pub sector_size: SectorSize,
    /// Bytes in a call.
    pub buffer: usize,
}

/// What a case gave: one series for each contestant, then one for each limit that was asked for, round by round.
#[derive(Clone, Debug)]
pub struct Rounds {
    /// `series[who][round]`, in GB/s.
    series: Vec<Vec<f64>>,
}

impl Rounds {
    /// The median rate of one series, in GB/s (10⁹ bytes).
    pub fn rate(&self, who: usize) -> f64 {
        median(self.series[who].clone())
    }

    /// The best rate of one series, in GB/s: what the least disturbed turn gave.
    pub fn best(&self, who: usize) -> f64 {
        self.series[who].iter().copied().fold(f64::NAN, f64::max)
    }

    /// The median of one series' rate divided by another's in the same round.
    pub fn ratio(&self, of: usize, to: usize) -> f64 {
        median(self.series[of].iter().zip(&self.series[to]).map(|(of, to)| of / to).collect())
    }
}

/// Measures a case: `rounds` turns of every contestant, and of the AES rounds on registers of each path in `limits`. The
/// buffers are page-aligned and each contestant's own.
pub fn rounds(case: Case, contestants: &mut [Box<dyn Contestant>], limits: &[CpuPath], rounds: usize) -> Rounds {
    let mut buffers: Vec<_> = contestants.iter().map(|_| AlignedBuffer::zeroed(case.buffer)).collect();
    let mut series = vec![Vec::with_capacity(rounds); contestants.len() + limits.len()];
    let mut calls = vec![1; series.len()];
    let buffers_len = buffers.len();
    let bytes = |who: usize| if who < buffers_len { case.buffer } else { LIMIT_BYTES };
    // The first round finds out how many calls make a turn, and warms everything up.
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
                #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
                series[who].push((bytes(who) * calls[who]) as f64 / took / 1e9);
            } else {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "between one and the calls of a nanosecond"
                )]
                let fit = (TURN.as_secs_f64() / took.max(1e-9)) as usize;
                calls[who] = fit.max(1);
            }
        }
    }
    Rounds { series }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
