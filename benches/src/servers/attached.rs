//! `nbdcrypt-bench attached`: attaches this server to the kernel's NBD client until it is told to stop.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::key::Passphrase;
use engine::luks::{self, Limits};
use engine::store::Caching;
use engine::volume::Volume;
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use bootstrap::attach::{self, Method, Options};
use bootstrap::bench::stage;
use bootstrap::config::AttachConfig;

/// The arguments of `nbdcrypt-bench attached`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file or disk with the LUKS volume.
    disk: PathBuf,
    /// The file with the volume's passphrase.
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    /// Let the kernel cache the ciphertext.
    #[arg(long)]
    page_cache: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let store = stage::open(&args.disk, caching)?;
    let passphrase =
        Passphrase::new(std::fs::read(&args.key_file).with_context(|| args.key_file.display().to_string())?);
    let volume = luks::read(store.as_ref(), &Limits::default())?.unlock(store.as_ref(), &passphrase)?;
    let volume = Volume::encrypted(store, volume.segment, &volume.key)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // This must be set before a device exists: the measuring process may be killed at any time, and cannot detach the
    // device then.
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
        tracing::warn!(
            "cannot ask for a signal at the parent's end ({error}): if the parent is killed, the device stays attached"
        );
    }
    let [mut terminate, mut interrupt, mut hangup] = {
        let _entered = runtime.enter();
        [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?]
    };
    let options = Options {
        method: Method::Nbd,
        device: None,
        connections: AttachConfig::DEFAULT_CONNECTIONS.into(),
        request_timeout: None,
        read_only: false,
        identifier: format!("nbdcrypt-bench-{}", std::process::id()),
        // Only FUSE uses this.
        mount_dir: PathBuf::new(),
    };
    let attachment = attach::attach(Arc::new(volume), &options)?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", attachment.device().display())?;
    out.flush()?;
    let ended = attachment.ended();
    let ended = runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            _ = hangup.recv() => None,
            ended = ended.wait() => Some(ended),
        }
    });
    attachment.detach()?;
    match ended {
        None => Ok(()),
        Some(ended) => bail!("{ended}"),
    }
}
