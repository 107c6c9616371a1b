//! `nbdcrypt-bench plaintext`: this server on a volume without a cipher, which shows what the cipher costs.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use engine::sector::SectorSize;
use engine::store::Caching;
use engine::volume::Volume;
use nbd_server::{Export, Exports, Server, Settings, shutdown};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use bootstrap::bench::stage;

/// The arguments of `nbdcrypt-bench plaintext`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file or disk to serve.
    file: PathBuf,
    /// Listen on a unix socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Let the kernel cache the file or disk.
    #[arg(long)]
    page_cache: bool,
    /// Make the kernel look up and pin the memory for each request.
    #[arg(long)]
    no_registered_buffers: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let volume = Volume::plaintext(stage::open(&args.file, caching)?, SectorSize::B512)?;
    let settings = Settings { registered_buffers: !args.no_registered_buffers, ..Settings::default() };
    let server = Server::new(Exports::new([Export::new("", Arc::new(volume))])?, settings)?;
    // The same runtime as in `serve`.
    let runtime = bootstrap::machine::process::runtime()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let listener = UnixListener::bind(&args.socket).with_context(|| args.socket.display().to_string())?;
        let (trigger, stop) = shutdown();
        tokio::pin! { let serving = server.run(listener, stop); }
        tokio::select! {
            result = &mut serving => return Ok(result?),
            _ = terminate.recv() => {}
        }
        trigger.stop();
        Ok(serving.await?)
    })
}
