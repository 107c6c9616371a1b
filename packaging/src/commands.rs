//! The man pages of the commands, made from the same description as `--help`.

use anyhow::Result;
use clap::{Arg, Command};
use clap_mangen::Man;
use roff::{Roff, bold, roman};

/// The name and version of the program. They stand at the foot of each page.
pub(crate) const VERSION: &str = concat!("nbdcrypt ", env!("CARGO_PKG_VERSION"));

/// Returns `command` without its hidden commands and options. clap cannot remove a command from a description, and the
/// completions of clap_complete contain hidden commands.
///
/// clap wants names that live as long as the program, so they are leaked. This program ends soon.
pub(crate) fn shown(command: &Command) -> Command {
    let name: &'static str = command.get_name().to_owned().leak();
    let mut shown = Command::new(name).disable_help_subcommand(true);
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        shown = shown.long_about(about.clone());
    }
    if let Some(help) = command.get_after_help() {
        shown = shown.after_help(help.clone());
    }
    if let Some(version) = command.get_version() {
        let version: &'static str = version.to_owned().leak();
        shown = shown.version(version);
    }
    if command.is_subcommand_required_set() {
        shown = shown.subcommand_required(true);
    }
    let arguments: Vec<&Arg> = command.get_arguments().filter(|argument| !argument.is_hide_set()).collect();
    for group in command.get_groups() {
        let members: Vec<_> =
            group.get_args().filter(|id| arguments.iter().any(|argument| argument.get_id() == *id)).cloned().collect();
        let is_required = group.is_required_set();
        shown = shown.group(clap::ArgGroup::new(group.get_id().clone()).args(members).required(is_required));
    }
    shown = shown.args(arguments.into_iter().cloned());
    let commands = command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help");
    shown.subcommands(commands.map(self::shown))
}

/// Returns the name and the text of each page of `nbdcrypt`: one for the program and one for each command below it.
///
/// # Errors
/// Passes on what clap_mangen returns.
pub(crate) fn pages(program: &Command) -> Result<Vec<(String, Vec<u8>)>> {
    fn add(command: &Command, above: Option<&str>, all: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let name = name(command);
        // nbdcrypt-bench(1) is the page of the program `nbdcrypt-bench`. It also names the pages of the commands below
        // `nbdcrypt bench`.
        if name != "nbdcrypt-bench" {
            all.push((format!("{name}.1"), page(command, above)?));
        }
        command.get_subcommands().try_for_each(|inner| add(inner, Some(name), all))
    }
    let mut program = program.clone();
    program.build();
    let mut all = Vec::new();
    add(&program, None, &mut all)?;
    Ok(all)
}

/// Returns the page of the program `nbdcrypt-bench`. Its commands have no pages of their own: `nbdcrypt bench` has commands of
/// the same names.
///
/// # Errors
/// Passes on what clap_mangen returns.
pub(crate) fn bench_page(program: &Command) -> Result<Vec<u8>> {
    let mut program = program.clone();
    program.build();
    let mut page = start(&program)?;
    for command in program.get_subcommands() {
        let mut roff = Roff::new();
        roff.control("SH", [format!("nbdcrypt-bench {}", command.get_name()).as_str()]);
        let about = command.get_long_about().or_else(|| command.get_about()).map(ToString::to_string);
        roff.text([roman(about.unwrap_or_default())]);
        roff.to_writer(&mut page)?;
        let mut options = Vec::new();
        Man::new(command.clone()).render_options_section(&mut options)?;
        // Leave out the preamble and the heading, which this section has already.
        let options = String::from_utf8(options)?;
        page.extend(options.split_once(".SH OPTIONS\n").map_or("", |(_, options)| options).as_bytes());
    }
    finish(&mut page, &program, &["nbdcrypt", "nbdcrypt-bench-device", "nbdcrypt-bench-xts"])?;
    Ok(page)
}

/// Returns the page of one command. `above` is the page of the command that it belongs to.
fn page(command: &Command, above: Option<&str>) -> Result<Vec<u8>> {
    let man = Man::new(command.clone());
    let mut page = start(command)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let others: Vec<_> = above.into_iter().chain(command.get_subcommands().map(name)).collect();
    finish(&mut page, command, &others)?;
    Ok(page)
}

/// Returns the name of a command's page, such as `nbdcrypt-key-add`.
fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

/// Returns the beginning of a page, from its title to its description.
fn start(command: &Command) -> Result<Vec<u8>> {
    // The page has no date, so that the same source gives the same page. roff leaves out empty arguments.
    let title = name(command).to_uppercase();
    let mut page = format!(".TH {title} 1 \"\" \"{VERSION}\" \"nbdcrypt manual\"\n").into_bytes();
    let man = Man::new(command.clone());
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    Ok(page)
}

/// Adds the last sections of a page. `others` are the pages to name under SEE ALSO.
fn finish(page: &mut Vec<u8>, command: &Command, others: &[&str]) -> Result<()> {
    let mut roff = Roff::new();
    if let Some(examples) = command.get_after_help() {
        add_examples(&mut roff, &examples.to_string());
    }
    roff.control("SH", ["EXIT STATUS"]);
    roff.control("TP", []).text([bold("0")]).text([roman("The command has done what was asked.")]);
    roff.control("TP", []).text([bold("1")]).text([roman("It failed. Standard error says why, and what to do.")]);
    roff.control("TP", []).text([bold("2")]).text([roman("The command line is wrong.")]);
    roff.control("SH", ["SEE ALSO"]);
    for other in others {
        roff.text([bold(*other), roman("(1),")]);
    }
    roff.text([bold("nbdcrypt.toml"), roman("(5),")]).text([bold("cryptsetup"), roman("(8)")]);
    roff.to_writer(page)?;
    Ok(())
}

/// Adds the section with the examples. `help` is the text at the end of `--help`.
fn add_examples(roff: &mut Roff, help: &str) {
    roff.control("SH", ["EXAMPLES"]);
    roff.control("EX", []);
    for line in help.lines().skip_while(|line| *line == "Examples:") {
        roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
    }
    roff.control("EE", []);
}

#[cfg(test)]
mod tests {
    use crate::programs;

    use super::*;

    #[test]
    fn every_command_has_a_page_and_no_hidden_one_has() {
        let names: Vec<_> = pages(&programs()[0]).unwrap().into_iter().map(|(name, _)| name).collect();
        for name in ["nbdcrypt.1", "nbdcrypt-up.1", "nbdcrypt-key-add.1", "nbdcrypt-bench-xts.1"] {
            assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("child") || name.contains("ask-aws")), "{names:?}");
        let bench = String::from_utf8(bench_page(&programs()[1]).unwrap()).unwrap();
        assert!(bench.contains("servers") && !bench.contains("yardstick"), "{bench}");
    }

    /// Every option that `--help` shows is on its command's page, and every command is named on the page above it.
    #[test]
    fn pages_name_every_option_and_command() {
        fn check(command: &Command, page: &[u8], seen: &mut usize) {
            let page = String::from_utf8(page.to_vec()).unwrap().replace("\\-", "-");
            for long in command.get_arguments().filter_map(Arg::get_long) {
                assert!(page.contains(&format!("--{long}")), "{}: --{long}", name(command));
                *seen += 1;
            }
            for inner in command.get_subcommands() {
                assert!(page.contains(inner.get_name()), "{}: {}", name(command), inner.get_name());
            }
        }
        fn check_all(command: &Command, seen: &mut usize) {
            check(command, &page(command, None).unwrap(), seen);
            command.get_subcommands().for_each(|inner| check_all(inner, seen));
        }
        let [mut nbdcrypt, mut bench] = programs();
        nbdcrypt.build();
        bench.build();
        let mut seen = 0;
        check_all(&nbdcrypt, &mut seen);
        assert!(seen > 100, "{seen}");
        let page = bench_page(&bench).unwrap();
        check(&bench, &page, &mut seen);
        bench.get_subcommands().for_each(|command| check(command, &page, &mut seen));
    }
}
