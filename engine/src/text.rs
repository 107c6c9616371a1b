//! Numbers and text for people: sizes with a unit, and text without characters that control a terminal.

/// Returns a number of bytes for people, with a unit beside it if it is 1 KiB or more: `16777216 bytes (16 MiB)`.
///
/// A count that is not a whole number of the unit is rounded to one decimal: `1500 bytes (1.5 KiB)`.
pub fn bytes(count: u64) -> String {
    match count {
        1 => "1 byte".to_owned(),
        0..1024 => format!("{count} bytes"),
        _ => format!("{count} bytes ({})", human(count)),
    }
}

/// Returns a number of bytes in its unit only: `16 MiB`, `1.5 KiB`.
pub fn human(count: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    // The number of tenths of a unit, rounded. 1024.0 of a unit are shown as 1 of the next unit.
    let tenths = |unit: usize| (u128::from(count) * 10 + (1 << (10 * unit) >> 1)) >> (10 * unit);
    while unit + 1 < UNITS.len() && tenths(unit) >= 10240 {
        unit += 1;
    }
    let (whole, rest) = (tenths(unit) / 10, tenths(unit) % 10);
    let is_exact = count.is_multiple_of(1 << (10 * unit));
    match is_exact {
        true => format!("{whole} {}", UNITS[unit]),
        false => format!("{whole}.{rest} {}", UNITS[unit]),
    }
}

/// Returns `text` with every unseen character ([`is_unseen`]) replaced by its number, as in `\u{202e}`. Unseen characters
/// are those that a terminal obeys, or that change how the text after them is read. They are control characters (such as
/// newline, tab and ESC), line separators, and the invisible characters that set the direction of writing or join letters.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            _ if is_unseen(letter) => shown.extend(letter.escape_unicode()),
            _ => shown.push(letter),
        }
    }
    shown
}

/// Returns whether a character is invisible or changes how other characters are displayed.
pub fn is_unseen(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            // Soft hyphen; Arabic letter mark; Mongolian vowel separator; zero-width characters and direction marks; line and
            // paragraph separators; embeddings and overrides; isolates and invisible operators; byte order mark; interlinear
            // annotation marks; tags.
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_of_bytes_are_shown_with_a_unit() {
        for (count, shown) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (512, "512 bytes"),
            (1023, "1023 bytes"),
            (1024, "1024 bytes (1 KiB)"),
            (1536, "1536 bytes (1.5 KiB)"),
            (1 << 20, "1048576 bytes (1 MiB)"),
            ((1 << 20) - 1, "1048575 bytes (1.0 MiB)"),
            ((1 << 20) + 1, "1048577 bytes (1.0 MiB)"),
            (16 << 20, "16777216 bytes (16 MiB)"),
            (100 << 30, "107374182400 bytes (100 GiB)"),
            (1000 << 30, "1073741824000 bytes (1000 GiB)"),
            (1_000_000_000_000, "1000000000000 bytes (931.3 GiB)"),
            (u64::MAX, "18446744073709551615 bytes (16.0 EiB)"),
        ] {
            assert_eq!(bytes(count), shown);
        }
    }

    #[test]
    fn printable_text_has_no_characters_that_a_terminal_obeys() {
        assert_eq!(printable("käse 盘 🔑 /dev/sda"), "käse 盘 🔑 /dev/sda");
        assert_eq!(printable("a\u{1b}[31mb\nc\td\u{7f}\u{9b}e"), "a\\u{1b}[31mb\\u{a}c\\u{9}d\\u{7f}\\u{9b}e");
        assert_eq!(printable("safe\u{202e}txt.exe\u{2066}\u{200b}"), "safe\\u{202e}txt.exe\\u{2066}\\u{200b}");
        for letter in (0..=u32::from(char::MAX)).filter_map(char::from_u32).filter(|letter| letter.is_control()) {
            assert!(printable(&letter.to_string()).chars().all(|shown| shown.is_ascii_graphic()), "{letter:?}");
        }
    }
}
