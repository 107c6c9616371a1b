//! `nbdcrypt child`, for nbdcrypt itself: runs a program for a server, and ends the program when the server ends.
//!
//! The server holds the other end of standard input. When the server ends, even by SIGKILL, the kernel closes that end. This
//! process then kills its process group: itself, the program, and everything that the program has started.

use std::ffi::OsString;
use std::io::Read;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::machine::programs::NO_SUCH_PROGRAM;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(super) fn run(args: Args) -> Result<()> {
    let own_group = rustix::process::getpgrp() == rustix::process::getpid();
    ensure!(own_group, "`nbdcrypt child` is for nbdcrypt itself, and needs a process group of its own");
    // The server's SIGTERM goes to the program as well. Catch it here, so that this process ends only after the program. The
    // server then knows when the program has ended.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let _signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?];
    std::thread::Builder::new().name("server".to_owned()).spawn(|| {
        let mut nothing = [0];
        while let Ok(1..) = std::io::stdin().read(&mut nothing) {}
        let _ = rustix::process::kill_current_process_group(Signal::KILL);
    })?;
    let (program, rest) = args.command.split_first().context("no program")?;
    let status = match Command::new(program).args(rest).stdin(Stdio::null()).status() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => std::process::exit(NO_SUCH_PROGRAM.into()),
        status => status.with_context(|| program.display().to_string())?,
    };
    match status.code() {
        Some(code) => std::process::exit(code),
        None => anyhow::bail!("{} ended by {status}", program.display()),
    }
}
