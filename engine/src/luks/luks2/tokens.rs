//! Tokens: JSON objects of any type that help to open keyslots. Their contents are kept unchanged.

use serde_json::Value;

use super::metadata::MAX_OBJECTS;
use super::read_header;
use super::update::Update;
use crate::luks::{LuksError, Random};
use crate::store::BlockStore;

/// Adds a token, given as JSON, under the number `wanted`, or under a free number if that is `None`. Returns the
/// number. An existing token is replaced only with `replace`.
///
/// # Errors
/// - [`LuksError::Token`] if `json` is not a token or refers to a keyslot that does not exist.
/// - [`LuksError::TokenExists`] if the number is taken.
/// - [`LuksError::MetadataFull`] if the token is too large.
///
/// In these cases the tokens are unchanged. Otherwise the error of the disk or of `random`.
pub fn import_token(
    store: &dyn BlockStore,
    json: &[u8],
    wanted: Option<u32>,
    replace: bool,
    random: Random<'_>,
) -> Result<u32, LuksError> {
    let refuse = |why: String| Err(LuksError::Token(why));
    let mut update = Update::open(store, random)?;
    if json.len() as u64 > update.binary.header_size {
        // No truncation: a header has at most 4 MiB.
        let available = usize::try_from(update.metadata.config.json_size).unwrap_or(usize::MAX);
        return Err(LuksError::MetadataFull { needed: json.len(), available });
    }
    let token: Value = match serde_json::from_slice(json) {
        Ok(token) => token,
        Err(error) => return refuse(format!("it is not JSON: {error}")),
    };
    match token["type"].as_str() {
        None | Some("") => return refuse("it has no member \"type\" with a text".to_owned()),
        Some("luks2-keyring") if token["key_description"].as_str().is_none_or(str::is_empty) => {
            return refuse("a luks2-keyring token needs a member \"key_description\" with a text".to_owned());
        }
        Some("luks2-keyring") => {}
        Some(kind) if kind.starts_with("luks2-") => {
            return refuse(format!(
                "its type \"{kind}\" is reserved: only the specification defines types that begin with luks2-"
            ));
        }
        Some(_) => {}
    }
    let Some(keyslots) = token["keyslots"].as_array() else {
        return refuse("it has no list \"keyslots\" (the list may be empty)".to_owned());
    };
    for keyslot in keyslots {
        let is_there =
            keyslot.as_str().is_some_and(|name| update.metadata.keyslots.keys().any(|id| id.to_string() == name));
        if !is_there {
            return refuse(format!("it lists keyslot {keyslot}, which does not exist (numbers must be in quotes)"));
        }
    }
    let is_there = |id: &u32| update.metadata.tokens.contains_key(id);
    let most = MAX_OBJECTS;
    let id = match wanted {
        Some(id) if id >= most => return refuse(format!("a token has a number from 0 to {}, not {id}", most - 1)),
        Some(id) if is_there(&id) && !replace => return Err(LuksError::TokenExists(id)),
        Some(id) => id,
        None => match (0..most).find(|id| !is_there(id)) {
            Some(id) => id,
            None => return refuse(format!("there are already {most} tokens, which is the maximum")),
        },
    };
    let mut document = update.metadata.json.clone();
    document["tokens"][id.to_string()] = token;
    update.commit(&document)?;
    Ok(id)
}

/// Returns the JSON of a token.
///
/// # Errors
/// [`LuksError::NoSuchToken`], [`LuksError::NotWritable`], or the errors of [`read_header`].
pub fn export_token(store: &dyn BlockStore, id: u32) -> Result<Value, LuksError> {
    let header = read_header(store)?;
    if let Some(oddity) = header.metadata.oddity {
        return Err(LuksError::NotWritable(oddity));
    }
    header.metadata.json["tokens"].get(id.to_string()).cloned().ok_or(LuksError::NoSuchToken(id))
}

/// Removes a token. Its keyslots remain.
///
/// # Errors
/// [`LuksError::NoSuchToken`], or the error of the disk or of `random`.
pub fn remove_token(store: &dyn BlockStore, id: u32, random: Random<'_>) -> Result<(), LuksError> {
    let mut update = Update::open(store, random)?;
    let mut document = update.metadata.json.clone();
    let removed = document["tokens"].as_object_mut().and_then(|tokens| tokens.shift_remove(&id.to_string()));
    removed.ok_or(LuksError::NoSuchToken(id))?;
    update.commit(&document)
}
