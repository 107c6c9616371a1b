//! The server process of a volume that is up. It runs the steps of `up`, serves until it is told to stop, and undoes the
//! steps.
//!
//! The main thread owns the steps. Anything else that happens (a signal, a question over the control socket, the end of the
//! device) reaches the main thread as an event. Another thread reads only `board`, and answers `status` from it at once.
//!
//! # Bounds
//! A start is called off by a signal, by `nbdcrypt down`, and by the end of the front process. This also works while mkfs or
//! mount runs, and while the server waits for a disk or the secret. mount, umount, sync and blockdev have a limit of 15 minutes each.
//! A stop by `nbdcrypt down` is tried once. A stop by SIGTERM is tried until it succeeds (`stopping`). The server keeps
//! asking systemd to extend the timeout for 15 minutes, and for `wait-for` and `retry-for` longer at a start. After that, systemd's
//! `TimeoutStartSec=` and `TimeoutStopSec=` apply.

mod board;
mod calling_off;
mod coming_up;
mod events;
mod manager;
mod pace;
mod server;
mod serving;
mod stall;
mod stopping;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use engine::store::Caching;

use crate::attach::{self, Remains};
use crate::config::{Config, KeyConfig};
use crate::keys;
use crate::machine::random;
use crate::machine::root::Root;
use crate::service::metrics::{self, MetricsServer};
use crate::service::run_dir::{Begun, Claim, State, Wanted};
use crate::service::status::{Condition, algorithm};
use crate::service::system::{self, LongWork, RealDevices, RealDisks, RealFilesystems, RealKeys};
use crate::steps::{self, Boot, Outside};
use board::Board;
use calling_off::CallingOff;
use coming_up::Watched;
use manager::{OVERTIME, Overtime};
use server::Server;

/// The program that runs mkfs for the server, and ends mkfs when the server ends. This is the running nbdcrypt binary, even if
/// its file has been replaced since the start.
const KEEPER: &str = "/proc/self/exe";

/// Progress on the way up.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'p> {
    /// The server cleans up what a dead server left.
    CleaningUp,
    /// The server starts work that may take a long time. The text describes it, such as "making ...".
    Doing(&'p str),
    /// This step is done.
    Done(&'p str),
    /// A new volume or filesystem is complete. The text says where. This is always shown.
    Made(&'p str),
    /// Everything is up. The text says so.
    Up(&'p str),
}

/// Who waits for the volume to come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Nobody, or a service manager.
    Nobody,
    /// The front process, which reads this process's standard output. If it ends, the start is called off.
    Front,
}

/// Brings the volume up, serves it until told to stop, and takes it down.
///
/// # Errors
/// Fails if the volume could not come up; everything is then undone. Also fails if the device ended unexpectedly.
pub fn run(
    config: &Config,
    config_path: &Path,
    claim: Claim,
    waiting: Waiting,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<()> {
    let overtime = Overtime::begin(longest_start(config));
    let dir = claim.dir().clone();
    if let Some(state) = dir.state().with_context(|| dir.path().display().to_string())? {
        progress(Progress::CleaningUp)?;
        // Cleaning up may take a while, and `status` then reports this process. The record of what must be cleaned up is kept,
        // in case this process dies too.
        if let Err(error) = claim.record(&State { pid: std::process::id(), ..state.clone() }) {
            tracing::warn!("{}: {error}", dir.path().display());
        }
        state.clean_up().context("could not clean up what a dead server had left")?;
    }
    let identifier = match identifier(&config.name.to_string()) {
        Ok(identifier) => identifier,
        Err(error) => {
            claim.remove()?;
            return Err(error).context("a name for the device");
        }
    };
    let options = attach_options(config, identifier, dir.fuse());
    let state = State {
        pid: std::process::id(),
        config: config_path.to_owned(),
        wanted: Some(Wanted::of(config)),
        disk: config.volume.devices.single().map_or_else(|| config.volume.devices.describe().into(), Path::to_owned),
        begun: Some(begun(config, &options)),
        metrics: config.metrics.as_ref().and_then(|metrics| metrics.listen.socket().map(Path::to_owned)),
        ..State::default()
    };
    if let Err(error) = claim.record(&state) {
        let _ = claim.remove();
        let place = dir.path().display();
        return Err(error).with_context(|| {
            format!("the state of the volume could not be written to {place}, so nothing was attached")
        });
    }

    let (events, happened) = channel();
    let server = Server {
        config,
        board: Board::new(state.status(config.name.as_str(), Condition::ComingUp), keys::source_name(&config.key)),
        state: RefCell::new(state),
        claim,
        off: CallingOff::default(),
        happened,
        waiting: RefCell::default(),
    };
    let result = bring_up_and_serve(&server, options, &events, waiting, overtime, progress);
    // The folder stays if something could not be undone, so that `down` can clean up.
    if (result.is_ok() || !server.has_made_something())
        && let Err(error) = server.claim.remove()
    {
        tracing::error!("{} could not be removed: {error}", dir.path().display());
    }
    result
}

fn bring_up_and_serve(
    server: &Server<'_>,
    options: attach::Options,
    events: &std::sync::mpsc::Sender<events::Event>,
    waiting: Waiting,
    overtime: Overtime,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<()> {
    let config = server.config;
    let runtime = events::watch_signals(events, &server.off)?;
    let board = server.board.clone();
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(pace::EVERY).await;
            board.sample();
        }
    });
    events::listen(&server.claim.dir().control(), events, &server.board, &server.off)?;
    if waiting == Waiting::Front {
        events::watch_front(events, &server.off)?;
    }
    let root = Root::of_this_machine();
    let progress = RefCell::new(progress);
    let watched = Watched { board: &server.board, off: &server.off, progress: &progress, is_up: Cell::new(false) };
    let _metrics = serve_metrics(server);
    let data_disks = match server.await_disks(&root, &watched) {
        Ok(found) => found,
        Err(error) => return Err(server.conclude(error)),
    };
    let source = keys::source(&config.key);
    let fetching = format!("getting the secret: {}", source.describe());
    let fetch = |request| {
        watched.begins(&fetching);
        server.await_secret(request, events)
    };
    let keys = RealKeys { source, fetch: &fetch, strength: config.strength };
    let devices = RealDevices { options };
    let outside = Outside {
        keys: &keys,
        disks: &RealDisks { caching: Caching::Direct, root: root.clone() },
        devices: &devices,
        filesystems: &RealFilesystems { watch: &watched, keeper: Some(Path::new(KEEPER)), gone: None },
        machine: system::machine()?,
    };
    let mut boot = Boot::new(config, data_disks, outside);
    let mut steps = steps::all(config);

    let mut since = Instant::now();
    let came_up = steps::up(&mut steps, &mut boot, &mut |step, boot| {
        tracing::info!("the step `{}` took {:.1} s", step.name(), since.elapsed().as_secs_f64());
        since = Instant::now();
        server.doing(Condition::ComingUp, &format!("the step `{}` is done", step.name()));
        server.record(boot)?;
        (progress.borrow_mut())(Progress::Done(step.name()))?;
        // A new volume is complete after this step, and stays even if its filesystem cannot be mounted.
        if let Some(news) = boot.news().filter(|_| step.name() == steps::COMPLETING) {
            (progress.borrow_mut())(Progress::Made(&news))?;
        }
        // A mounted filesystem may be in use already. From then on, the volume is stopped in the same way as a volume that is
        // fully up.
        if boot.is_mounted() { Ok(()) } else { server.look_up() }
    });
    if let Err(error) = came_up {
        server.note(&boot);
        // Somebody may use the filesystem already, so that it could not be unmounted. The server must not end below it.
        if boot.attached().is_some() {
            tracing::error!(
                "the start failed, and its steps are undone as soon as nobody uses the filesystem: {error:#}"
            );
            watched.is_up.set(true);
            server.stop(&mut boot, &mut steps)?;
        }
        return Err(server.conclude(error));
    }
    drop(overtime);
    watched.is_up.set(true);
    events::watch_device(boot.attached().and_then(|attached| attached.ended()), events);
    server.board.set(Condition::Up, None);
    let told = (progress.borrow_mut())(Progress::Up(&summary(config, &boot)));
    if let Err(error) = told {
        // The front process is gone, so its user thinks that the start failed.
        match steps::down(&mut steps, &mut boot, &mut |_, boot| server.note(boot)) {
            Ok(()) => return Err(server.conclude(error)),
            Err(why) => {
                tracing::error!("the front process is gone, and the volume could not be taken down again: {why:#}")
            }
        }
    }
    server.serve(&mut boot, &mut steps)
}

/// Serves the metrics, if the configuration asks for it. If this fails, logs a warning, because the volume comes up without
/// metrics, too.
fn serve_metrics(server: &Server<'_>) -> Option<MetricsServer> {
    let config = server.config.metrics.as_ref()?;
    let board = server.board.clone();
    let source = move || Ok(metrics::encode(vec![board.observed()?])?);
    let started =
        config.permissions().and_then(|permissions| Ok(MetricsServer::start(&config.listen, permissions, source)?));
    started.map_err(|error| tracing::warn!("the metrics are not served: {error:#}")).ok()
}

/// Returns how long the service manager is asked to wait for a start: as long as a disk is awaited and AWS is retried, and some
/// time for mkfs.
fn longest_start(config: &Config) -> Duration {
    let retried = match &config.key {
        KeyConfig::Aws(key) => key.retry_for,
        KeyConfig::File(_) | KeyConfig::Ephemeral => Duration::ZERO,
    };
    OVERTIME.saturating_add(retried).saturating_add(config.volume.wait_for)
}

fn begun(config: &Config, options: &attach::Options) -> Begun {
    Begun {
        attachment: Remains {
            method: attach::Method::Auto,
            device: PathBuf::new(),
            identifier: options.identifier.clone(),
            mount_dir: Some(options.mount_dir.clone()),
        },
        mountpoint: config.filesystem.as_ref().map(|filesystem| filesystem.mountpoint.clone()),
    }
}

fn summary(config: &Config, boot: &Boot<'_>) -> String {
    let device = boot.attached().map(|attached| attached.device().display().to_string()).unwrap_or_default();
    let facts =
        boot.facts().map(|facts| format!(" ({}, {})", facts.kind, algorithm(facts.key_bits))).unwrap_or_default();
    let at = config.filesystem.as_ref().map(|filesystem| format!(" on {}", filesystem.mountpoint.display()));
    format!("{} is up: {device}{facts}{}", config.name, at.unwrap_or_default())
}

/// Returns the name under which this server registers its device with the kernel: the volume's name and a number that is unique
/// to this start. A volume of the same name may be up in another container or with another `--run-dir`. Cleaning up must not
/// remove that volume's device.
fn identifier(name: &str) -> std::io::Result<String> {
    let mut number = [0; 4];
    random::fill(&mut number)?;
    Ok(format!("nbdcrypt-{name}-{:08x}", u32::from_ne_bytes(number)))
}

fn attach_options(config: &Config, identifier: String, mount_dir: PathBuf) -> attach::Options {
    attach::Options {
        method: config.attach.method,
        device: config.attach.nbd_device.map(|number| PathBuf::from(format!("/dev/nbd{number}"))),
        connections: usize::from(config.attach.connections),
        request_timeout: config.attach.request_timeout,
        read_only: false,
        identifier,
        mount_dir,
    }
}
