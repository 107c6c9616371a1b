//! The LUKS2 token `aws-kms`: the volume's secret, encrypted by KMS, in the volume's own header.
//!
//! ```json
//! { "type": "aws-kms", "keyslots": ["0"], "ciphertext": "BASE64", "kms-key": "arn:aws:kms:…",
//!   "encryption-context": { "luks-uuid": "…" } }
//! ```
//! The UUID in the encryption context, which KMS demands to decrypt, binds the ciphertext to its volume. Nothing in the
//! token is believed: the KMS key that is asked is the configured one.

use std::collections::BTreeMap;

use base64ct::{Base64, Encoding};
use engine::luks::luks2::Header;
use serde_json::{Value, json};
use uuid::Uuid;

use super::MAX_CIPHERTEXT;

/// The token's `type`.
const KIND: &str = "aws-kms";
/// The pair of the encryption context that names the volume.
const UUID: &str = "luks-uuid";

/// What the token holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsToken {
    /// What KMS made of the secret.
    pub ciphertext: Vec<u8>,
    /// The ARN of the KMS key that it was made under, for people.
    pub key_arn: String,
    /// What it is bound to: the volume's UUID, and what was configured.
    pub encryption_context: BTreeMap<String, String>,
}

impl KmsToken {
    /// The header's token of this type; the first, where there are more.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn find(header: &Header) -> Result<Option<Self>, String> {
        let Some(id) = Self::number(header) else { return Ok(None) };
        Self::from_json(&header.metadata.json["tokens"][id.to_string()]).map(Some)
    }

    /// The number of the token that [`KmsToken::find`] finds.
    pub fn number(header: &Header) -> Option<u32> {
        header.metadata.tokens.iter().find(|(_, token)| token.kind == KIND).map(|(id, _)| *id)
    }

    /// The number of the token of this type that opens the keyslot, if there is one: its secret is the keyslot's passphrase.
    pub fn of_keyslot(header: &Header, keyslot: usize) -> Option<u32> {
        let opens = |id: &u32| usize::try_from(*id) == Ok(keyslot);
        let mut tokens = header.metadata.tokens.iter();
        tokens.find(|(_, token)| token.kind == KIND && token.keyslots.iter().any(opens)).map(|(id, _)| *id)
    }

    /// Reads the token.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let text = |name: &str| json[name].as_str().ok_or_else(|| format!("its `{name}` is missing or no text"));
        let ciphertext = Base64::decode_vec(text("ciphertext")?)
            .ok()
            .filter(|bytes| (1..=MAX_CIPHERTEXT).contains(&bytes.len()))
            .ok_or_else(|| format!("its `ciphertext` is not 1 to {MAX_CIPHERTEXT} bytes in base64"))?;
        let pairs = json["encryption-context"].as_object().ok_or("its `encryption-context` is missing or no object")?;
        let encryption_context = pairs
            .iter()
            .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect::<Option<_>>()
            .ok_or("its `encryption-context` has a value that is no text")?;
        Ok(Self { ciphertext, key_arn: text("kms-key")?.to_owned(), encryption_context })
    }

    /// The token as the header of a new volume has it, for its first keyslot.
    pub fn to_json(&self) -> Value {
        json!({
            "type": KIND,
            "keyslots": ["0"],
            "ciphertext": Base64::encode_string(&self.ciphertext),
            "kms-key": self.key_arn,
            "encryption-context": self.encryption_context,
        })
    }

    /// This token, with the keyslots and whatever else is in the one that it replaces.
    pub fn in_place_of(&self, old: &Value) -> Value {
        let mut json = old.clone();
        let Value::Object(ours) = self.to_json() else { return json };
        for (name, value) in ours.into_iter().filter(|(name, _)| name != "keyslots") {
            json[name] = value;
        }
        json
    }

    /// The encryption context for a volume: what is configured, and the volume's UUID.
    pub fn context_for(volume: Uuid, configured: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut context = configured.clone();
        context.insert(UUID.to_owned(), volume.hyphenated().to_string());
        context
    }

    /// Whether it was made for this volume, under the configured encryption context.
    ///
    /// # Errors
    /// What it was made for, in words.
    pub fn check(&self, volume: Uuid, configured: &BTreeMap<String, String>) -> Result<(), String> {
        let made_for = self.encryption_context.get(UUID).map_or("no volume", String::as_str);
        if made_for != volume.hyphenated().to_string() {
            // Whoever writes to the disk chooses what it says.
            let made_for = made_for.escape_debug();
            return Err(format!("it was made for {made_for}, and this is volume {volume}"));
        }
        match Self::context_for(volume, configured) {
            context if context == self.encryption_context => Ok(()),
            context => Err(format!(
                "its encryption context is {:?}, and the configuration comes to {context:?}; see `encryption-context` \
                 under [key]",
                self.encryption_context
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> KmsToken {
        let configured = [("volume".to_owned(), "scratch".to_owned())].into();
        KmsToken {
            ciphertext: vec![1, 2, 3],
            key_arn: "arn:aws:kms:eu-central-1:1:key/2".to_owned(),
            encryption_context: KmsToken::context_for(Uuid::max(), &configured),
        }
    }

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let json = token().to_json();
        assert_eq!((json["type"].as_str(), json["keyslots"][0].as_str()), (Some("aws-kms"), Some("0")));
        assert_eq!(KmsToken::from_json(&json), Ok(token()));
        for (name, value, words) in [
            ("ciphertext", json!("?"), "base64"),
            ("ciphertext", json!(""), "1 to 6144 bytes"),
            ("kms-key", Value::Null, "`kms-key` is missing"),
            ("encryption-context", json!([]), "no object"),
            ("encryption-context", json!({ "a": 1 }), "no text"),
        ] {
            let mut changed = json.clone();
            changed[name] = value;
            let error = KmsToken::from_json(&changed).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_token_is_for_its_own_volume_and_configuration_alone() {
        let configured = BTreeMap::from([("volume".to_owned(), "scratch".to_owned())]);
        assert_eq!(token().check(Uuid::max(), &configured), Ok(()));
        let other = token().check(Uuid::nil(), &configured).unwrap_err();
        assert!(other.contains("this is volume 00000000-0000-0000-0000-000000000000"), "{other}");
        let mut hostile = token();
        hostile.encryption_context.insert(UUID.to_owned(), "\u{1b}[31m\u{9b}".to_owned());
        let said = hostile.check(Uuid::nil(), &configured).unwrap_err();
        assert!(said.contains("\\u{1b}[31m") && !said.contains(char::is_control), "{said}");
        assert!(token().check(Uuid::max(), &BTreeMap::new()).unwrap_err().contains("encryption-context"));
    }
}
