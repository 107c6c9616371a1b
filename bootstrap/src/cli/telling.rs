//! How an error is printed: in one line, with its causes, and without repetition.

use std::io;

use engine::text::printable;
use rustix::io::Errno;

use super::advice::{self, Settings};
use crate::config::ConfigError;
use crate::machine::process;
use crate::text::lines;

/// Returns an error with its causes, in one line and without repetition. Leaves out a cause that the preceding text quotes, and
/// the start of a cause if the preceding text already says it. (`{:#}` of [`anyhow::Error`] repeats both.)
///
/// An error in a configuration keeps its several lines. If a user other than root lacks a permission, the text says who has it.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let has_lines = cause.is::<ConfigError>();
        let said = once(&without_number(&shown(&cause.to_string(), has_lines)));
        let new = unsaid(&text, &said);
        if new.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(new);
    }
    let names_root = text.contains("as root") || text.contains("only root");
    match is_missing_permission(error) && !process::is_root() && !names_root {
        true => text + " (run this as root, for example with sudo)",
        false => text,
    }
}

/// Returns what [`chain`] returns, followed by advice. `settings` says where the command in use gets its settings from.
pub(super) fn with_advice(error: &anyhow::Error, settings: Settings) -> String {
    let found = chain(error);
    match advice::about(error, settings) {
        Some(advice) => format!("{found}; {advice}"),
        None => found,
    }
}

/// Returns whether the system refused something for lack of permission.
fn is_missing_permission(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| {
        let errno = cause.raw_os_error().map(Errno::from_raw_os_error);
        matches!(errno, Some(Errno::ACCESS | Errno::PERM))
    })
}

/// Returns the text without a part that repeats the part before it, as in `a: b: b`.
pub(super) fn once(text: &str) -> String {
    let mut parts: Vec<&str> = text.split(": ").collect();
    parts.dedup();
    parts.join(": ")
}

/// Returns the part of `said` that `text` does not contain yet.
fn unsaid<'s>(text: &str, said: &'s str) -> &'s str {
    if text.contains(said) {
        return "";
    }
    let mut rest = said;
    while let Some((first, tail)) = rest.split_once(": ") {
        if !text.split(": ").any(|part| part == first) {
            break;
        }
        rest = tail;
    }
    rest
}

/// Returns the text. Characters that a terminal would obey are shown by their number. Newlines and tabs stay only if
/// `has_lines` is set.
fn shown(text: &str, has_lines: bool) -> String {
    match has_lines {
        true => lines(text),
        false => printable(text),
    }
}

/// Returns the text without the error numbers that the standard library appends, such as ` (os error 2)`.
pub(super) fn without_number(text: &str) -> String {
    const START: &str = " (os error ";
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(START) {
        plain.push_str(before);
        match after.split_once(')') {
            Some((number, tail)) if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => {
                rest = tail
            }
            _ => {
                plain.push_str(START);
                rest = after;
            }
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("could not listen on /run/s: {source}")]
    struct Quoting {
        source: io::Error,
    }

    #[test]
    fn nothing_is_said_twice() {
        let missing = || io::Error::from_raw_os_error(2);
        let quoting = anyhow::Error::new(Quoting { source: missing() });
        assert_eq!(chain(&quoting), "could not listen on /run/s: No such file or directory");
        let twice = anyhow!("disk: the passphrase is wrong").context("disk");
        assert_eq!(chain(&twice), "disk: the passphrase is wrong");
        let same = anyhow!("it is gone").context("it is gone");
        assert_eq!(chain(&same), "it is gone");
        let deep = anyhow!("a: b: c").context("a: b");
        assert_eq!(chain(&deep), "a: b: c");
        let other = anyhow!("ab: c").context("b");
        assert_eq!(chain(&other), "b: ab: c", "a part of a word is no repetition");
        let inner = anyhow!("stays up: mnt: it is in use: it is in use");
        assert_eq!(chain(&inner), "stays up: mnt: it is in use");
        let plain = anyhow::Error::new(missing()).context("/dev/x");
        assert_eq!(chain(&plain), "/dev/x: No such file or directory");
    }

    #[test]
    fn a_name_in_an_error_cannot_forge_a_line() {
        let error = anyhow!("disk\nnbdcrypt: all is well\u{1b}[2K\u{202e}: it is in use");
        assert_eq!(chain(&error), "disk\\u{a}nbdcrypt: all is well\\u{1b}[2K\\u{202e}: it is in use");
    }
}
