//! nbdcrypt.toml(5), made from the example of the configuration. A test of `config` checks that the example shows every key.
//! So this page shows every key, too.

use anyhow::{Context, Result};
use roff::{Roff, bold, roman};

use crate::commands::VERSION;

const EXAMPLE: &str = include_str!("../../bootstrap/nbdcrypt.example.toml");

/// Returns the lines of the example without its first paragraph. That paragraph is about the whole file, and the page says
/// the same in its own words.
fn keys() -> impl Iterator<Item = &'static str> {
    EXAMPLE.lines().skip_while(|line| line.starts_with('#'))
}

/// A line of the example.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Empty,
    /// `[volume]`, or `#! [metrics]`: a section that is absent by default.
    Section(&'a str),
    /// `# Text`
    Text(&'a str),
    /// `key = value # remark`, with what the value is.
    Key {
        name: &'a str,
        value: &'a str,
        remark: Option<&'a str>,
        is: Value,
    },
}

/// Whether a value in the example is the default.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Value {
    /// `#key = value`: the value that applies if the key is not set.
    Default,
    /// `key = value`, or `#! key = value`.
    Example,
}

impl Line<'_> {
    fn parse(line: &str) -> Option<Line<'_>> {
        if line.is_empty() {
            return Some(Line::Empty);
        }
        if let Some(name) = line.strip_prefix("#! ").unwrap_or(line).strip_prefix('[') {
            return name.strip_suffix(']').map(Line::Section);
        }
        if let Some(text) = line.strip_prefix("# ") {
            return Some(Line::Text(text));
        }
        let (line, is) = match (line.strip_prefix("#! "), line.strip_prefix('#')) {
            (Some(line), _) => (line, Value::Example),
            (None, Some(line)) => (line, Value::Default),
            (None, None) => (line, Value::Example),
        };
        let (name, value) = line.split_once(" = ")?;
        let (value, remark) = match value.split_once(" # ") {
            Some((value, remark)) => (value.trim_end(), Some(remark)),
            None => (value, None),
        };
        Some(Line::Key { name, value, remark, is })
    }
}

/// Returns the page.
///
/// # Errors
/// Fails if the example has a line of a form that this module does not know.
pub(crate) fn page() -> Result<Vec<u8>> {
    let mut roff = Roff::new();
    roff.control("SH", ["NAME"]).text([roman("nbdcrypt.toml - the configuration of an nbdcrypt volume")]);
    roff.control("SH", ["SYNOPSIS"]).text([bold("/etc/nbdcrypt/"), roman("NAME"), bold(".toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman(
        "A file of this form describes one volume. Below, each key is shown with a value: its default, or an example if it \
         has no default. Paths are absolute. An unknown key is an error.",
    )]);
    // The text above keys belongs to them. In the page it stands below them, indented.
    let mut text = Vec::new();
    let mut names = Vec::new();
    let lines: Option<Vec<_>> = keys().map(Line::parse).collect();
    let lines = lines.context("the example of the configuration has a line of an unknown form")?;
    for (number, line) in lines.iter().enumerate() {
        match line {
            Line::Empty => {}
            Line::Section(name) => {
                // What is said above a section's heading is about the section.
                roff.control("SH", [format!("[{name}]").as_str()]);
                if !text.is_empty() {
                    roff.text([roman(text.join("\n"))]);
                    text.clear();
                }
            }
            Line::Text(line) => text.push((*line).to_owned()),
            Line::Key { name, value, remark, is } => {
                names.push((*name, *value, *remark, *is));
                let is_last = !matches!(lines.get(number + 1), Some(Line::Key { .. }));
                if is_last {
                    flush(&mut roff, &mut names, &mut text);
                }
            }
        }
    }
    roff.control("SH", ["FILES"]);
    roff.control("TP", []).text([bold("/etc/nbdcrypt/nbdcrypt.toml.example")]);
    roff.text([roman("An example, which shows every key. Copy it to /etc/nbdcrypt/NAME.toml.")]);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("nbdcrypt"), roman("(1), ")]).text([bold("nbdcrypt-up"), roman("(1), ")]);
    roff.text([bold("nbdcrypt-plan"), roman("(1)")]);
    // Without a date, so that the same source gives the same page. roff leaves out empty arguments.
    let mut page = format!(".TH NBDCRYPT.TOML 5 \"\" \"{VERSION}\" \"nbdcrypt manual\"\n").into_bytes();
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// Adds the keys that were read, and the text about them.
fn flush(roff: &mut Roff, names: &mut Vec<(&str, &str, Option<&str>, Value)>, text: &mut Vec<String>) {
    for (number, (name, value, remark, is)) in names.iter().enumerate() {
        roff.control(if number == 0 { "TP" } else { "TQ" }, []);
        let is = match is {
            Value::Default => "default",
            Value::Example => "example",
        };
        let remark = remark.map(|remark| format!("; {remark}")).unwrap_or_default();
        roff.text([bold(*name), roman(format!(" = {value}   ({is}{remark})"))]);
    }
    if !text.is_empty() {
        roff.text([roman(text.join("\n"))]);
    }
    names.clear();
    text.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_a_line_is_known() {
        let key = |name, value, remark, is| Some(Line::Key { name, value, remark, is });
        assert_eq!(Line::parse("#! skip = 0"), key("skip", "0", None, Value::Example));
        assert_eq!(Line::parse("#type = \"ext4\""), key("type", "\"ext4\"", None, Value::Default));
        assert_eq!(Line::parse("size = 1   # what = it"), key("size", "1", Some("what = it"), Value::Example));
        assert_eq!(Line::parse("# a = b"), Some(Line::Text("a = b")));
        assert_eq!(Line::parse("[key]"), Some(Line::Section("key")));
        assert_eq!(Line::parse("#! [metrics]"), Some(Line::Section("metrics")));
        assert_eq!(Line::parse(""), Some(Line::Empty));
        assert_eq!(Line::parse("nonsense"), None);
    }

    /// Every word about a key is on the page.
    #[test]
    fn the_page_leaves_nothing_out() {
        let page = String::from_utf8(page().unwrap()).unwrap().replace("\\-", "-").replace("\\&", "");
        let page = page.replace("\\*(Aq", "'").replace("\\fB", " ").replace("\\fR", " ").replace("\\\\", "\\");
        for line in keys() {
            for word in line.trim_start_matches(['#', '!', ' ']).split_whitespace().filter(|word| *word != "#") {
                assert!(page.contains(word), "{word:?} of {line:?} is missing in:\n{page}");
            }
        }
    }
}
