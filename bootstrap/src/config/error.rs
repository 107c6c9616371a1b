//! What is wrong with a configuration, and where.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why a configuration is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not called `….toml`. What is in it is not looked at: it may well be a key file.
    #[error("{}: a configuration file is named NAME.toml", path.display())]
    NotToml {
        /// The file that was named.
        path: PathBuf,
    },
    /// The file's stem is no volume name, and `[volume]` has no `name`.
    #[error(
        "{}: `{stem}` is no volume name (1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter, a digit or _); \
         rename the file or write `name = \"...\"` under [volume]",
        path.display()
    )]
    Name {
        /// The configuration file.
        path: PathBuf,
        /// Its name without `.toml`.
        stem: String,
    },
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error(transparent)]
    At(Box<Fault>),
}

/// Something wrong at a place in the file.
#[derive(Debug, thiserror::Error)]
pub struct Fault {
    /// The configuration file.
    pub path: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
    /// What is wrong, and what would be right.
    pub message: String,
    /// The line.
    excerpt: String,
    /// How many characters of the line are meant; at least 1.
    width: usize,
}

impl Fault {
    /// `span` counts bytes of `text`; whatever it is, some place in the text is named.
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
        writeln!(f, "{}:{line}:{column}: {message}", path.display())?;
        // A tab is as wide above as below; everything else becomes a space.
        let indent: String = excerpt.chars().take(column - 1).map(|c| if c == '\t' { c } else { ' ' }).collect();
        let number = line.to_string();
        writeln!(f, "  {number} | {excerpt}")?;
        write!(f, "  {:1$} | {indent}{2}", "", number.len(), "^".repeat(*width))
    }
}

/// The last character boundary that is not after `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fault_shows_its_line_and_points_at_its_place() {
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
