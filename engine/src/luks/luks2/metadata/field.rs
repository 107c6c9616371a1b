//! A member of a JSON document that knows its path, so that errors can name it.

use base64ct::{Base64, Encoding};
use serde_json::{Map, Number, Value};

use super::Fault;
use crate::luks::LuksError;

/// A path in the document and the value there, if there is one.
#[derive(Clone)]
pub(super) struct Field<'a> {
    path: String,
    value: Option<&'a Value>,
}

impl<'a> Field<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Self { path: String::new(), value: Some(value) }
    }

    /// Returns the member with this name.
    pub(super) fn get(&self, name: &str) -> Self {
        let dot = if self.path.is_empty() { "" } else { "." };
        Self { path: format!("{}{dot}{name}", self.path), value: self.value.and_then(|value| value.get(name)) }
    }

    /// Returns the member with this name, or `None` if it is missing.
    pub(super) fn optional(&self, name: &str) -> Option<Self> {
        Some(self.get(name)).filter(|field| field.value.is_some())
    }

    /// Returns the members of an object with their names.
    pub(super) fn members(&self) -> Result<Vec<(&'a str, Self)>, LuksError> {
        Ok(self.object()?.keys().map(|name| (name.as_str(), self.get(name))).collect())
    }

    pub(super) fn text(&self) -> Result<&'a str, LuksError> {
        self.value.and_then(Value::as_str).ok_or_else(|| self.wrong("a text"))
    }

    /// Returns a text that is not empty.
    pub(super) fn nonempty(&self) -> Result<&'a str, LuksError> {
        let text = self.text()?;
        if text.is_empty() { Err(self.wrong("a nonempty text")) } else { Ok(text) }
    }

    /// Returns a text that names something, such as a cipher. Names are shown to people, so control characters are refused.
    pub(super) fn name(&self) -> Result<&'a str, LuksError> {
        let name = self.nonempty()?;
        if name.contains(char::is_control) { Err(self.wrong("a name")) } else { Ok(name) }
    }

    /// Returns a list of names.
    pub(super) fn names(&self) -> Result<Vec<String>, LuksError> {
        let names = self.texts()?;
        if names.iter().any(|name| name.contains(char::is_control)) {
            Err(self.wrong("a list of names"))
        } else {
            Ok(names)
        }
    }

    /// Returns a list of texts, which may contain any characters.
    pub(super) fn texts(&self) -> Result<Vec<String>, LuksError> {
        let texts = self
            .value
            .and_then(Value::as_array)
            .map(|values| values.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
        texts.flatten().ok_or_else(|| self.wrong("a list of texts"))
    }

    /// Returns a list of object numbers, which the format stores as texts.
    pub(super) fn references(&self) -> Result<Vec<u32>, LuksError> {
        // A number has only one spelling. Otherwise "0" and "00" would both mean keyslot 0.
        let parse = |text: String| {
            let number = text.parse().ok().filter(|number: &u32| number.to_string() == text);
            number.ok_or_else(|| self.wrong("a list of numbers in quotes"))
        };
        self.texts()?.into_iter().map(parse).collect()
    }

    /// Returns the number that cryptsetup reads here. It also reads numbers from texts and booleans, and truncates fractions.
    pub(super) fn as_number(&self) -> Option<i64> {
        match self.value? {
            Value::Bool(value) => Some(i64::from(*value)),
            Value::String(text) => text.parse().ok(),
            Value::Number(number) => {
                let digits = number.to_string();
                if digits.contains(['e', 'E']) { None } else { digits.split('.').next()?.parse().ok() }
            }
            _ => None,
        }
    }

    /// Returns a 32-bit number.
    pub(super) fn integer(&self) -> Result<u32, LuksError> {
        let number = self.value.and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| self.wrong("a number"))
    }

    /// Returns a whole number of any size, which may be negative.
    pub(super) fn whole_number(&self) -> Result<&'a Number, LuksError> {
        let is_whole = |number: &&Number| number.to_string().bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        self.value.and_then(Value::as_number).filter(is_whole).ok_or_else(|| self.wrong("a number"))
    }

    /// Returns a 64-bit number, which the format stores as a text.
    pub(super) fn long(&self) -> Result<u64, LuksError> {
        let digits = self.text()?;
        let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| is_plain).ok_or_else(|| self.wrong("a number in quotes"))
    }

    /// Returns bytes that are stored in base64, at most `max` of them.
    pub(super) fn bytes(&self, max: usize) -> Result<Vec<u8>, LuksError> {
        let bytes = Base64::decode_vec(self.text()?).map_err(|_| self.wrong("bytes in base64"))?;
        if bytes.is_empty() || bytes.len() > max {
            return Err(self.corrupt(format!("{} bytes long", bytes.len())));
        }
        Ok(bytes)
    }

    /// Returns a fault that says that this field is `found`, for damage that does not affect the rest of the header.
    pub(super) fn fault(&self, found: impl Into<String>) -> Fault {
        Fault { field: self.path.clone(), found: found.into() }
    }

    /// Returns an error that says that this field is `found`.
    pub(super) fn corrupt(&self, found: impl Into<String>) -> LuksError {
        LuksError::corrupt(self.path.as_str(), found)
    }

    /// Returns the members of an object.
    pub(super) fn object(&self) -> Result<&'a Map<String, Value>, LuksError> {
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
