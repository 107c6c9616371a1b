//! Adds advice to clap's errors about a mistyped command line.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};
use engine::luks::plain::PassphraseHash;

use super::Cli;
use crate::text;

/// The commands that are never suggested, because they destroy or remove something. A user may run a suggested command
/// without checking it.
const NEVER_SUGGESTED: [&str; 7] = ["format", "down", "provision", "remove", "restore", "change", "rewrap"];

/// Adds advice to clap's `error` about `arguments`. `error` may also be a help text, which clap returns as an error, too.
pub(super) fn explained(error: clap::Error, arguments: &[String]) -> clap::Error {
    let mut all = Cli::command();
    all.build();
    let command = called(&mut all, arguments);
    match error.kind() {
        ErrorKind::DisplayHelp => match meant_as_hash(command, arguments) {
            Some(value) => command.error(
                ErrorKind::UnknownArgument,
                format!("'-h' is '--help' and takes no value. For the hash, cryptsetup's '-h', write '--hash {value}'"),
            ),
            None => error,
        },
        ErrorKind::InvalidSubcommand => {
            let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else { return error };
            let names: Vec<String> = visible(command).map(str::to_owned).collect();
            let offered = names.iter().map(String::as_str).filter(|name| !NEVER_SUGGESTED.contains(name));
            let advice = match text::nearest(word, offered) {
                Some(name) => format!("did you mean '{name}'?"),
                None => format!("the commands are {}", names.join(", ")),
            };
            command.error(ErrorKind::InvalidSubcommand, format!("unrecognized subcommand '{word}': {advice}"))
        }
        _ => error,
    }
}

/// Returns the innermost command that the arguments name.
fn called<'c>(command: &'c mut Command, arguments: &[String]) -> &'c mut Command {
    let mut rest = arguments.iter();
    match rest.find(|argument| visible(command).any(|name| name == *argument)) {
        Some(name) => {
            let found = command.get_subcommands_mut().find(|inner| inner.get_name() == name);
            called(found.expect("the name was found just before"), rest.as_slice())
        }
        None => command,
    }
}

fn visible(command: &Command) -> impl Iterator<Item = &str> {
    command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(Command::get_name)
}

/// Returns the value after `-h`, if the command has an option for a hash. In cryptsetup, `-h` is that option.
fn meant_as_hash<'a>(command: &Command, arguments: &'a [String]) -> Option<&'a str> {
    command.get_arguments().find(|argument| argument.get_long() == Some("hash"))?;
    // In `nbdcrypt format -h disk`, `-h` asks for help.
    let is_hash = |value: &&str| PassphraseHash::from_name(value).is_some();
    let joined =
        |argument: &'a String| argument.strip_prefix("-h").map(|value| value.trim_start_matches('=')).filter(is_hash);
    let separate =
        || arguments.iter().skip_while(|argument| *argument != "-h").nth(1).map(String::as_str).filter(is_hash);
    arguments.iter().find_map(joined).or_else(separate)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn said(arguments: &[&str]) -> (ErrorKind, String) {
        let arguments: Vec<String> = ["nbdcrypt"].iter().chain(arguments).map(|&text| text.to_owned()).collect();
        let error = explained(Cli::try_parse_from(&arguments).unwrap_err(), &arguments);
        (error.kind(), error.to_string())
    }

    #[test]
    fn the_hash_option_of_cryptsetup_is_explained() {
        for arguments in [
            &["format", "-h", "sha256", "disk"][..],
            &["format", "disk", "-hsha512"],
            &["format", "disk", "-h=sm3"],
            &["-v", "key", "add", "-h", "sha1", "disk"],
            &["key", "change", "disk", "-h", "sha256"],
            &["serve", "--type", "plain", "-h", "plain", "disk"],
        ] {
            let (kind, said) = said(arguments);
            assert_eq!(kind, ErrorKind::UnknownArgument, "{arguments:?}: {said}");
            let hash =
                ["sha256", "sha512", "sm3", "sha1", "plain"].into_iter().find(|hash| said.contains(hash)).unwrap();
            assert!(said.contains(&format!("'--hash {hash}'")) && said.contains("Usage: nbdcrypt"), "{said}");
        }
        for arguments in [
            &["-h"][..],
            &["format", "-h"],
            &["format", "disk", "-h", "--wipe"],
            &["format", "-h", "disk"],
            &["-h", "format"],
            &["key", "-h", "add"],
            &["up", "-h", "x.toml"],
            &["status", "-h", "sha256"],
            &["help", "format"],
        ] {
            assert_eq!(said(arguments).0, ErrorKind::DisplayHelp, "{arguments:?}");
        }
    }

    #[test]
    fn a_mistyped_command_is_answered_with_a_harmless_one() {
        for (arguments, meant) in [
            (&["stauts"][..], "'status'"),
            (&["sttus", "--json"], "'status'"),
            (&["bnech", "xts"], "'bench'"),
            (&["key", "lst", "disk"], "'list'"),
            (&["key", "tset", "disk"], "'test'"),
            (&["header", "bakcup", "disk", "file"], "'backup'"),
        ] {
            let (kind, said) = said(arguments);
            assert_eq!(kind, ErrorKind::InvalidSubcommand);
            assert!(said.contains(&format!("did you mean {meant}?")), "{arguments:?}: {said}");
        }
        for arguments in
            [&["formt"][..], &["dwn"], &["key", "remov"], &["header", "restor"], &["provison"], &["ask-aw"]]
        {
            let (_, said) = said(arguments);
            assert!(!said.contains("did you mean") && said.contains("the commands are "), "{arguments:?}: {said}");
        }
    }
}
