//! `nbdcrypt bench`: measures throughput on this machine, with nothing else installed. A separate program,
//! `nbdcrypt-bench`, compares nbdcrypt with other software.

mod device;
mod xts;

use anyhow::Result;

use super::examples;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measure AES-256-XTS with each set of instructions that this CPU supports, next to the limit of its AES units and to
    /// memcpy.
    #[command(after_help = examples::BENCH)]
    Xts(xts::Args),
    /// Measure this server through a unix socket, encrypted and plaintext, in memory or on a disk.
    #[command(after_help = examples::BENCH)]
    Device(device::Args),
}

pub(super) fn run(args: Args) -> Result<()> {
    match args.what {
        What::Xts(args) => xts::run(args),
        What::Device(args) => device::run(&args),
    }
}
