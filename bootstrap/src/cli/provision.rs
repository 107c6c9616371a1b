//! `nbdcrypt provision`: makes a volume's secret.

use std::path::PathBuf;

use anyhow::Result;

use super::tell;
use crate::config::Config;
use crate::keys::provision;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration. Its key source must be `aws`.
    config: PathBuf,
    /// Replace an object that exists already. Volumes that only its secret unlocks are lost.
    #[arg(long)]
    replace: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let config = Config::load(&args.config)?;
    crate::machine::process::protect_secrets();
    let made = provision::provision(&config, args.replace)?;
    if let Err(error) = &made.read_back {
        tracing::warn!("the secret is stored, but could not be read back to check it: {error}");
    }
    tell(format_args!("{}: stored a new secret, encrypted under {}\n", made.object, made.key_arn))?;
    if args.replace {
        tracing::warn!(
            "a volume that was made with an earlier secret in {} does not open with the new secret. If the bucket keeps versions, \
             `aws s3api list-object-versions` finds the earlier secret",
            made.object
        );
    }
    Ok(())
}
