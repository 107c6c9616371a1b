//! `nbdcrypt bind-mount`, for nbdcrypt itself: mounts a folder of a volume elsewhere as well. A server does not do this itself,
//! because a process that serves a filesystem must not access it.

use std::path::PathBuf;

use anyhow::Result;

use crate::machine::bind_mount;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where the volume's filesystem is mounted.
    mountpoint: PathBuf,
    /// The folder inside the filesystem.
    folder: PathBuf,
    /// Where to mount the folder.
    target: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<()> {
    // The mode of new folders does not depend on the server's umask.
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(bind_mount::bind(&args.mountpoint, &args.folder, &args.target)?)
}
