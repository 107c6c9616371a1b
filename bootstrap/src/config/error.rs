//! The errors of a configuration, with their positions.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::machine::trust::Distrust;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file's name does not end in `.toml`. The file is not read, because it may be a key file.
    #[error("{}: a configuration file is named NAME.toml", crate::text::path(path))]
    NotToml {
        /// The file.
        path: PathBuf,
    },
    /// The file's stem is not a volume name, and `[volume]` has no `name`.
    #[error(
        "{}: `{stem}` is not a volume name (1 to 64 of A-Z a-z 0-9 . _ -, starting with a letter, a digit or _); \
         rename the file or write `name = \"...\"` under [volume]",
        crate::text::path(path)
    )]
    Name {
        /// The configuration file.
        path: PathBuf,
        /// Its name without `.toml`.
        stem: String,
    },
    /// The file cannot be read.
    #[error("{}: {source}", crate::text::path(path))]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// This process runs as root, and other users can change the file.
    #[error("the {what} {} is refused, because anyone who can change it could control root: {why}", path.display())]
    Untrusted {
        /// The configuration file, or the key file that it names.
        path: PathBuf,
        /// Which of the two it is.
        what: &'static str,
        /// Who can change it, and what to do about it.
        #[source]
        why: Distrust,
    },
    /// The text contains an error.
    #[error(transparent)]
    At(Box<Fault>),
}

/// An error at a position in the file.
#[derive(Debug, thiserror::Error)]
pub struct Fault {
    /// The configuration file.
    pub path: PathBuf,
    /// The line, counted from 1.
    pub line: usize,
    /// The column, counted from 1, in characters.
    pub column: usize,
    /// What is wrong, and what would be right.
    pub message: String,
    /// The text of the line.
    excerpt: String,
    /// How many characters of the line are underlined, at least 1.
    width: usize,
}

impl Fault {
    /// Makes a fault at `span`, a range of bytes of `text`. A span that reaches past the end of the text is cut there.
    pub(super) fn new(path: &Path, text: &str, span: Range<usize>, message: String) -> Self {
        let start = floor_char(text, span.start);
        let end = floor_char(text, span.end);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let excerpt = text[line_start..].lines().next().unwrap_or_default().to_owned();
        let line_end = line_start + excerpt.len();
        Self {
            path: path.to_owned(),
            line: text[..line_start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            message,
            width: text[start..end.min(line_end).max(start)].chars().count().max(1),
            excerpt,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, column, message, excerpt, width } = self;
        writeln!(f, "{}:{line}:{column}: {message}", crate::text::path(path))?;
        // Tabs are kept, so that both lines have the same width. Every other character becomes a space.
        let indent: String = excerpt.chars().take(column - 1).map(|c| if c == '\t' { c } else { ' ' }).collect();
        let number = line.to_string();
        writeln!(f, "  {number} | {excerpt}")?;
        write!(f, "  {:1$} | {indent}{2}", "", number.len(), "^".repeat(*width))
    }
}

/// Returns the last character boundary that is not after `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fault_shows_its_line_and_marks_its_position() {
        let text = "[volume]\nname = \"ä\" # x\nsizee = 1\n";
        let at = text.find("sizee").unwrap();
        let fault = Fault::new(Path::new("/etc/x.toml"), text, at..at + 5, "no such key".to_owned());
        assert_eq!(fault.to_string(), "/etc/x.toml:3:1: no such key\n  3 | sizee = 1\n    | ^^^^^");
        let at = text.find('#').unwrap();
        let fault = Fault::new(Path::new("x.toml"), text, at..at + 100, "m".to_owned());
        assert_eq!((fault.line, fault.column), (2, 12), "columns are characters");
        assert!(fault.to_string().ends_with("| ^^^".replace("| ", &format!("| {}", " ".repeat(11))).as_str()));
    }

    proptest! {
        #[test]
        fn every_span_of_every_text_can_be_shown(text in "(.|\n|\r\n|\t){0,40}", a in 0usize..90, b in 0usize..90) {
            let fault = Fault::new(Path::new("x.toml"), &text, a..b, String::new());
            prop_assert!(fault.line <= text.matches('\n').count() + 1);
            prop_assert_eq!(fault.to_string().lines().count(), 3);
        }
    }
}
