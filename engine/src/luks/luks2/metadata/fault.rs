//! Damage to one object of a header. The rest of the header is valid.

use super::field::Field;
use crate::luks::LuksError;
use crate::luks::keyslot::SALT_LEN;

/// The maximum length of a binary field in bytes. Every salt and digest is shorter.
pub(super) const MAX_BYTES: usize = 1024;

/// Damage to one keyslot or digest. The rest of the header is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The field's path, such as `keyslots.0.kdf.time`.
    pub field: String,
    /// The value of the field.
    pub found: String,
}

impl Fault {
    /// Returns the fault as an error about the header.
    pub(in crate::luks) fn error(&self) -> LuksError {
        LuksError::corrupt(self.field.as_str(), self.found.as_str())
    }
}

/// The first fault that makes a keyslot or digest unusable.
#[derive(Default)]
pub(super) struct Faults(pub(super) Option<Fault>);

impl Faults {
    pub(super) fn add(&mut self, field: &Field<'_>, found: impl Into<String>) {
        self.0.get_or_insert_with(|| field.fault(found));
    }

    /// Reads a 32-bit number. A whole number that does not fit is a fault of this object. A value that is not a whole
    /// number makes the whole header invalid, because cryptsetup never writes such a value.
    fn integer(&mut self, field: &Field<'_>) -> Result<u32, LuksError> {
        let text = field.whole_number()?;
        Ok(field.integer().unwrap_or_else(|_| {
            self.add(field, format!("{text}, not a 32-bit number"));
            0
        }))
    }

    pub(super) fn at_least_one(&mut self, field: &Field<'_>) -> Result<u32, LuksError> {
        let number = self.integer(field)?;
        if number == 0 {
            self.add(field, "0");
        }
        Ok(number)
    }

    /// Reads a salt: a text that is base64 of [`SALT_LEN`] bytes.
    pub(super) fn salt(&mut self, field: &Field<'_>) -> Result<Vec<u8>, LuksError> {
        field.name()?;
        Ok(match field.bytes(MAX_BYTES) {
            Ok(salt) if salt.len() == SALT_LEN => salt,
            Ok(salt) => {
                self.add(field, format!("{} bytes long, not {SALT_LEN}", salt.len()));
                salt
            }
            Err(LuksError::Corrupt { found, .. }) => {
                self.add(field, found);
                Vec::new()
            }
            Err(error) => return Err(error),
        })
    }
}
