//! `nbdcrypt bench`: throughput on this machine.

mod xts;

use anyhow::Result;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// AES-256-XTS on every path that this CPU has, beside the limit of its AES units and beside memcpy.
    Xts(xts::Args),
}

pub(super) fn run(args: Args) -> Result<()> {
    match args.what {
        What::Xts(args) => xts::run(args),
    }
}
