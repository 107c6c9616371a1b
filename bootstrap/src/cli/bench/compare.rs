//! `nbdcrypt bench compare`: this server and every peer that is installed, in one run and in turns.
//!
//! Each figure is taken from a server of its own, just started. In each round everybody has a turn at the same workload, so
//! that what disturbs one disturbs its neighbours too; figures are medians over the rounds, ratios are medians of the
//! ratios within a round.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::contestant::{Contestant, Io};
use super::device::{Client, image_size, seconds};
use super::machine::Machine;
use super::sample::{Cost, Sample};
use super::stage::{self, Stage};
use super::subject::Target;
use super::workload::{Pattern, TYPICAL, Workload};
use super::{chart, fio, interrupt, lean, report};
use crate::cli::tell;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Write compare.md, compare.json and charts there.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Turns that everybody has at each workload.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where the images are made; else in memory (/dev/shm).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Bytes of each image.
    #[arg(long, default_value = "1G", value_parser = image_size)]
    size: u64,
    /// Seconds for each turn.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    runtime: f64,
    /// Connections, where there are several.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    connections: u32,
    /// One connection, with fio alone, half a second a turn.
    #[arg(long)]
    quick: bool,
}

/// Everybody's turns at one workload.
#[derive(Debug, Serialize)]
pub(super) struct Section {
    pub(super) client: Client,
    pub(super) workload: Workload,
    pub(super) results: Vec<Turns>,
}

#[derive(Debug, Serialize)]
pub(super) struct Turns {
    pub(super) contestant: Contestant,
    pub(super) median: Sample,
    /// One a round, in order.
    pub(super) rounds: Vec<Sample>,
}

impl Comparison {
    /// Whether it was measured.
    pub(super) fn has(&self, contestant: Contestant) -> bool {
        self.sections.iter().any(|section| section.of(contestant).is_some())
    }
}

impl Section {
    pub(super) fn of(&self, contestant: Contestant) -> Option<&Turns> {
        self.results.iter().find(|turns| turns.contestant == contestant)
    }
}

/// Somebody who took no part, and why.
#[derive(Debug, Serialize)]
pub(super) struct Missing {
    pub(super) contestant: Contestant,
    pub(super) reason: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Comparison {
    pub(super) machine: Machine,
    pub(super) storage: String,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) missing: Vec<Missing>,
    pub(super) sections: Vec<Section>,
    /// This server's, in MiB, after 4 connections with 128 requests of 1 MiB each have read, then written.
    pub(super) peak_rss_mib: Option<f64>,
    /// What is typed to start each server, and fio; paths are those of this run.
    pub(super) commands: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    fio::require()?;
    interrupt::catch()?;
    let directory = args.dir.clone().unwrap_or_else(stage::usual_directory);
    let stage = Stage::in_directory(&directory, args.size)?;
    let runtime = Duration::from_secs_f64(if args.quick { args.runtime.min(0.5) } else { args.runtime });
    let (mut field, mut missing) = (Vec::new(), Vec::new());
    for contestant in Contestant::ALL {
        let reason = contestant.missing().or_else(|| {
            // One that is installed may lack a filter or a driver. Of ours, that would be an error.
            let start = (!contestant.is_ours()).then(|| contestant.start(&stage, Io::PageCache));
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
        // nbdkit is there with its filter and without.
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
            tell(report::section(&section))?;
        }
        comparison.sections.push(section);
    }
    if !args.quick {
        comparison.peak_rss_mib = Some(memory(&stage, runtime)?);
    }
    // The measuring is over; what is left is writing.
    drop(stage);
    if let Some(directory) = &args.report {
        write_report(&comparison, directory)?;
    }
    if args.json {
        return tell(format_args!("{}\n", serde_json::to_string_pretty(&comparison)?));
    }
    tell(report::closing(&comparison))
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
        // The null server's pauses are made for fio with one connection.
        Client::Fio => one != Contestant::Null || workload.connections == 1,
        // It speaks NBD.
        Client::Lean => one != Contestant::Null && !one.is_device(),
    };
    let field: Vec<_> = field.iter().filter(|one| takes_part(**one)).collect();
    let mut series: Vec<Vec<Sample>> = vec![Vec::new(); field.len()];
    for _ in 0..rounds {
        for (contestant, samples) in field.iter().zip(&mut series) {
            samples.push(measure(**contestant, &workload, stage, runtime, client, Io::PageCache)?);
        }
    }
    let results = field.iter().zip(series).map(|(contestant, rounds)| Turns {
        contestant: **contestant,
        median: Sample::median(&rounds),
        rounds,
    });
    Ok(Section { client, workload, results: results.collect() })
}

/// One turn: a new server or device, one workload, and what both sides used up meanwhile.
pub(super) fn measure(
    contestant: Contestant,
    workload: &Workload,
    stage: &Stage,
    runtime: Duration,
    client: Client,
    io: Io,
) -> Result<Sample> {
    interrupt::check()?;
    let subject = contestant.start(stage, io)?;
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

/// What this server holds at most while many large requests are under way, in MiB.
fn memory(stage: &Stage, runtime: Duration) -> Result<f64> {
    let server = Contestant::Nbdcrypt.start(stage, Io::PageCache)?;
    for pattern in [Pattern::Read, Pattern::Write] {
        let workload = Workload { pattern, block: 1 << 20, depth: 128, connections: 4 };
        fio::drive(server.target(), &workload, stage.region, runtime)?;
    }
    let peak = server.peak_rss()?.context("this server's memory")?;
    Ok(peak as f64 / f64::from(1 << 20))
}

fn commands(field: &[Contestant], stage: &Stage, runtime: Duration) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for contestant in field {
        let command = contestant.command(stage, Io::PageCache)?;
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
        ("compare.md".to_owned(), report::markdown(comparison)),
        ("compare.json".to_owned(), serde_json::to_string_pretty(comparison)?),
    ];
    files.extend(chart::all(comparison));
    for (name, content) in files {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
