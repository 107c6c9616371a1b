//! `nbdcrypt bench xts`: measures AES-256-XTS on every CPU path that this machine supports. A CPU path is an implementation
//! of the cipher for certain instructions.
//!
//! Each row is measured in short turns: AES rounds on registers (the limit), memcpy, encryption, decryption, and then again.
//! So a disturbance affects all four alike. Figures are medians, in 10⁹ bytes a second.

use std::fmt::Write;
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use engine::buffer::AlignedBuffer;
use engine::key::VolumeKey;
use engine::sector::{Lba512, SectorSize};
use engine::xts::{CpuPath, Xts};
use serde::Serialize;

use crate::bench::{machine, statistics};
use crate::cli::tell;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Seconds for each path, sector size, buffer and number of threads.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.1)]
    seconds: f64,
}

const SECTORS: [SectorSize; 2] = [SectorSize::B512, SectorSize::B4096];
const BUFFERS: [usize; 4] = [4 << 10, 64 << 10, 1 << 20, 64 << 20];
/// The buffer size at which a path is compared with its limit. It is large enough to hide the overhead of a request,
/// and fits into the cache.
const TYPICAL: usize = 64 << 10;
/// The approximate minimum length of one turn. It is long enough that the clock's noise does not matter.
const TURN: Duration = Duration::from_micros(500);
/// The minimum number of rounds for a median, even if they take longer than the budget.
const FEWEST_ROUNDS: usize = 5;

pub(super) fn run(args: Args) -> Result<()> {
    let machine = Machine::this();
    let budget = Duration::try_from_secs_f64(args.seconds)?;
    let threads = if machine.cores > 1 { vec![1, machine.cores] } else { vec![1] };
    if !args.json {
        tell(heading(&machine))?;
    }
    let mut rows = Vec::new();
    for threads in threads {
        if !args.json {
            tell(table_head(threads))?;
        }
        for path in CpuPath::available() {
            for sector_size in SECTORS {
                let cells =
                    BUFFERS.map(|buffer| (buffer, measure(&Case { path, sector_size, buffer, threads, budget })));
                if !args.json {
                    tell(table_line(path, sector_size, &cells))?;
                }
                for (buffer, rates) in cells {
                    let row = |op, gb_per_s| Row {
                        path: path.name(),
                        op,
                        sector: sector_size.bytes(),
                        buffer,
                        threads,
                        gb_per_s: rounded(gb_per_s),
                        limit_gb_per_s: rounded(rates.limit),
                        memcpy_gb_per_s: rounded(rates.memcpy),
                    };
                    rows.push(row("encrypt", rates.encrypt));
                    rows.push(row("decrypt", rates.decrypt));
                }
            }
        }
    }
    if args.json {
        return tell(format_args!("{}\n", serde_json::to_string_pretty(&Report { machine, rows })?));
    }
    tell(
        "\nThe limit is the rate of AES rounds on registers, without memory and tweaks. The registers are those of the path\n\
         (for the portable path, the widest ones). The share is the rate of encryption in 64 KiB, divided by the limit.\n\
         memcpy copies one half of the buffer to the other.\n",
    )
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Machine {
    cpu: String,
    arch: &'static str,
    cores: usize,
    best_path: &'static str,
    version: &'static str,
}

/// One figure in GB/s (10⁹ bytes a second), for `threads` threads together.
#[derive(Serialize)]
struct Row {
    path: &'static str,
    op: &'static str,
    sector: usize,
    buffer: usize,
    threads: usize,
    gb_per_s: f64,
    limit_gb_per_s: f64,
    memcpy_gb_per_s: f64,
}

impl Machine {
    fn this() -> Self {
        let machine = machine::Machine::with(&[]);
        Self {
            cpu: machine.cpu,
            arch: std::env::consts::ARCH,
            cores: machine.cores,
            best_path: CpuPath::best().name(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

struct Case {
    path: CpuPath,
    sector_size: SectorSize,
    buffer: usize,
    threads: usize,
    budget: Duration,
}

/// Median rates in GB/s.
#[derive(Clone, Copy)]
struct Rates {
    limit: f64,
    memcpy: f64,
    encrypt: f64,
    decrypt: f64,
}

/// The number of operations that take turns.
const TURNS: usize = 4;

fn measure(case: &Case) -> Rates {
    // All threads take the same turn at the same time.
    let barrier = Barrier::new(case.threads);
    let series: Vec<Vec<[f64; TURNS]>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..case.threads).map(|_| scope.spawn(|| turns(case, &barrier))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_default()).collect()
    });
    // The number of rounds that every thread has finished.
    let rounds = series.iter().map(Vec::len).min().unwrap_or(0);
    let median = |turn: usize| {
        statistics::median((0..rounds).map(|round| series.iter().map(|thread| thread[round][turn]).sum()))
    };
    Rates { limit: median(0), memcpy: median(1), encrypt: median(2), decrypt: median(3) }
}

/// Returns what one thread measures: the rate of each turn in every round.
fn turns(case: &Case, barrier: &Barrier) -> Vec<[f64; TURNS]> {
    let xts = a_key().and_then(|key| Xts::with_path(&key, case.path).ok());
    let limit = if case.path == CpuPath::Portable { CpuPath::best() } else { case.path };
    let mut data = AlignedBuffer::zeroed(case.buffer);
    let mut call = |turn: usize| match (turn, &xts) {
        (0, _) => _ = black_box(limit.aes256_rounds(TYPICAL)),
        (1, _) => {
            let (from, to) = data.split_at_mut(case.buffer / 2);
            to.copy_from_slice(black_box(from));
            black_box(to);
        }
        (2, Some(xts)) => xts.encrypt(case.sector_size, Lba512(0), black_box(&mut data)),
        (_, Some(xts)) => xts.decrypt(case.sector_size, Lba512(0), black_box(&mut data)),
        (_, None) => {}
    };
    let bytes = [TYPICAL, case.buffer / 2, case.buffer, case.buffer];

    // Finds how many calls make a turn. This also warms up the CPU and its caches.
    let calls = [0, 1, 2, 3].map(|turn| {
        let started = Instant::now();
        call(turn);
        let once = started.elapsed().max(Duration::from_nanos(20));
        u32::try_from(TURN.as_nanos() / once.as_nanos()).unwrap_or(u32::MAX).max(1)
    });
    // The number of rounds is fixed in advance, and no clock ends the loop, since all threads must reach the barrier
    // equally often.
    let turn = TURN.max(Duration::from_secs_f64(1e-10 * bytes[2] as f64));
    let rounds = usize::try_from(case.budget.as_micros() / (4 * turn.as_micros())).unwrap_or(usize::MAX);
    (0..rounds.max(FEWEST_ROUNDS))
        .map(|_| {
            [0, 1, 2, 3].map(|turn| {
                barrier.wait();
                let started = Instant::now();
                for _ in 0..calls[turn] {
                    call(turn);
                }
                bytes[turn] as f64 * f64::from(calls[turn]) / started.elapsed().as_secs_f64() / 1e9
            })
        })
        .collect()
}

/// Returns any valid key. The results do not depend on it.
fn a_key() -> Option<VolumeKey> {
    VolumeKey::new((0..=255).take(VolumeKey::AES_256).collect()).ok()
}

fn rounded(rate: f64) -> f64 {
    (rate * 1000.0).round() / 1000.0
}

fn heading(machine: &Machine) -> String {
    let Machine { cpu, cores, version, best_path, .. } = machine;
    let caveat = if cfg!(debug_assertions) {
        " (a debug build, which is slow: measure a build made with --release)"
    } else {
        ""
    };
    format!(
        "AES-256-XTS, GB/s, nbdcrypt {version}{caveat}\n{cpu}, {cores} cores; nbdcrypt uses the path `{best_path}`\n"
    )
}

fn table_head(threads: usize) -> String {
    let mut line = format!(
        "\n{}\n{:<10}{:>7}",
        if threads == 1 { "one thread".to_owned() } else { format!("{threads} threads together") },
        "path",
        "sector"
    );
    for buffer in BUFFERS {
        let size = if buffer < 1 << 20 { format!("{} KiB", buffer >> 10) } else { format!("{} MiB", buffer >> 20) };
        let _ = write!(line, "{:>15}", format!("{size} enc/dec"));
    }
    line + "   memcpy    limit  share\n"
}

fn table_line(path: CpuPath, sector_size: SectorSize, cells: &[(usize, Rates)]) -> String {
    let mut line = format!("{:<10}{:>7}", path.name(), sector_size.bytes());
    for (_, rates) in cells {
        let _ = write!(line, "{:>8.1}{:>7.1}", rates.encrypt, rates.decrypt);
    }
    if let Some((_, rates)) = cells.iter().find(|(buffer, _)| *buffer == TYPICAL) {
        let share = rates.encrypt / rates.limit;
        let _ = write!(line, "{:>9.1}{:>9.1}  {} {:.0}%", rates.memcpy, rates.limit, bar(share), share * 100.0);
    }
    line + "\n"
}

/// Draws a bar of ten cells, filled from the left.
fn bar(share: f64) -> String {
    (0..10).map(|cell| if share * 10.0 > f64::from(cell) + 0.5 { '█' } else { '░' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_measured_beside_its_limit_and_memcpy() {
        for path in CpuPath::available() {
            let case = Case {
                path,
                sector_size: SectorSize::B512,
                buffer: 4 << 10,
                threads: 2,
                budget: Duration::from_millis(1),
            };
            let rates = measure(&case);
            for rate in [rates.memcpy, rates.encrypt, rates.decrypt] {
                assert!(rate.is_finite() && rate > 0.0, "{path}");
            }
        }
    }

    #[test]
    fn a_line_has_a_cell_for_every_buffer() {
        let rates = Rates { limit: 10.0, memcpy: 20.0, encrypt: 9.0, decrypt: 8.0 };
        let line = table_line(CpuPath::AesNi, SectorSize::B512, &BUFFERS.map(|buffer| (buffer, rates)));
        assert_eq!(line.matches("9.0").count(), BUFFERS.len());
        assert!(line.ends_with("█████████░ 90%\n"), "{line}");
    }
}
