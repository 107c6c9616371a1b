//! `nbdcrypt`: dm-crypt without dm-crypt.

use std::process::ExitCode;

use bootstrap::cli::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
