//! `nbdcrypt bench`: throughput on this machine.
//!
//! `xts` computes in this process. `device` and `compare` start servers as processes of their own (`contestant`), one at a
//! time, or have the kernel make a block device (`subject`), and drive it with fio or with the lean client; `yardstick`,
//! `null`, `plaintext` and `attached` are servers for that alone.

mod attached;
mod bars;
mod chart;
mod compare;
mod contestant;
mod device;
mod dm_crypt;
mod fio;
mod interrupt;
mod lean;
mod machine;
mod null;
mod plaintext;
mod report;
mod sample;
mod server_process;
mod stage;
mod subject;
mod workload;
mod xts;
mod yardstick;

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
    /// This server through a unix socket, encrypted beside plaintext, driven by fio.
    Device(device::Args),
    /// This server beside every other that is installed: qemu-nbd, nbdkit, dm-crypt; in turns, driven by fio.
    Compare(compare::Args),
    /// A server that does nothing but move bytes: one blocking thread a connection, no encryption.
    ///
    /// It is a part of the program so that `compare` has it wherever the program is, with no source and no compiler.
    #[command(hide = true)]
    Yardstick(yardstick::Args),
    /// A server with nothing behind it: what a client reaches at most.
    #[command(hide = true)]
    Null(null::Args),
    /// This server without its cipher.
    #[command(hide = true)]
    Plaintext(plaintext::Args),
    /// This server, attached to the kernel.
    #[command(hide = true)]
    Attached(attached::Args),
}

pub(super) fn run(args: Args) -> Result<()> {
    match args.what {
        What::Xts(args) => xts::run(args),
        What::Device(args) => device::run(args),
        What::Compare(args) => compare::run(&args),
        What::Yardstick(args) => yardstick::run(&args),
        What::Null(args) => null::run(&args),
        What::Plaintext(args) => plaintext::run(&args),
        What::Attached(args) => attached::run(&args),
    }
}
