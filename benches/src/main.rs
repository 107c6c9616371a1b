//! `nbdcrypt-bench`: compares nbdcrypt with other libraries, other servers and the kernel.

use std::process::ExitCode;

use clap::Parser;
use nbdcrypt_benches::cli::{Cli, Command};
use nbdcrypt_benches::{kdf, servers, storm, xts};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Xts(args) => xts::run(&args),
        Command::Servers(args) => servers::run(&args),
        Command::Kdf(args) => kdf::run(&args),
        Command::Storm(args) => storm::run(&args),
        Command::Helper(helper) => helper.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbdcrypt-bench: {}", bootstrap::cli::telling::chain(&error));
            ExitCode::FAILURE
        }
    }
}
