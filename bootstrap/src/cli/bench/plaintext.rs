//! `nbdcrypt bench plaintext`: this server on a volume without a cipher, to show what the cipher costs.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use engine::sector::SectorSize;
use engine::store::Caching;
use engine::volume::Volume;
use nbd_server::{Export, Exports, Server, Settings, shutdown};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use super::stage;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file or disk to serve, as it is.
    file: PathBuf,
    /// Listen on a unix socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Let the kernel cache it.
    #[arg(long)]
    page_cache: bool,
    /// Have the kernel look up and pin the memory of each request anew.
    #[arg(long)]
    no_registered_buffers: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let volume = Volume::plaintext(stage::open(&args.file, caching)?, SectorSize::B512)?;
    let settings = Settings { registered_buffers: !args.no_registered_buffers, ..Settings::default() };
    let server = Server::new(Exports::new([Export::new("", Arc::new(volume))])?, settings)?;
    // As `serve` does.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
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
