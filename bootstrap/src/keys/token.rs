//! The LUKS2 token `aws-kms`: the volume's secret, encrypted by KMS, in the volume's own header.
//!
//! ```json
//! { "type": "aws-kms", "keyslots": ["0"], "ciphertext": "BASE64", "kms-key": "arn:aws:kms:…",
//!   "encryption-context": { "luks-uuid": "…" } }
//! ```
//! KMS requires the encryption context to decrypt. The UUID in it binds the ciphertext to its volume. Nothing in the token
//! is trusted: requests to KMS always name the configured key.

use std::collections::BTreeMap;

use base64ct::{Base64, Encoding};
use engine::luks::luks2::Header;
use serde_json::{Value, json};
use uuid::Uuid;

use super::MAX_CIPHERTEXT;

/// The token's `type`.
const KIND: &str = "aws-kms";
/// The name in the encryption context for the volume's UUID.
pub(super) const UUID: &str = "luks-uuid";

/// The content of the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsToken {
    /// The secret, encrypted by KMS.
    pub ciphertext: Vec<u8>,
    /// The ARN of the KMS key that encrypted it. It is only for display.
    pub key_arn: String,
    /// The encryption context: the volume's UUID, and the configured pairs.
    pub encryption_context: BTreeMap<String, String>,
}

impl KmsToken {
    /// Returns the header's tokens of this type that open a keyslot, in their order, each with its number. A malformed token
    /// is left out if there is another one. Returns an empty list if there is no token of this type.
    ///
    /// # Errors
    /// If there are only malformed tokens. The text says how they are malformed.
    pub fn usable(header: &Header) -> Result<Vec<(u32, Self)>, String> {
        let opens = |id: &u32| header.metadata.tokens.get(id).is_some_and(|token| !token.keyslots.is_empty());
        let mut all = Self::all(header);
        // If a keyslot is removed, its token stays, and names no keyslot.
        if all.iter().any(|(id, _)| opens(id)) {
            all.retain(|(id, _)| opens(id));
        }
        let (mut usable, mut malformed) = (Vec::new(), Vec::new());
        for (id, token) in all {
            match token {
                Ok(token) => usable.push((id, token)),
                Err(why) => malformed.push((id, why)),
            }
        }
        if usable.is_empty() && !malformed.is_empty() {
            return Err(listed(malformed));
        }
        for (id, why) in malformed {
            tracing::warn!("token {id} in the LUKS2 header is left out: {why}");
        }
        Ok(usable)
    }

    /// Returns the header's tokens of this type, each with its number. A malformed token is an error that says how.
    pub fn all(header: &Header) -> Vec<(u32, Result<Self, String>)> {
        let json = |id: u32| &header.metadata.json["tokens"][id.to_string()];
        let tokens = header.metadata.tokens.iter().filter(|(_, token)| token.kind == KIND);
        tokens.map(|(id, _)| (*id, Self::from_json(json(*id)))).collect()
    }

    /// Returns the number of the header's first token of this type.
    pub fn number(header: &Header) -> Option<u32> {
        header.metadata.tokens.iter().find(|(_, token)| token.kind == KIND).map(|(id, _)| *id)
    }

    /// Returns the number of the token of this type that opens the keyslot. Its secret is the keyslot's passphrase.
    pub fn of_keyslot(header: &Header, keyslot: usize) -> Option<u32> {
        let opens = |id: &u32| usize::try_from(*id) == Ok(keyslot);
        let mut tokens = header.metadata.tokens.iter();
        tokens.find(|(_, token)| token.kind == KIND && token.keyslots.iter().any(opens)).map(|(id, _)| *id)
    }

    /// Parses the token.
    ///
    /// # Errors
    /// If the token is malformed. The text says how.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let text = |name: &str| json[name].as_str().ok_or_else(|| format!("its `{name}` is missing or not a text"));
        let ciphertext = Base64::decode_vec(text("ciphertext")?)
            .ok()
            .filter(|bytes| (1..=MAX_CIPHERTEXT).contains(&bytes.len()))
            .ok_or_else(|| format!("its `ciphertext` is not 1 to {MAX_CIPHERTEXT} bytes in base64"))?;
        let pairs =
            json["encryption-context"].as_object().ok_or("its `encryption-context` is missing or not an object")?;
        let encryption_context = pairs
            .iter()
            .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect::<Option<_>>()
            .ok_or("its `encryption-context` has a value that is not a text")?;
        Ok(Self { ciphertext, key_arn: text("kms-key")?.to_owned(), encryption_context })
    }

    /// Returns the token for the first keyslot of a new volume.
    pub fn to_json(&self) -> Value {
        json!({
            "type": KIND,
            "keyslots": ["0"],
            "ciphertext": Base64::encode_string(&self.ciphertext),
            "kms-key": self.key_arn,
            "encryption-context": self.encryption_context,
        })
    }

    /// Returns the JSON that replaces the token `old`: this token, with the keyslots of `old`, and with the members of `old`
    /// that this token does not have.
    pub fn in_place_of(&self, old: &Value) -> Value {
        let mut json = old.clone();
        let Value::Object(ours) = self.to_json() else { return json };
        for (name, value) in ours.into_iter().filter(|(name, _)| name != "keyslots") {
            json[name] = value;
        }
        json
    }

    /// Returns the encryption context for a volume: the configured pairs, and the volume's UUID.
    pub fn context_for(volume: Uuid, configured: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut context = configured.clone();
        context.insert(UUID.to_owned(), volume.hyphenated().to_string());
        context
    }

    /// Checks that the token was made for this volume, under the configured encryption context.
    ///
    /// # Errors
    /// If the token was made for something else. The text says for what.
    pub fn check(&self, volume: Uuid, configured: &BTreeMap<String, String>) -> Result<(), String> {
        let made_for = self.encryption_context.get(UUID).map_or("no volume", String::as_str);
        if made_for != volume.hyphenated().to_string() {
            // Anyone who can write to the disk chooses this text.
            let made_for = made_for.escape_debug();
            return Err(format!("it was made for {made_for}, and this is volume {volume}"));
        }
        match Self::context_for(volume, configured) {
            context if context == self.encryption_context => Ok(()),
            context => Err(format!(
                "its encryption context is {:?}, but the configuration gives {context:?}; check `encryption-context` \
                 under [key]",
                self.encryption_context
            )),
        }
    }
}

/// Returns the texts about several tokens, each with the token's number. The text about only one token stays as it is.
pub(super) fn listed(mut texts: Vec<(u32, String)>) -> String {
    match texts.len() {
        1 => texts.remove(0).1,
        _ => texts.into_iter().map(|(id, text)| format!("token {id}: {text}")).collect::<Vec<_>>().join("; "),
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
    fn a_token_survives_writing_and_reading() {
        let json = token().to_json();
        assert_eq!((json["type"].as_str(), json["keyslots"][0].as_str()), (Some("aws-kms"), Some("0")));
        assert_eq!(KmsToken::from_json(&json), Ok(token()));
        for (name, value, words) in [
            ("ciphertext", json!("?"), "base64"),
            ("ciphertext", json!(""), "1 to 6144 bytes"),
            ("kms-key", Value::Null, "`kms-key` is missing"),
            ("encryption-context", json!([]), "not an object"),
            ("encryption-context", json!({ "a": 1 }), "not a text"),
        ] {
            let mut changed = json.clone();
            changed[name] = value;
            let error = KmsToken::from_json(&changed).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_token_is_valid_only_for_its_volume_and_configuration() {
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
