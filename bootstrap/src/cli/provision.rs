//! `nbdcrypt provision`: makes the volume's secret.

use std::path::PathBuf;

use anyhow::Result;

use super::tell;
use crate::config::Config;
use crate::provision;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration, with an `aws` key.
    config: PathBuf,
    /// Replace the object that is there: what only its secret unlocks is lost.
    #[arg(long)]
    replace: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let config = Config::load(&args.config)?;
    crate::process::protect_secrets();
    let made = provision::provision(&config, args.replace)?;
    if let Err(error) = &made.read_back {
        tracing::warn!("the secret is stored, but could not be read back to be checked: {error}");
    }
    tell(format_args!("{}: a new secret, encrypted under {}\n", made.object, made.key_arn))
}
