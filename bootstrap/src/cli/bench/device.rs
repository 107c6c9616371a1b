//! `nbdcrypt bench device`: what this server gives on this machine's memory or disk, encrypted beside plaintext.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::compare::measure;
use super::contestant::{Contestant, Io};
use super::machine::{Machine, cores};
use super::sample::{Limit, Sample};
use super::stage::{self, Stage};
use super::workload::{Pattern, TYPICAL, Workload};
use super::{fio, interrupt};
use crate::cli::tell;
use crate::config;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Where the images are made; else in memory (/dev/shm).
    #[arg(long, value_name = "DIR", conflicts_with = "device")]
    dir: Option<PathBuf>,
    /// Measure this disk, which is overwritten, and blank at the end.
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    /// Destroy what is on the disk.
    #[arg(long, requires = "device")]
    wipe: bool,
    /// Bytes of each image, or of the disk, that are read and written.
    #[arg(long, default_value = "1G", value_parser = image_size)]
    size: u64,
    /// Seconds for each figure.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    runtime: f64,
    /// Connections, where there are several.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    connections: u32,
    /// One connection, four workloads, half a second each.
    #[arg(long)]
    quick: bool,
    /// Let the kernel cache the images. Without it, direct I/O where the filesystem allows.
    #[arg(long)]
    page_cache: bool,
    /// Direct I/O without buffers that are registered with the ring.
    #[arg(long, hide = true, conflicts_with = "page_cache")]
    no_registered_buffers: bool,
    /// What asks.
    #[arg(long, value_enum, default_value_t = Client::Fio)]
    client: Client,
}

/// Who drives a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Client {
    /// fio with its nbd engine.
    Fio,
    /// A client that sends many requests at a time and counts the replies.
    Lean,
}

#[derive(Serialize)]
struct Row {
    contestant: Contestant,
    workload: Workload,
    #[serde(flatten)]
    sample: Sample,
    limit: Limit,
}

pub(super) fn run(args: Args) -> Result<()> {
    if args.client == Client::Fio {
        fio::require()?;
    }
    interrupt::catch()?;
    let stage = match &args.device {
        Some(disk) => Stage::on_disk(disk, args.size, args.wipe)?,
        None => Stage::in_directory(&args.dir.clone().unwrap_or_else(stage::usual_directory), args.size)?,
    };
    let runtime = Duration::from_secs_f64(if args.quick { args.runtime.min(0.5) } else { args.runtime });
    let machine = Machine::with(if args.client == Client::Fio { &["fio"] } else { &[] });
    if !args.json {
        let debug = if cfg!(debug_assertions) { " (a debug build: build with --release to measure)" } else { "" };
        tell(format_args!(
            "{} x {}, Linux {}{debug}\nencrypted, beside this server without its cipher\n\n{:<40}{:>9}{:>9}{:>7}{:>10}{:>10}{:>9}{:>9}\n",
            machine.cores,
            machine.cpu,
            machine.kernel,
            "",
            "MB/s",
            "plain",
            "ratio",
            "IOPS",
            "p99 us",
            "CPU s/GB",
            "RSS MiB"
        ))?;
    }
    let io = match (args.page_cache, args.no_registered_buffers) {
        (true, _) => Io::PageCache,
        (false, true) => Io::Unregistered,
        (false, false) => Io::Direct,
    };
    let mut rows = Vec::new();
    for workload in workloads(&args) {
        let [encrypted, plain] = [Contestant::Nbdcrypt, Contestant::NbdcryptPlaintext]
            .map(|who| measure(who, &workload, &stage, runtime, args.client, io));
        let (encrypted, plain) = (encrypted?, plain?);
        if !args.json {
            tell(format_args!(
                "{:<40}{:>9.0}{:>9.0}{:>7.2}{:>10.0}{:>10.0}{:>9.3}{:>9.0}\n",
                workload.name(),
                encrypted.mb_per_s,
                plain.mb_per_s,
                encrypted.mb_per_s / plain.mb_per_s,
                encrypted.iops,
                encrypted.p99_us,
                encrypted.server_cpu_s_per_gb.unwrap_or(f64::NAN),
                encrypted.peak_rss_mib.unwrap_or(f64::NAN),
            ))?;
        }
        for (contestant, sample) in [(Contestant::Nbdcrypt, encrypted), (Contestant::NbdcryptPlaintext, plain)] {
            rows.push(Row { contestant, workload, sample, limit: sample.limit(workload.connections, cores()) });
        }
    }
    ensure!(!rows.is_empty(), "nothing was measured");
    if args.json {
        #[derive(Serialize)]
        struct Report {
            machine: Machine,
            client: Client,
            rows: Vec<Row>,
        }
        let report = Report { machine, client: args.client, rows };
        tell(format_args!("{}\n", serde_json::to_string_pretty(&report)?))?;
    }
    Ok(())
}

fn workloads(args: &Args) -> Vec<Workload> {
    if args.quick {
        return TYPICAL.to_vec();
    }
    let mut all = Vec::new();
    for pattern in Pattern::ALL {
        for block in [4 << 10, 64 << 10, 1 << 20] {
            for depth in [1, if block == 4 << 10 { 32 } else { 16 }] {
                for connections in [1, args.connections] {
                    all.push(Workload { pattern, block, depth, connections });
                }
            }
        }
    }
    all
}

/// A size in bytes that gives every connection room for its largest requests.
pub(super) fn image_size(text: &str) -> Result<u64, String> {
    let least = 64 << 20;
    let size = config::parse_size(text).filter(|size| *size >= least);
    size.map(|size| size >> 20 << 20)
        .ok_or_else(|| "a size is a number of bytes, or of M or G, of at least 64M".to_owned())
}

pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "seconds are a number from 0.1 to 3600".to_owned())
}
