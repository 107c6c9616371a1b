//! Makes names and texts from outside safe to print and to put into URIs.

use std::fmt::Write;
use std::path::Path;

use engine::text::{is_unseen, printable};

/// Returns `path` for display. Characters that a terminal would act on are escaped.
pub fn path(path: impl AsRef<Path>) -> String {
    printable(&path.as_ref().to_string_lossy())
}

/// Returns a text of several lines for display. Characters that a terminal would act on are escaped, except newlines and
/// tabs.
pub fn lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match is_unseen(letter) && !matches!(letter, '\n' | '\t') {
            true => shown.extend(letter.escape_unicode()),
            false => shown.push(letter),
        }
    }
    shown
}

/// Returns `text` as a part of a URI (RFC 3986): every byte except letters, digits, `-._~` and `/` is percent-encoded.
pub fn in_uri(text: impl AsRef<[u8]>) -> String {
    let mut encoded = String::new();
    for byte in text.as_ref() {
        match byte.is_ascii_alphanumeric() || b"-._~/".contains(byte) {
            true => encoded.push(char::from(*byte)),
            // Writing to a string cannot fail.
            false => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
}

/// Returns the candidate that is most similar to the mistyped `word`, if only a few letters differ.
pub fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let most = if word.chars().count() < 5 { 1 } else { 2 };
    let distances = candidates.into_iter().map(|candidate| (distance(word, candidate), candidate));
    distances.filter(|(distance, _)| *distance <= most).min_by_key(|(distance, _)| *distance).map(|(_, near)| near)
}

/// Returns how many letters must be changed, inserted, removed or swapped with their neighbour to turn `a` into `b` (the
/// optimal string alignment distance).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // `rows[i][j]` is the distance of the first `i` letters of `a` and the first `j` letters of `b`.
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let is_other = usize::from(a[i - 1] != b[j - 1]);
            let mut least = (rows[i - 1][j - 1] + is_other).min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_differs_by_one_or_two_letters() {
        let words = ["status", "serve", "dump", "up"];
        for (typed, meant) in [
            ("stauts", Some("status")),
            ("satuts", Some("status")),
            ("server", Some("serve")),
            ("dunp", Some("dump")),
            ("duno", None),
            ("stop", None),
            ("", None),
        ] {
            assert_eq!(nearest(typed, words), meant, "{typed}");
        }
    }

    #[test]
    fn a_name_cannot_forge_a_line() {
        assert_eq!(path("/tmp/a\nb\u{202e}"), "/tmp/a\\u{a}b\\u{202e}");
    }

    #[test]
    fn every_byte_with_a_meaning_in_a_uri_is_encoded() {
        assert_eq!(in_uri("/run/my disk?a=b&c#d%ä"), "/run/my%20disk%3Fa%3Db%26c%23d%25%C3%A4");
    }
}
