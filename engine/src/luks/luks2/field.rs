//! A member of a JSON document that knows its path, so that an error can name it.

use base64ct::{Base64, Encoding};
use serde_json::{Map, Value};

use crate::luks::LuksError;

/// A place in the document, and the value there, if there is one.
#[derive(Clone)]
pub(super) struct Field<'a> {
    path: String,
    value: Option<&'a Value>,
}

impl<'a> Field<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Self { path: String::new(), value: Some(value) }
    }

    /// The member of that name.
    pub(super) fn get(&self, name: &str) -> Self {
        let dot = if self.path.is_empty() { "" } else { "." };
        Self { path: format!("{}{dot}{name}", self.path), value: self.value.and_then(|value| value.get(name)) }
    }

    /// The member, if there is one.
    pub(super) fn optional(&self, name: &str) -> Option<Self> {
        Some(self.get(name)).filter(|field| field.value.is_some())
    }

    /// The members of an object, each under a number.
    pub(super) fn numbered(&self) -> Result<Vec<(u32, Self)>, LuksError> {
        let number = |name: &String| {
            let number = name.parse().ok().filter(|number: &u32| number.to_string() == *name);
            number.ok_or_else(|| self.get(name).corrupt("no number for a name"))
        };
        self.object()?.keys().map(|name| Ok((number(name)?, self.get(name)))).collect()
    }

    pub(super) fn text(&self) -> Result<&'a str, LuksError> {
        self.value.and_then(Value::as_str).ok_or_else(|| self.wrong("a text"))
    }

    /// A text that names a thing, such as a cipher, and is shown to people.
    pub(super) fn name(&self) -> Result<&'a str, LuksError> {
        let name = self.text()?;
        if name.contains(char::is_control) { Err(self.wrong("a name")) } else { Ok(name) }
    }

    /// A list of names.
    pub(super) fn names(&self) -> Result<Vec<String>, LuksError> {
        let names = self.texts()?;
        if names.iter().any(|name| name.contains(char::is_control)) {
            Err(self.wrong("a list of names"))
        } else {
            Ok(names)
        }
    }

    fn texts(&self) -> Result<Vec<String>, LuksError> {
        let texts = self
            .value
            .and_then(Value::as_array)
            .map(|values| values.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
        texts.flatten().ok_or_else(|| self.wrong("a list of texts"))
    }

    /// A list of numbers that name other objects, each a text.
    pub(super) fn references(&self) -> Result<Vec<u32>, LuksError> {
        let parse = |text: String| text.parse().map_err(|_| self.wrong("a list of numbers in quotes"));
        self.texts()?.into_iter().map(parse).collect()
    }

    /// A number of 32 bits.
    pub(super) fn integer(&self) -> Result<u32, LuksError> {
        let number = self.value.and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| self.wrong("a number"))
    }

    /// A number of 64 bits, which the format keeps as a text.
    pub(super) fn long(&self) -> Result<u64, LuksError> {
        let digits = self.text()?;
        let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| is_plain).ok_or_else(|| self.wrong("a number in quotes"))
    }

    /// Bytes in base64, at most `max` of them.
    pub(super) fn bytes(&self, max: usize) -> Result<Vec<u8>, LuksError> {
        let bytes = Base64::decode_vec(self.text()?).map_err(|_| self.wrong("bytes in base64"))?;
        if bytes.is_empty() || bytes.len() > max {
            return Err(self.corrupt(format!("{} bytes long", bytes.len())));
        }
        Ok(bytes)
    }

    /// The error that this field is `found`.
    pub(super) fn corrupt(&self, found: impl Into<String>) -> LuksError {
        LuksError::corrupt(self.path.as_str(), found)
    }

    fn object(&self) -> Result<&'a Map<String, Value>, LuksError> {
        self.value.and_then(Value::as_object).ok_or_else(|| self.wrong("an object"))
    }

    fn wrong(&self, expected: &str) -> LuksError {
        match self.value {
            None => self.corrupt(format!("missing: it should be {expected}")),
            Some(value) => {
                let mut text = value.to_string();
                if let Some((cut, _)) = text.char_indices().nth(60) {
                    text.truncate(cut);
                    text.push('…');
                }
                self.corrupt(format!("{text}, not {expected}"))
            }
        }
    }
}
