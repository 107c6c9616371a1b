//! Two processes for one `up`: the one that was typed waits, and the one behind it does the work and stays.
//!
//! The one behind tells its progress over a pipe, its standard output: a line a step, then one that says it is up. If the
//! pipe ends before that line, it failed, and has said why on the standard error that both share.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::up::show;
use crate::boot::Progress;

/// Words at the start of the lines on the pipe.
const CLEARING_UP: &str = "clearing-up";
const DONE: &str = "done ";
const UP: &str = "up ";

/// Starts the process behind and waits until the volume is up.
///
/// # Errors
/// When it could not be started. When it fails it has said why itself: then this process ends with its exit code.
pub(super) fn up(config: &Path, base: &Path) -> Result<()> {
    let program = std::env::current_exe().context("this program's own file")?;
    let mut behind = Command::new(program)
        .arg("--run-dir")
        .arg(base)
        .args(["up", "--behind"])
        .arg(config)
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start the server")?;
    let pipe = behind.stdout.take().context("the server's standard output")?;
    for line in BufReader::new(pipe).lines() {
        let line = line?;
        if let Some(text) = line.strip_prefix(UP) {
            show(Progress::Up(text));
            return Ok(());
        }
        match line.strip_prefix(DONE) {
            Some(step) => eprint_step(step),
            None if line == CLEARING_UP => show(Progress::ClearingUp),
            None => {}
        }
    }
    let status = behind.wait()?;
    std::process::exit(if status.success() { 0 } else { 1 });
}

fn eprint_step(step: &str) {
    if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        eprintln!("  {step}");
    }
}

/// In the process behind: what is typed at the terminal is not for it any more.
pub(super) fn leave_the_terminal() -> Result<()> {
    rustix::process::setsid().context("setsid")?;
    rustix::process::chdir("/").context("chdir /")?;
    Ok(())
}

/// In the process behind: tells the one in front how far it is, and once the volume is up lets go of everything that
/// the two share. From then on, what there is to say goes to `log`.
pub(super) fn tell(progress: Progress<'_>, log: &Path) -> Result<()> {
    let mut pipe = std::io::stdout();
    match progress {
        Progress::ClearingUp => writeln!(pipe, "{CLEARING_UP}")?,
        Progress::Done(step) => writeln!(pipe, "{DONE}{step}")?,
        Progress::Up(text) => {
            let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log).context("the log")?;
            let nothing = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
            writeln!(pipe, "{UP}{text}")?;
            pipe.flush()?;
            rustix::stdio::dup2_stdin(&nothing)?;
            rustix::stdio::dup2_stdout(&nothing)?;
            rustix::stdio::dup2_stderr(&log)?;
        }
    }
    Ok(())
}
