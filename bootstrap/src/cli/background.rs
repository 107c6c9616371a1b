//! Two processes for one `up`. The user starts the front process, which waits. The server runs in the background, does the
//! work and keeps running.
//!
//! The server reports its progress over a pipe, which is its standard output. It sends a line for each step, and then a line
//! that says that the volume is up. If the pipe ends before that line, the start has failed. The server has then printed the
//! reason on standard error, which both processes share. If the server was killed and could not print anything, the front
//! process says so.
//!
//! The front process passes on SIGINT, SIGTERM and SIGHUP, and waits until the server has undone everything. If the front
//! process is killed, the server sees the end of the pipe and undoes everything as well (`boot::Waiting::Front`).

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

use super::up::show;
use crate::machine::process;
use crate::service::boot::Progress;
use crate::service::run_dir::RunDir;

/// The first words of the lines on the pipe.
const CLEANING_UP: &str = "cleaning-up";
const DOING: &str = "doing ";
const DONE: &str = "done ";
const MADE: &str = "made ";
const UP: &str = "up ";

/// What can happen in the front process.
enum Event {
    /// The server has sent a line.
    Line(String),
    /// The server has closed the pipe.
    End,
    /// A signal asks this process to stop.
    Signal(Signal),
}

/// Starts the server and waits until the volume is up. The server logs as much as this process does (`verbose`). If the
/// start fails and the server has printed the reason, this process ends with the server's exit code.
///
/// # Errors
/// Fails if the server could not be started, if it was killed, or if a signal came too late to cancel the start.
pub(super) fn up(name: &str, config: &Path, base: &Path, verbose: u8) -> Result<()> {
    let program = std::env::current_exe().context("this program's own file")?;
    let (events, happened) = channel();
    // Signals are caught before the server is started. Otherwise a signal could end this process while the server keeps
    // running.
    let _signals = watch_signals(&events)?;
    let mut behind = Command::new(program)
        .arg("--run-dir")
        .arg(base)
        .args(["up", "--behind"])
        .args((0..verbose).map(|_| "-v"))
        .arg(config)
        .envs(crate::keys::absolute_aws_files())
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start the server")?;
    let pipe = behind.stdout.take().context("the server's standard output")?;
    std::thread::Builder::new().name("pipe".to_owned()).spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = events.send(Event::Line(line));
        }
        let _ = events.send(Event::End);
    })?;
    let mut passed_on = false;
    let mut doing = "it was starting".to_owned();
    let mut text = None;
    for event in happened {
        match event {
            Event::Line(line) => {
                if let Some(up) = line.strip_prefix(UP) {
                    text = Some(up.to_owned());
                    break;
                }
                doing = follow(&line).unwrap_or(doing);
            }
            Event::Signal(signal) => {
                pass_on(&behind, signal);
                passed_on = true;
            }
            Event::End => break,
        }
    }
    match text {
        Some(text) if !passed_on => {
            show(Progress::Up(&text));
            Ok(())
        }
        // The volume came up before the server got the signal. The server takes it down again.
        Some(_) => match behind.wait()? {
            status if status.success() => bail!("interrupted; {name} was up already, and is down again"),
            status => Err(failed(name, status, "it was going down again", base)),
        },
        None => {
            let status = behind.wait()?;
            match status.code() {
                Some(code @ (0 | 1)) => std::process::exit(code),
                _ => Err(failed(name, status, &doing, base)),
            }
        }
    }
}

/// Shows a line of progress. Returns what the server is doing after this line, or `None` if the line does not say that.
fn follow(line: &str) -> Option<String> {
    if let Some(step) = line.strip_prefix(DONE) {
        show(Progress::Done(step));
        return Some(format!("it was past the step `{step}`"));
    }
    if let Some(what) = line.strip_prefix(DOING) {
        show(Progress::Doing(what));
        return Some(format!("it was {what}"));
    }
    if let Some(text) = line.strip_prefix(MADE) {
        show(Progress::Made(text));
        return None;
    }
    if line == CLEANING_UP {
        show(Progress::CleaningUp);
        return Some("it was cleaning up after a server that died".to_owned());
    }
    // Another `nbdcrypt up` has brought the volume up first. The line says so, and is shown as it is.
    let _ = super::tell(format_args!("{line}\n"));
    None
}

/// Returns the error about a server that ended without saying why.
fn failed(name: &str, status: ExitStatus, doing: &str, base: &Path) -> anyhow::Error {
    let how = match status.signal().and_then(Signal::from_named_raw) {
        Some(signal) => format!("was killed by signal {} ({})", signal.as_raw(), name_of(signal)),
        None => format!("ended ({status})"),
    };
    let memory = if status.signal() == Some(Signal::KILL.as_raw()) {
        ". The kernel does that when memory runs out: see `dmesg`"
    } else {
        ""
    };
    let log = RunDir::new(base, name).log();
    let log = if log.exists() { format!("; its log is {}", log.display()) } else { String::new() };
    anyhow::anyhow!(
        "the server of {name} {how} while {doing}{memory}. The next `nbdcrypt up` cleans up what it left, and so does \
         `nbdcrypt down {name}`{log}"
    )
}

fn name_of(signal: Signal) -> &'static str {
    match signal {
        Signal::KILL => "SIGKILL",
        Signal::TERM => "SIGTERM",
        Signal::INT => "SIGINT",
        Signal::HUP => "SIGHUP",
        Signal::ABORT => "SIGABRT",
        Signal::SEGV => "SIGSEGV",
        Signal::BUS => "SIGBUS",
        Signal::ILL => "SIGILL",
        Signal::SYS => "SIGSYS, as a seccomp filter does",
        Signal::XCPU => "SIGXCPU, the limit of CPU time",
        Signal::XFSZ => "SIGXFSZ, the limit of file sizes",
        _ => "see signal(7)",
    }
}

fn pass_on(behind: &Child, signal: Signal) {
    // The process id stays valid until this process has waited for the server.
    if let Err(error) = rustix::process::kill_process(Pid::from_child(behind), signal) {
        tracing::debug!("the server is gone: {error}");
    }
}

/// Turns the signals that end a program into events, as long as the returned runtime lives.
fn watch_signals(events: &Sender<Event>) -> Result<tokio::runtime::Runtime> {
    use tokio::signal::unix::{SignalKind, signal};
    nbd_server::threads::can_start(1)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut kinds = vec![(SignalKind::interrupt(), Signal::INT), (SignalKind::terminate(), Signal::TERM)];
    if !process::is_hangup_ignored() {
        kinds.push((SignalKind::hangup(), Signal::HUP));
    }
    for (kind, passed) in kinds {
        let events = events.clone();
        let _inside = runtime.enter();
        let mut signals = signal(kind)?;
        runtime.spawn(async move {
            while signals.recv().await.is_some() {
                let _ = events.send(Event::Signal(passed));
            }
        });
    }
    Ok(runtime)
}

/// Detaches the server from the terminal and from the working directory.
pub(super) fn leave_the_terminal() -> Result<()> {
    rustix::process::setsid().context("setsid")?;
    rustix::process::chdir("/").context("chdir /")?;
    Ok(())
}

/// Reports the server's progress to the front process. Once the volume is up, closes everything that the two processes
/// share. From then on, the server logs to `log`.
pub(super) fn report(progress: Progress<'_>, log: &Path) -> Result<()> {
    let mut pipe = std::io::stdout();
    match progress {
        Progress::CleaningUp => writeln!(pipe, "{CLEANING_UP}")?,
        Progress::Doing(what) => writeln!(pipe, "{DOING}{}", what.replace('\n', " "))?,
        Progress::Done(step) => writeln!(pipe, "{DONE}{step}")?,
        Progress::Made(text) => {
            let _ = writeln!(open_log(log)?, "process {}: {text}", std::process::id());
            writeln!(pipe, "{MADE}{}", text.replace('\n', " "))?;
        }
        Progress::Up(text) => {
            // The log may still hold the lines of an earlier server that ended with an error.
            let mut log = open_log(log)?;
            let nothing = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
            if log.metadata().is_ok_and(|log| log.len() > 0) {
                let _ = writeln!(log, "process {}: {text}", std::process::id());
            }
            writeln!(pipe, "{UP}{text}")?;
            pipe.flush()?;
            rustix::stdio::dup2_stdin(&nothing)?;
            rustix::stdio::dup2_stdout(&nothing)?;
            rustix::stdio::dup2_stderr(&log)?;
        }
    }
    Ok(())
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).context("the log")
}
