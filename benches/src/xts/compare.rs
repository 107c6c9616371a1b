//! Compares AES-256-XTS with other libraries and with the limit of the AES units, in one run. Prints a table and writes
//! it to `xts.md`, with a chart in `xts.svg`.

use std::fs;
use std::path::PathBuf;

use super::measure::{Case, Rounds, rounds};
use super::report::{Row, Section, chart, table};
use super::{Contestant, Op, ours, peers};
use anyhow::{Context, ensure};
use bootstrap::machine::cpu;
use engine::sector::{Lba512, SectorSize};
use engine::xts::CpuPath;

/// Compare AES-256-XTS on one core with the libraries that this program was built with.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many turns each library takes in each case; the figures are medians over them.
    #[arg(long, default_value_t = 75)]
    rounds: usize,
    /// The directory for the table and the chart.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

const SECTORS: [SectorSize; 2] = [SectorSize::B512, SectorSize::B4096];
const BUFFERS: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];
const OPS: [Op; 2] = [Op::Encrypt, Op::Decrypt];

/// Measures every case, prints the table, and writes the table and the chart.
///
/// # Errors
/// Fails if two contestants encrypt differently, or if a file cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let paths: Vec<CpuPath> = CpuPath::available().collect();
    let limits: Vec<CpuPath> = paths.iter().copied().filter(|path| *path != CpuPath::Portable).collect();
    let mut contestants: Vec<Box<dyn Contestant>> =
        ours().into_iter().map(|ours| Box::new(ours) as Box<dyn Contestant>).chain(peers()).collect();
    agree(&mut contestants)?;

    let mut results = Vec::new();
    for sector_size in SECTORS {
        for buffer in BUFFERS {
            for op in OPS {
                let case = Case { op, sector_size, buffer };
                results.push((case, rounds(case, &mut contestants, &limits, args.rounds)));
            }
        }
    }

    let names: Vec<String> = contestants.iter().map(|contestant| contestant.name()).collect();
    let field = Field { names, limits };
    let sections: Vec<Section> = results.iter().map(|(case, result)| field.section(*case, result)).collect();
    let title = format!("AES-256-XTS, one core, {}", cpu::name());
    let text = format!("# {title}\n\n{}{}", table(&sections), field.bars(&results));
    print!("{text}");

    let charted: Vec<Section> = results
        .iter()
        .zip(sections)
        .filter(|((case, _), _)| case.buffer == 64 << 10 && case.op == Op::Encrypt)
        .map(|(_, section)| section)
        .collect();
    fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    for (name, content) in [("xts.md", text), ("xts.svg", chart(&format!("{title} (GB/s)"), &charted)?)] {
        let path = args.out.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("written: {}", path.display());
    }
    Ok(())
}

/// Checks that all contestants produce the same bytes. Only then may their speeds be compared.
fn agree(contestants: &mut [Box<dyn Contestant>]) -> anyhow::Result<()> {
    for sector_size in SECTORS {
        let plain: Vec<u8> = (0..=250).cycle().take(64 << 10).collect();
        let mut expected: Option<Vec<u8>> = None;
        for contestant in &mut *contestants {
            let mut data = plain.clone();
            contestant.run(Op::Encrypt, sector_size, Lba512(77), &mut data);
            ensure!(
                expected.get_or_insert_with(|| data.clone()) == &data,
                "{} encrypts differently from the contestants before it",
                contestant.name()
            );
            contestant.run(Op::Decrypt, sector_size, Lba512(77), &mut data);
            ensure!(data == plain, "{} does not decrypt what it encrypted", contestant.name());
        }
    }
    Ok(())
}

/// The names of the series of [`Rounds`], by index: first this project's CPU paths, then the other libraries. The speed
/// limits of the AES units follow, one for each of this project's hardware paths.
struct Field {
    names: Vec<String>,
    limits: Vec<CpuPath>,
}

impl Field {
    /// Returns the index of the speed limit that belongs to contestant `who`. Returns `None` if `who` is not one of this
    /// project's hardware paths.
    fn limit_of(&self, who: usize) -> Option<usize> {
        (who < self.limits.len()).then_some(self.names.len() + who)
    }

    fn who(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|candidate| candidate.starts_with(name))
    }

    fn section(&self, case: Case, result: &Rounds) -> Section {
        let rows = self.names.iter().enumerate().map(|(who, name)| Row {
            name: name.clone(),
            rate: result.rate(who),
            best: result.best(who),
            of_limit: self.limit_of(who).map(|limit| result.ratio(who, limit)),
            behind: (who > 0).then(|| result.ratio(0, who)),
        });
        Section {
            title: format!("{}, {}-byte sectors, {} KiB", case.op.name(), case.sector_size, case.buffer >> 10),
            limit: self.limit_of(0).map(|limit| result.rate(limit)),
            rows: rows.collect(),
        }
    }

    /// Returns the table that compares the measured ratios with this project's own targets ("bars"). Each figure is the
    /// worse of encryption and decryption.
    fn bars(&self, results: &[(Case, Rounds)]) -> String {
        let mut out = String::from(
            "### Bars\n\n| | sector | buffer | bar | measured | ceiling | |\n|---|--:|--:|--:|--:|--:|---|\n",
        );
        let mut line = |what: &str, sector: SectorSize, buffer: usize, bar: f64, of: usize, to: &[usize]| {
            let worst_of = |of: usize| {
                results
                    .iter()
                    .filter(|(case, _)| case.sector_size == sector && case.buffer == buffer)
                    .flat_map(|(_, result)| to.iter().map(move |to| result.ratio(of, *to)))
                    .fold(f64::INFINITY, f64::min)
            };
            let worst = worst_of(of);
            // The highest ratio that is possible on this CPU: the ratio of the speed limit of this project's widest
            // registers.
            let ceiling = self.limit_of(0).map(worst_of).filter(|_| to.iter().all(|to| *to < self.names.len()));
            let verdict = match ceiling {
                _ if worst >= bar => "met",
                Some(ceiling) if ceiling < bar => "out of reach on this CPU",
                _ => "missed",
            };
            let ceiling = ceiling.map(|ceiling| format!("{ceiling:.2}")).unwrap_or_default();
            out +=
                &format!("| {what} | {sector} | {} KiB | {bar} | {worst:.3} | {ceiling} | {verdict} |\n", buffer >> 10);
        };
        let (b512, b4096, k4, k64, m1) = (SectorSize::B512, SectorSize::B4096, 4 << 10, 64 << 10, 1 << 20);
        for who in 0..self.limits.len() {
            let Some(limit) = self.limit_of(who) else { continue };
            let what = format!("{} of its issue limit", self.names[who]);
            if self.limits[who] == CpuPath::Vaes512 {
                line(&what, b512, k64, 0.75, who, &[limit]);
            }
            line(&what, b4096, k64, 0.85, who, &[limit]);
        }
        if let (Some(aws), Some(openssl)) = (self.who("AWS-LC"), self.who("OpenSSL")) {
            for buffer in [k64, m1] {
                line("against the faster of AWS-LC and OpenSSL", b512, buffer, 3.0, 0, &[aws, openssl]);
                line("against the faster of AWS-LC and OpenSSL", b4096, buffer, 1.5, 0, &[aws, openssl]);
            }
            line("against AWS-LC", b512, k4, 2.2, 0, &[aws]);
            line("against AWS-LC", b4096, k4, 1.3, 0, &[aws]);
        }
        if let Some(xts_mode) = self.who("aes + xts-mode") {
            line("against aes + xts-mode", b512, k64, 12.0, 0, &[xts_mode]);
            line("against aes + xts-mode", b4096, k64, 14.0, 0, &[xts_mode]);
            if let Some(portable) = self.who("nbdcrypt portable") {
                line("portable against aes + xts-mode", b512, k64, 3.0, portable, &[xts_mode]);
                line("portable against aes + xts-mode", b4096, k64, 3.0, portable, &[xts_mode]);
            }
        }
        out
    }
}
