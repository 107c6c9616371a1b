//! The text of the JSON area, which json-c reads more freely than the JSON standard allows.

use std::borrow::Cow;

use serde_json::Value;

/// Returns the text as valid JSON. cryptsetup's parser (json-c) also reads some text that JSON does not allow. This
/// function replaces it: `NaN` and `Infinity` become `null`, and bytes that are not UTF-8 become U+FFFD. The second value
/// names what was replaced, if anything was.
pub(super) fn as_json(text: &[u8]) -> (Cow<'_, str>, Option<&'static str>) {
    const WORDS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
    let mut bytes = Vec::new();
    let (mut at, mut copied, mut is_quoted) = (0, 0, false);
    while let Some(byte) = text.get(at) {
        let is_word = |word: &&&[u8]| text[at..].get(..word.len()).is_some_and(|it| it.eq_ignore_ascii_case(word));
        let word = WORDS.iter().find(is_word).filter(|_| !is_quoted);
        if let Some(word) = word {
            bytes.extend_from_slice(&text[copied..at]);
            bytes.extend_from_slice(b"null");
            at += word.len();
            copied = at;
            continue;
        }
        match byte {
            b'"' => is_quoted = !is_quoted,
            b'\\' if is_quoted => at += 1,
            _ => {}
        }
        at += 1;
    }
    if copied > 0 {
        bytes.extend_from_slice(&text[copied..]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        return (Cow::Owned(text), Some("NaN or Infinity instead of a number"));
    }
    let text = String::from_utf8_lossy(text);
    let oddity = matches!(text, Cow::Owned(_)).then_some("text that is not UTF-8");
    (text, oddity)
}

/// Returns how deeply objects and lists are nested.
pub(in crate::luks::luks2) fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(values) => 1 + values.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
