//! The command line of `nbdcrypt-bench`.

use clap::{Parser, Subcommand};

use crate::{kdf, servers, storm, xts};

/// The examples at the end of each `--help`.
const EXAMPLES: &str = "\
Examples:
  nbdcrypt-bench servers --quick                           # four workloads, half a second each
  nbdcrypt-bench servers --report results --dir /mnt/nvme  # all of them, on a disk
  nbdcrypt-bench xts --rounds 15
  nbdcrypt-bench kdf --rounds 3
  nbdcrypt-bench storm --instances 50000 --quota 20000    # a fleet that boots at once, simulated";

/// Compare nbdcrypt with other software. Run one benchmark at a time, on an otherwise idle machine.
#[derive(Parser)]
#[command(name = "nbdcrypt-bench", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// The comparison to make.
    #[command(subcommand)]
    pub command: Command,
}

/// The comparisons.
#[derive(Subcommand)]
pub enum Command {
    /// Compare AES-256-XTS with other libraries and with the limit of this CPU's AES units.
    #[command(after_help = EXAMPLES)]
    Xts(xts::Args),
    /// Compare the NBD server with qemu-nbd, nbdkit, dm-crypt and a lean server, as far as they are installed.
    #[command(after_help = EXAMPLES)]
    Servers(servers::Args),
    /// Compare opening a LUKS2 volume with cryptsetup.
    #[command(after_help = EXAMPLES)]
    Kdf(kdf::Args),
    /// Simulate a fleet that boots at once, and is throttled by KMS.
    #[command(after_help = EXAMPLES)]
    Storm(storm::Args),
    /// What the benchmarks start themselves.
    #[command(flatten)]
    Helper(servers::Helper),
}
