//! `nbdcrypt bench device`: measures this server's throughput on this machine's memory or disk, encrypted and
//! plaintext.
//!
//! Server and client are threads of this process and talk over a unix socket, so nothing else has to be installed. Each
//! figure comes from a server that was just started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use engine::key::Passphrase;
use engine::luks::{self, Limits};
use engine::sector::SectorSize;
use engine::store::Caching;
use engine::volume::Volume;
use nbd_server::{Export, Exports, Server, Settings, Trigger, shutdown};
use serde::Serialize;
use tokio::net::UnixListener;

use crate::bench::machine::{Machine, cores};
use crate::bench::sample::{Cost, Limit, Sample};
use crate::bench::stage::{self, Stage};
use crate::bench::workload::{Pattern, TYPICAL, Workload};
use crate::bench::{image_size, interrupt, lean, seconds};
use crate::cli::tell;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// The directory in which the images are made; the default is in memory (/dev/shm).
    #[arg(long, value_name = "DIR", conflicts_with = "device")]
    dir: Option<PathBuf>,
    /// Measure this disk. It is overwritten, and blank at the end.
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    /// Allow what is on the disk to be destroyed.
    #[arg(long, requires = "device")]
    wipe: bool,
    /// Size of each image, or of the part of the disk that is read and written.
    #[arg(long, default_value = "1G", value_parser = image_size)]
    size: u64,
    /// Seconds for each figure.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    runtime: f64,
    /// Number of connections in the measurements that have several.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    connections: u32,
    /// One connection, four workloads, half a second each.
    #[arg(long)]
    quick: bool,
    /// Let the kernel cache the images. Without this, direct I/O is used if the filesystem allows it.
    #[arg(long)]
    page_cache: bool,
    /// Use direct I/O without registering buffers with the ring.
    #[arg(long, hide = true, conflicts_with = "page_cache")]
    no_registered_buffers: bool,
}

/// The volume that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Subject {
    Encrypted,
    Plaintext,
}

#[derive(Serialize)]
struct Row {
    subject: Subject,
    workload: Workload,
    #[serde(flatten)]
    sample: Sample,
    limit: Limit,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    interrupt::catch()?;
    let stage = match &args.device {
        Some(disk) => Stage::on_disk(disk, args.size, args.wipe)?,
        None => Stage::in_directory(&args.dir.clone().unwrap_or_else(stage::usual_directory), args.size)?,
    };
    let runtime = Duration::from_secs_f64(if args.quick { args.runtime.min(0.5) } else { args.runtime });
    let machine = Machine::with(&[]);
    if !args.json {
        tell(heading(&machine))?;
    }
    let mut rows = Vec::new();
    for workload in workloads(args) {
        let [encrypted, plain] = [Subject::Encrypted, Subject::Plaintext]
            .map(|subject| measure(subject, &workload, &stage, runtime, args).with_context(|| workload.name()));
        let (encrypted, plain) = (encrypted?, plain?);
        if !args.json {
            tell(format_args!(
                "{:<40}{:>9.0}{:>9.0}{:>7.2}{:>10.0}{:>10.0}{:>9.3}\n",
                workload.name(),
                encrypted.mb_per_s,
                plain.mb_per_s,
                encrypted.mb_per_s / plain.mb_per_s,
                encrypted.iops,
                encrypted.p99_us,
                encrypted.server_cpu_s_per_gb.unwrap_or(f64::NAN),
            ))?;
        }
        for (subject, sample) in [(Subject::Encrypted, encrypted), (Subject::Plaintext, plain)] {
            rows.push(Row { subject, workload, sample, limit: sample.limit(workload.connections, cores()) });
        }
    }
    ensure!(!rows.is_empty(), "nothing was measured");
    if args.json {
        tell(format_args!("{}\n", serde_json::to_string_pretty(&Report { machine, rows })?))?;
    }
    Ok(())
}

fn heading(machine: &Machine) -> String {
    let debug = if cfg!(debug_assertions) {
        " (a debug build, which is slow: measure a build made with --release)"
    } else {
        ""
    };
    format!(
        "{} x {}, Linux {}{debug}\nencrypted, compared with this server without its cipher\n\n{:<40}{:>9}{:>9}{:>7}{:>10}{:>10}{:>9}\n",
        machine.cores, machine.cpu, machine.kernel, "", "MB/s", "plain", "ratio", "IOPS", "p99 us", "CPU s/GB"
    )
}

/// Measures one workload on a new server.
fn measure(subject: Subject, workload: &Workload, stage: &Stage, runtime: Duration, args: &Args) -> Result<Sample> {
    interrupt::check()?;
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let volume = match subject {
        Subject::Encrypted => open_encrypted(stage, caching)?,
        Subject::Plaintext => Volume::plaintext(stage::open(&stage.plain, caching)?, SectorSize::B512)?,
    };
    let settings = Settings { registered_buffers: !args.no_registered_buffers, ..Settings::default() };
    let socket = stage.socket();
    let server = Running::start(volume, &socket, settings)?;
    let before = process_cpu_seconds();
    let seen = lean::drive(&socket, workload, stage.region, runtime)?;
    // This process is server and client. The client counts the CPU time of its own threads, and the rest is the
    // server's.
    let used = (process_cpu_seconds() - before - seen.client_cpu).max(0.0);
    server.stop()?;
    Ok(Sample::new(&seen, &Cost { server: Some(used), peak_rss: None }))
}

fn open_encrypted(stage: &Stage, caching: Caching) -> Result<Volume> {
    let store = stage::open(&stage.luks, caching)?;
    let passphrase = Passphrase::new(std::fs::read(stage.key())?);
    let unlocked = luks::read(store.as_ref(), &Limits::default())?.unlock(store.as_ref(), &passphrase)?;
    Ok(Volume::encrypted(store, unlocked.segment, &unlocked.key)?)
}

/// Returns the CPU time that all threads of this process have used so far.
fn process_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A server on threads of this process.
struct Running {
    trigger: Trigger,
    serving: JoinHandle<Result<()>>,
    socket: PathBuf,
}

impl Running {
    /// Starts a server. Once this returns, the server listens on `socket`.
    fn start(volume: Volume, socket: &Path, settings: Settings) -> Result<Self> {
        let server = Server::new(Exports::new([Export::new("", Arc::new(volume))])?, settings)?;
        let runtime = crate::machine::process::runtime()?;
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(socket).with_context(|| socket.display().to_string())?
        };
        let (trigger, stop) = shutdown();
        let serving = std::thread::Builder::new()
            .name("server".to_owned())
            .spawn(move || Ok(runtime.block_on(server.run(listener, stop))?))?;
        Ok(Self { trigger, serving, socket: socket.to_owned() })
    }

    fn stop(self) -> Result<()> {
        self.trigger.stop();
        let served = self.serving.join().unwrap_or_else(|_| anyhow::bail!("the server panicked"));
        std::fs::remove_file(&self.socket)?;
        served
    }
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
