//! `nbdcrypt serve --run`: runs a command that uses the exports. The server lasts as long as the command, as with `nbdkit --run`.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Rlimit, Signal};

use super::place::Endpoint;
use crate::machine::{process, programs};

/// The running command.
pub(super) struct Captive {
    child: tokio::process::Child,
}

impl Captive {
    /// Starts the command in a shell. It learns the address of the export in variables with the names that nbdkit uses.
    ///
    /// The command gets this process's environment, which holds no secret of a volume: keys come from files or the terminal. The
    /// caller chooses its standard input.
    ///
    /// # Errors
    /// Fails if the shell cannot be started.
    pub(super) fn start(
        script: &OsStr,
        input: Stdio,
        uri: &str,
        endpoint: &Endpoint,
        export: &str,
        open_files: Rlimit,
    ) -> Result<Self> {
        let mut shell = programs::shell(script);
        let (socket, port) = match endpoint {
            Endpoint::Unix(path) => (path.clone().into_os_string(), String::new()),
            Endpoint::Tcp { port, .. } => ("".into(), port.to_string()),
            Endpoint::Nameless => ("".into(), String::new()),
        };
        shell.env("uri", uri).env("nbd", uri).env("exportname", export).env("unixsocket", socket).env("port", port);
        shell.stdin(input);
        let mut shell = tokio::process::Command::from(shell);
        let child = process::with_open_files(open_files, || shell.spawn());
        Ok(Self { child: child.context("the shell for --run could not be started")? })
    }

    /// Waits for the end of the command, and returns the exit code that stands for it: its own, or 128 and the number of the
    /// signal that ended it, as in a shell.
    ///
    /// # Errors
    /// Fails if the system does not tell.
    pub(super) async fn ended(&mut self) -> Result<ExitCode> {
        let status = self.child.wait().await.context("the end of the command of --run was not seen")?;
        Ok(exit_code(status))
    }

    /// Sends a signal to the command.
    pub(super) fn pass_on(&self, signal: Signal) {
        // The process ID stays valid until this process has waited for the command.
        let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
        if let Err(error) = rustix::process::kill_process(pid, signal) {
            tracing::debug!("the command of --run got no signal: {error}");
        }
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    // Exit statuses have 8 bits, and there are 64 signals.
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}
