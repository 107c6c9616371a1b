//! `nbdcrypt-bench servers`: compares this server with every installed peer in one run; the servers take turns.
//!
//! Each measurement starts a new server. In each round, every contestant has a turn at the same workload, so that a
//! disturbance affects neighbouring turns alike. Figures are medians over the rounds. Ratios are medians of the ratios
//! within each round.

mod attached;
mod bars;
mod charts;
mod contestant;
mod dm_crypt;
mod fio;
mod null;
mod plaintext;
mod report;
mod server_process;
mod subject;
mod yardstick;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use bootstrap::bench::machine::Machine;
use bootstrap::bench::sample::{Cost, Sample};
use bootstrap::bench::stage::{self, Stage};
use bootstrap::bench::workload::{Pattern, TYPICAL, Workload};
use bootstrap::bench::{image_size, interrupt, lean, seconds};
use serde::Serialize;

use contestant::Contestant;
pub(crate) use contestant::nbdcrypt;
use subject::Target;

/// A server that exists only for the comparison. `nbdcrypt-bench servers` starts it as a process of its own.
#[derive(Debug, clap::Subcommand)]
pub enum Helper {
    /// Serve a file with one blocking thread for each connection and without encryption.
    #[command(hide = true)]
    Yardstick(yardstick::Args),
    /// Serve without any storage, to find the highest rate that a client can reach.
    #[command(hide = true)]
    Null(null::Args),
    /// Serve a volume with this server, but without its cipher.
    #[command(hide = true)]
    Plaintext(plaintext::Args),
    /// Attach a volume to the kernel with this server.
    #[command(hide = true)]
    Attached(attached::Args),
}

impl Helper {
    /// Serves until it is told to stop.
    ///
    /// # Errors
    /// Fails if the disk cannot be opened or the socket or device cannot be set up.
    pub fn run(&self) -> Result<()> {
        match self {
            Self::Yardstick(args) => yardstick::run(args),
            Self::Null(args) => null::run(args),
            Self::Plaintext(args) => plaintext::run(args),
            Self::Attached(args) => attached::run(args),
        }
    }
}

/// The client of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Client {
    /// fio with its nbd engine.
    Fio,
    /// A client that keeps many requests in flight and only counts the replies.
    Lean,
}

/// Compare every server that is installed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Write servers.md, servers.json and the charts to this directory.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// How many turns each server has at each workload.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// The directory in which the images are made; the default is in memory (/dev/shm).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Size of each image.
    #[arg(long, default_value = "1G", value_parser = image_size)]
    size: u64,
    /// Seconds of each turn.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    runtime: f64,
    /// Number of connections in the multi-connection measurements.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    connections: u32,
    /// Measure only with fio and one connection, half a second for each turn.
    #[arg(long)]
    quick: bool,
}

/// All turns at one workload.
#[derive(Debug, Serialize)]
struct Section {
    client: Client,
    workload: Workload,
    results: Vec<Turns>,
}

#[derive(Debug, Serialize)]
struct Turns {
    contestant: Contestant,
    median: Sample,
    /// One sample for each round, in order.
    rounds: Vec<Sample>,
}

impl Comparison {
    /// Returns whether the contestant was measured.
    fn has(&self, contestant: Contestant) -> bool {
        self.sections.iter().any(|section| section.of(contestant).is_some())
    }
}

impl Section {
    fn of(&self, contestant: Contestant) -> Option<&Turns> {
        self.results.iter().find(|turns| turns.contestant == contestant)
    }
}

/// A contestant that could not take part, and why.
#[derive(Debug, Serialize)]
struct Missing {
    contestant: Contestant,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Comparison {
    machine: Machine,
    storage: String,
    rounds: u32,
    seconds: f64,
    missing: Vec<Missing>,
    sections: Vec<Section>,
    /// This server's peak memory in MiB. The workload is 4 connections, each with 128 requests of 1 MiB in flight:
    /// first reads, then writes.
    peak_rss_mib: Option<f64>,
    /// The command lines that start each server and fio, with the paths of this run.
    commands: Vec<String>,
}

/// Measures all contestants in turns, and writes the report.
///
/// # Errors
/// Fails if fio is missing, if a server of this project cannot be measured, or if a file cannot be written.
pub fn run(args: &Args) -> Result<()> {
    fio::require()?;
    interrupt::catch()?;
    let directory = args.dir.clone().unwrap_or_else(stage::usual_directory);
    let stage = Stage::in_directory(&directory, args.size)?;
    let runtime = Duration::from_secs_f64(if args.quick { args.runtime.min(0.5) } else { args.runtime });
    let (mut field, mut missing) = (Vec::new(), Vec::new());
    for contestant in Contestant::ALL {
        let reason = contestant.missing().or_else(|| {
            // An installed peer may lack a filter or a driver, and is then reported as missing. A server of this
            // project must start.
            let start = (!contestant.is_ours()).then(|| contestant.start(&stage));
            start.and_then(Result::err).map(|error| format!("{error:#}"))
        });
        interrupt::check()?;
        match reason {
            Some(reason) => missing.push(Missing { contestant, reason }),
            None => field.push(contestant),
        }
    }
    let mut programs = vec!["fio"];
    for program in field.iter().filter_map(|contestant| contestant.program()) {
        // nbdkit takes part twice: with its filter and without.
        if !programs.contains(&program) {
            programs.push(program);
        }
    }
    let mut comparison = Comparison {
        machine: Machine::with(&programs),
        storage: format!("{} ({} MiB, through the page cache)", directory.display(), args.size >> 20),
        rounds: args.rounds,
        seconds: runtime.as_secs_f64(),
        missing,
        sections: Vec::new(),
        peak_rss_mib: None,
        commands: commands(&field, &stage, runtime)?,
    };
    for (client, workload) in sections(args) {
        let section = take_turns(client, workload, &field, &stage, runtime, args.rounds)?;
        if !args.json {
            print!("{}", report::section(&section));
        }
        comparison.sections.push(section);
    }
    if !args.quick {
        comparison.peak_rss_mib = Some(memory(&stage, runtime)?);
    }
    // The measurements are done, so the images can be removed before the report is written.
    drop(stage);
    if let Some(directory) = &args.report {
        write_report(&comparison, directory)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", report::closing(&comparison));
    }
    Ok(())
}

fn sections(args: &Args) -> Vec<(Client, Workload)> {
    let fio = TYPICAL.map(|workload| (Client::Fio, workload));
    if args.quick {
        return fio.to_vec();
    }
    let several = TYPICAL.map(|workload| (Client::Fio, workload.with(args.connections)));
    let lean = TYPICAL.map(|workload| (Client::Lean, workload));
    [fio, several, lean].concat()
}

fn take_turns(
    client: Client,
    workload: Workload,
    field: &[Contestant],
    stage: &Stage,
    runtime: Duration,
    rounds: u32,
) -> Result<Section> {
    let takes_part = |one: Contestant| match client {
        // The null server's pauses are tuned for fio with one connection.
        Client::Fio => one != Contestant::Null || workload.connections == 1,
        // The lean client speaks NBD, so it cannot drive devices.
        Client::Lean => one != Contestant::Null && !one.is_device(),
    };
    let field: Vec<_> = field.iter().filter(|one| takes_part(**one)).collect();
    let mut series: Vec<Vec<Sample>> = vec![Vec::new(); field.len()];
    for _ in 0..rounds {
        for (contestant, samples) in field.iter().zip(&mut series) {
            samples.push(measure(**contestant, &workload, stage, runtime, client)?);
        }
    }
    let results = field.iter().zip(series).map(|(contestant, rounds)| Turns {
        contestant: **contestant,
        median: Sample::median(&rounds),
        rounds,
    });
    Ok(Section { client, workload, results: results.collect() })
}

/// Starts a new server or device, runs one workload, and measures it and the resources it used.
fn measure(
    contestant: Contestant,
    workload: &Workload,
    stage: &Stage,
    runtime: Duration,
    client: Client,
) -> Result<Sample> {
    interrupt::check()?;
    let subject = contestant.start(stage)?;
    let before = subject.cpu_seconds()?;
    let seen = match (client, subject.target()) {
        (Client::Lean, Target::Socket(socket)) => lean::drive(socket, workload, stage.region, runtime),
        (_, target) => fio::drive(target, workload, stage.region, runtime),
    };
    let seen = seen.with_context(|| format!("{}, {}", contestant.name(), workload.name()))?;
    let server = subject.cpu_seconds()?.zip(before).map(|(after, before)| after - before);
    let cost = Cost { server, peak_rss: subject.peak_rss()? };
    Ok(Sample::new(&seen, &cost))
}

/// Returns the peak memory of this server in MiB while many large requests are in flight.
fn memory(stage: &Stage, runtime: Duration) -> Result<f64> {
    let server = Contestant::Nbdcrypt.start(stage)?;
    for pattern in [Pattern::Read, Pattern::Write] {
        let workload = Workload { pattern, block: 1 << 20, depth: 128, connections: 4 };
        fio::drive(server.target(), &workload, stage.region, runtime)?;
    }
    let peak = server.peak_rss()?.context("cannot read this server's peak memory")?;
    Ok(peak as f64 / f64::from(1 << 20))
}

fn commands(field: &[Contestant], stage: &Stage, runtime: Duration) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for contestant in field {
        let command = contestant.command(stage)?;
        let words = [command.get_program()].into_iter().chain(command.get_args());
        lines.push(words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "));
    }
    let socket = stage.socket();
    let devices = field.iter().any(|contestant| contestant.is_device());
    let device = devices.then_some(Target::Device(std::path::Path::new("DEVICE")));
    for (workload, target) in TYPICAL.iter().flat_map(|workload| {
        [Some(Target::Socket(&socket)), device].into_iter().flatten().map(move |target| (workload, target))
    }) {
        let words = fio::arguments(target, workload, stage.region, runtime);
        lines.push(format!("fio {}", words.join(" ")));
    }
    Ok(lines)
}

fn write_report(comparison: &Comparison, directory: &std::path::Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let mut files = vec![
        ("servers.md".to_owned(), report::markdown(comparison)),
        ("servers.json".to_owned(), serde_json::to_string_pretty(comparison)?),
    ];
    files.extend(charts::all(comparison)?);
    for (name, content) in files {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
