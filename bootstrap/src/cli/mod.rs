//! The command line: what a user can type, and which file carries it out.

mod advice;
mod ask_aws;
mod background;
mod bench;
mod bind_mount;
mod child;
mod cryptsetup_args;
mod demo;
mod devices;
mod doctor;
mod down;
mod dump;
mod examples;
mod format;
mod found;
mod header;
mod header_args;
mod journal;
mod kdf_args;
mod key;
mod log;
mod mistyped;
mod passphrase;
mod plain_args;
mod plan;
mod policy;
mod provision;
mod serve;
mod status;
mod systemd_generator;
pub mod telling;
mod token;
mod up;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use engine::text::is_unseen;

use self::advice::Settings;
use crate::machine::process;
use crate::service::run_dir;
use crate::text;

/// dm-crypt without dm-crypt: LUKS volumes encrypted in user space, served over NBD or FUSE, unlocked by AWS KMS.
#[derive(Debug, Parser)]
#[command(name = "nbdcrypt", version, max_term_width = 100, after_help = examples::NBDCRYPT)]
pub struct Cli {
    /// The folder in which running volumes keep their state. [default: /run/nbdcrypt]
    #[arg(long, global = true, value_name = "DIR", default_value = run_dir::DEFAULT_BASE, hide_default_value = true)]
    run_dir: PathBuf,
    /// Log more on standard error. Given twice, it logs still more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Try everything on this machine, without a cloud account, and clean up afterwards.
    #[command(after_help = examples::DEMO)]
    Demo(demo::Args),
    /// Make the volume's secret, encrypt it with KMS, and store it in S3.
    #[command(after_help = examples::PROVISION)]
    Provision(provision::Args),
    /// Unlock a volume (or format it if the disk is blank), attach it, make a filesystem if it has none, and mount it.
    #[command(after_help = examples::UP)]
    Up(up::Args),
    /// Unmount and detach a volume, and stop its server, which wipes the key.
    #[command(after_help = examples::DOWN)]
    Down(down::Args),
    /// Show step by step what `up` would do, without changing anything.
    #[command(after_help = examples::PLAN)]
    Plan(plan::Args),
    /// Print the least IAM, KMS and S3 policies that a volume needs.
    #[command(after_help = examples::POLICY)]
    Policy(policy::Args),
    /// Show the volumes that are up, as `cryptsetup status` does, and more. For programs that watch them, the exit code is 0 if
    /// all is well, 3 if the volume is not up, and 4 if something is wrong with it.
    #[command(after_help = examples::STATUS)]
    Status(status::Args),
    /// Show the disks of this machine, what they hold, and whether `up` would take them.
    #[command(after_help = examples::DEVICES)]
    Devices(devices::Args),
    /// Show what this machine or a configuration lacks for `up`, each with its cure. Nothing is changed or unlocked.
    #[command(after_help = examples::DOCTOR)]
    Doctor(doctor::Args),
    /// Make a LUKS volume on a blank disk or in a new file.
    #[command(after_help = examples::FORMAT)]
    Format(format::Args),
    /// Serve volumes to NBD clients, in the foreground.
    #[command(after_help = examples::SERVE)]
    Serve(serve::Args),
    /// Show a volume's header, as `cryptsetup luksDump` does.
    #[command(after_help = examples::DUMP)]
    Dump(dump::Args),
    /// List, add, change, test and remove the keys that open a volume.
    #[command(after_help = examples::KEY)]
    #[command(subcommand)]
    Key(key::Command),
    /// List, import, export and remove the tokens in a LUKS2 header, which help to open the volume.
    #[command(after_help = examples::TOKEN)]
    #[command(subcommand)]
    Token(token::Command),
    /// Back up, restore, repair or change a volume's header.
    #[command(after_help = examples::HEADER)]
    #[command(subcommand)]
    Header(header::Command),
    /// Measure throughput on this machine.
    #[command(after_help = examples::BENCH)]
    Bench(bench::Args),
    /// For nbdcrypt itself: run a program that ends when the server ends.
    #[command(hide = true)]
    Child(child::Args),
    /// For nbdcrypt itself: mount a folder of a volume elsewhere as well.
    #[command(hide = true)]
    BindMount(bind_mount::Args),
    /// For nbdcrypt-generator: write the units that systemd needs for each volume.
    #[command(hide = true)]
    SystemdGenerator(systemd_generator::Args),
    /// For nbdcrypt itself: ask AWS for a secret.
    #[command(name = crate::keys::AWS_HELPER, hide = true)]
    AskAws,
}

impl Command {
    /// Returns where the command logs to.
    fn log(&self) -> log::To {
        match self {
            // These open the journal when they know the volume's name.
            Self::Up(_) | Self::Down(_) => log::To::StandardError,
            _ => log::To::JournalIfThere,
        }
    }

    /// Returns how the command gets the settings that advice may name.
    fn settings(&self) -> Settings {
        match self {
            Self::Up(_) | Self::Plan(_) => Settings::Configuration,
            Self::Key(args) => args.settings(),
            Self::Serve(_) => Settings::Options { key_slot: true },
            _ => Settings::Options { key_slot: false },
        }
    }
}

/// Reads the command line, and carries out the command. Errors are printed on standard error here.
pub fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => run(cli),
        Err(error) => {
            let arguments: Vec<_> =
                std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
            let error = mistyped::explained(error, &arguments);
            if !error.use_stderr() || !arguments.iter().any(|argument| argument.contains(is_unseen)) {
                error.exit();
            }
            let _ = write!(std::io::stderr(), "{}", with_escaped_arguments(&error, &arguments));
            ExitCode::from(2)
        }
    }
}

/// Returns clap's error about `arguments`. Characters that a terminal would obey are shown by their number. clap quotes
/// arguments unchanged, so this function makes clap parse escaped arguments.
fn with_escaped_arguments(error: &clap::Error, arguments: &[String]) -> String {
    let arguments: Vec<_> = arguments.iter().map(|argument| engine::text::printable(argument)).collect();
    match Cli::try_parse_from(&arguments) {
        Err(escaped) => text::lines(&mistyped::explained(escaped, &arguments).to_string()),
        Ok(_) => text::lines(&error.to_string()),
    }
}

/// Carries out the command. An error is printed on standard error here.
fn run(cli: Cli) -> ExitCode {
    log::start(cli.verbose, cli.command.log());
    let settings = cli.command.settings();
    match process::respect_limits().map_err(anyhow::Error::from).and_then(|()| dispatch(cli)) {
        Ok(code) => code,
        // The reader of the pipe has ended, as in `nbdcrypt dump disk | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<clap::Error>() => {
            let _ = write!(std::io::stderr(), "{error}");
            ExitCode::from(2)
        }
        Err(error) => {
            // `eprintln!` would panic if standard error is closed or its disk is full.
            let _ = writeln!(std::io::stderr(), "nbdcrypt: {}", telling::with_advice(&error, settings));
            ExitCode::FAILURE
        }
    }
}

/// Carries out the command, and returns the exit code of a success.
fn dispatch(cli: Cli) -> Result<ExitCode> {
    // A server in the background changes its working directory.
    let base = &std::path::absolute(&cli.run_dir)?;
    let done = match cli.command {
        Command::Demo(args) => demo::run(args),
        Command::Provision(args) => provision::run(args),
        Command::Up(args) => up::run(args, base, cli.verbose),
        Command::Down(args) => down::run(args, base),
        Command::Plan(args) => plan::run(args, base),
        Command::Policy(args) => policy::run(args),
        Command::Status(args) => return status::run(args, base),
        Command::Devices(args) => devices::run(&args),
        Command::Doctor(args) => doctor::run(&args, base),
        Command::Format(args) => format::run(args),
        Command::Serve(args) => return serve::run(args),
        Command::Dump(args) => dump::run(args),
        Command::Key(args) => key::run(args),
        Command::Token(args) => token::run(args),
        Command::Header(args) => header::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Child(args) => child::run(args),
        Command::BindMount(args) => bind_mount::run(&args),
        Command::SystemdGenerator(args) => systemd_generator::run(args),
        Command::AskAws => ask_aws::run(),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Returns an error about the arguments of a command that only the command itself could find. The program ends with the exit
/// code for wrong usage.
fn wrong_usage(command: &str, kind: ErrorKind, text: &str) -> anyhow::Error {
    let mut all = Cli::command();
    all.build();
    let command = all.find_subcommand_mut(command).expect("the caller is one of the commands");
    command.error(kind, text).into()
}

/// Prints `text` on standard output. Characters that a terminal would obey are shown by their number. Unlike `println!`,
/// this does not panic if nobody reads any more.
fn tell(text: impl std::fmt::Display) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let text = text::lines(&text.to_string());
    write!(stdout, "{text}").and_then(|()| stdout.flush()).map_err(|error| Unread(error).into())
}

/// Prints JSON without characters that a terminal would obey. serde_json leaves some control characters as they are, and
/// these may come from a header. A JSON string may hold them as escapes (RFC 8259, section 7).
fn tell_json(json: impl std::fmt::Display) -> Result<()> {
    tell(format_args!("{}\n", without_controls(&json.to_string())))
}

fn without_controls(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for letter in json.chars() {
        // Outside strings, the only such character in JSON is the newline. Inside strings, newlines are escaped already.
        match is_unseen(letter) && letter != '\n' {
            true => {
                let units =
                    letter.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
                text.push_str(&units);
            }
            false => text.push(letter),
        }
    }
    text
}

/// Adds the name of a disk or file to an error. Errors about opening a disk, and errors in a configuration, contain the name
/// already.
fn of(name: &str, error: anyhow::Error) -> anyhow::Error {
    match error.is::<crate::machine::disk::DiskError>() || error.is::<crate::config::ConfigError>() {
        true => error,
        false => error.context(name.to_owned()),
    }
}

/// Writing to standard output failed.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
struct Unread(std::io::Error);

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Unread>().is_some_and(|unread| unread.0.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Returns every command that is not hidden, with the words that call it.
    fn commands() -> Vec<(Vec<String>, clap::Command)> {
        fn below(words: &[String], command: &clap::Command, all: &mut Vec<(Vec<String>, clap::Command)>) {
            for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help") {
                let words = [words, &[inner.get_name().to_owned()]].concat();
                all.push((words.clone(), inner.clone()));
                below(&words, inner, all);
            }
        }
        let mut all = Vec::new();
        below(&[], &Cli::command(), &mut all);
        all
    }

    #[test]
    fn every_command_has_examples_that_can_be_typed() {
        let mut typed = 0;
        for (words, command) in commands().into_iter().chain([(Vec::new(), Cli::command())]) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:"), "{words:?} has no examples");
            for line in help.replace("\\\n", " ").lines() {
                let example = line.split('#').next().unwrap_or_default().trim();
                let arguments: Vec<&str> = example.trim_start_matches("sudo ").split_whitespace().collect();
                if arguments.first() == Some(&"nbdcrypt") {
                    let parsed = Cli::try_parse_from(&arguments);
                    assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
                    typed += 1;
                }
            }
            assert!(help.lines().all(|line| line.len() <= 100), "{help}");
        }
        assert!(typed > 40, "{typed}");
    }

    #[test]
    fn an_error_about_an_argument_quotes_it_escaped() {
        for arguments in [&["nbdcrypt", "fo\u{1b}[31m\no"][..], &["nbdcrypt", "format", "x", "--size=1\u{202e}\n2"]] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
            let shown = with_escaped_arguments(&error, &arguments);
            assert!(shown.contains("\\u{a}") && (shown.contains("\\u{1b}") || shown.contains("\\u{202e}")), "{shown}");
            assert!(!shown.contains(|letter| is_unseen(letter) && letter != '\n'), "{shown:?}");
            assert!(!shown.lines().any(|line| line.starts_with(['o', '2'])), "{shown}");
        }
    }

    /// Each heading in a command's help covers only the options that are listed for it here.
    #[test]
    fn a_heading_covers_no_unrelated_option() {
        let headings = [
            (
                "Options for --type plain, as in cryptsetup",
                &[
                    "sector-size",
                    "key-size",
                    "offset",
                    "skip",
                    "size",
                    "hash",
                    "iv-large-sectors",
                    "cipher",
                    "keyfile-size",
                    "hash-key-file",
                ][..],
            ),
            ("TLS", &["tls", "tls-certificates", "tls-verify-peer"]),
            (
                "Key derivation",
                &["pbkdf", "hash", "iter-time", "pbkdf-memory", "pbkdf-parallel", "pbkdf-force-iterations"],
            ),
            ("Limits of key derivation", &["max-kdf-memory", "max-kdf-iterations", "max-kdf-passes"]),
        ];
        let mut seen = 0;
        for (words, command) in commands() {
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let Some(heading) = argument.get_help_heading() else { continue };
                let covered = headings.iter().find(|(name, _)| *name == heading);
                let covered = covered.unwrap_or_else(|| panic!("{words:?}: what does `{heading}` cover?")).1;
                let name = argument.get_long().unwrap_or_default();
                assert!(covered.contains(&name), "{words:?}: `{heading}` covers --{name}");
                seen += 1;
            }
        }
        assert!(seen > 15, "{seen}");
    }

    #[test]
    fn json_holds_no_character_that_a_terminal_obeys() {
        let json = without_controls("{\"a\u{9b}\u{202e}\u{e0001}\": 1}\n");
        assert_eq!(json, "{\"a\\u009b\\u202e\\udb40\\udc01\": 1}\n");
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["a\u{9b}\u{202e}\u{e0001}"], 1);
    }
}
