//! The command line: what there is to type, and which file carries it out.

mod background;
mod bench;
mod demo;
mod down;
mod dump;
mod format;
mod header;
mod header_args;
mod kdf_args;
mod key;
mod passphrase;
mod plain_args;
mod plan;
mod provision;
mod serve;
mod status;
mod token;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::run_dir;

/// dm-crypt without dm-crypt: LUKS volumes encrypted in user space, served over NBD or FUSE, unlocked by AWS KMS.
#[derive(Debug, Parser)]
#[command(name = "nbdcrypt", version, max_term_width = 100)]
pub struct Cli {
    /// Where running volumes keep their state.
    #[arg(long, global = true, value_name = "DIR", default_value = run_dir::DEFAULT_BASE, hide_default_value = true)]
    run_dir: PathBuf,
    /// Tell more on standard error; twice, even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole job on this machine, with no cloud account, and cleaned up after.
    Demo(demo::Args),
    /// Make the volume's secret: encrypt it with KMS, then store it in S3.
    Provision(provision::Args),
    /// Unlock the volume, or format it if the disk is blank; attach, make a filesystem if there is none, and mount.
    Up(up::Args),
    /// Unmount, detach, and stop the server; the key is wiped.
    Down(down::Args),
    /// What `up` would do, step by step, changing nothing.
    Plan(plan::Args),
    /// The volumes that are up, as `cryptsetup status` shows them, and more.
    Status(status::Args),
    /// Make a LUKS volume on a blank disk or a new file.
    Format(format::Args),
    /// Serve volumes to NBD clients, in the foreground.
    Serve(serve::Args),
    /// The header of a volume, as `cryptsetup luksDump` shows it.
    Dump(dump::Args),
    /// The keys that open a volume: list, add, change, remove.
    Key(key::Args),
    /// What else a LUKS2 header holds that helps to open the volume: list, import, export, remove.
    Token(token::Args),
    /// A volume's header as a whole.
    Header(header::Args),
    /// Throughput on this machine.
    Bench(bench::Args),
}

/// Carries out what was typed. Errors are told here, on standard error.
pub fn run(cli: Cli) -> ExitCode {
    log_to_stderr(cli.verbose);
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough, as in `nbdcrypt dump disk | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbdcrypt: {}", in_one(&error));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> Result<()> {
    // A server in the background is at home in another folder.
    let base = &std::path::absolute(&cli.run_dir)?;
    match cli.command {
        Command::Demo(args) => demo::run(args),
        Command::Provision(args) => provision::run(args),
        Command::Up(args) => up::run(args, base),
        Command::Down(args) => down::run(args, base),
        Command::Plan(args) => plan::run(args, base),
        Command::Status(args) => status::run(args, base),
        Command::Format(args) => format::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Dump(args) => dump::run(args),
        Command::Key(args) => key::run(args),
        Command::Token(args) => token::run(args),
        Command::Header(args) => header::run(args),
        Command::Bench(args) => bench::run(args),
    }
}

/// Prints on standard output. Unlike `println!` it does not panic where nobody reads any more.
fn tell(text: impl std::fmt::Display) -> Result<()> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(|error| Unread(error).into())
}

/// Writes JSON, in which a terminal finds nothing to obey: serde_json leaves some control characters as they are, which
/// may come from a header, and a string may have them as escapes (RFC 8259, section 7).
fn tell_json(json: impl std::fmt::Display) -> Result<()> {
    tell(format_args!("{}\n", without_controls(&json.to_string())))
}

fn without_controls(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for letter in json.chars() {
        // Outside of a string there is no other than the newline, and in one there is none of these.
        match letter.is_control() && letter != '\n' {
            true => text.push_str(&format!("\\u{:04x}", u32::from(letter))),
            false => text.push(letter),
        }
    }
    text
}

/// What went wrong with the disk or file of that name, which errors about opening it tell themselves; those about a
/// configuration tell its name.
fn of(name: &str, error: anyhow::Error) -> anyhow::Error {
    match error.is::<crate::disk::DiskError>() || error.is::<crate::config::ConfigError>() {
        true => error,
        false => error.context(name.to_owned()),
    }
}

/// Standard output could not be written to.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
struct Unread(std::io::Error);

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Unread>().is_some_and(|unread| unread.0.kind() == std::io::ErrorKind::BrokenPipe)
}

/// An error with its causes, leaving out those that the one above quotes already.
fn in_one(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

fn log_to_stderr(verbose: u8) {
    use tracing::level_filters::LevelFilter;
    use tracing_subscriber::Layer;
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // Other crates tell no more than warnings: what the SDK tells of its requests could hold what nobody may see.
    let told = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("bootstrap", level)
        .with_target("nbd_server", level)
        .with_target("engine", level);
    let to_stderr = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .without_time();
    tracing_subscriber::registry().with(to_stderr.with_filter(told)).init();
}
