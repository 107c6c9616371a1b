//! Tokens: JSON objects of any type that help to open keyslots, kept as they are.

use serde_json::Value;

use super::metadata::MAX_OBJECTS;
use super::read_header;
use super::update::Update;
use crate::luks::{LuksError, Random};
use crate::store::BlockStore;

/// Adds a token, from its JSON, under a free number or the one that is wanted; returns the number. A token that is there
/// already is replaced only with `replace`.
///
/// # Errors
/// [`LuksError::Token`] when it is no token, or refers to a keyslot that is not there, [`LuksError::MetadataFull`] when it
/// is too large, with the tokens untouched; else what the disk or the source of randomness said.
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
        // No truncation: a header is of 4 MiB at most.
        let available = usize::try_from(update.metadata.config.json_size).unwrap_or(usize::MAX);
        return Err(LuksError::MetadataFull { needed: json.len(), available });
    }
    let token: Value = match serde_json::from_slice(json) {
        Ok(token) => token,
        Err(error) => return refuse(format!("it is not JSON: {error}")),
    };
    match token["type"].as_str() {
        None | Some("") => return refuse("it has no text \"type\"".to_owned()),
        Some("luks2-keyring") if token["key_description"].as_str().is_none_or(str::is_empty) => {
            return refuse("a luks2-keyring token has a text \"key_description\"".to_owned());
        }
        Some("luks2-keyring") => {}
        Some(kind) if kind.starts_with("luks2-") => {
            return refuse(format!("its type \"{kind}\" is reserved: types in luks2- are the specification's own"));
        }
        Some(_) => {}
    }
    let Some(keyslots) = token["keyslots"].as_array() else {
        return refuse("it has no list \"keyslots\" (which may be empty)".to_owned());
    };
    for keyslot in keyslots {
        let is_there =
            keyslot.as_str().is_some_and(|name| update.metadata.keyslots.keys().any(|id| id.to_string() == name));
        if !is_there {
            return refuse(format!("it lists keyslot {keyslot}, which is not there (numbers are in quotes)"));
        }
    }
    let is_there = |id: &u32| update.metadata.tokens.contains_key(id);
    let most = MAX_OBJECTS;
    let id = match wanted {
        Some(id) if id >= most => return refuse(format!("tokens have numbers 0 to {}, not {id}", most - 1)),
        Some(id) if is_there(&id) && !replace => {
            return refuse(format!("there is a token {id}; use --force to replace it"));
        }
        Some(id) => id,
        None => match (0..most).find(|id| !is_there(id)) {
            Some(id) => id,
            None => return refuse(format!("there are {most} tokens, the most there may be")),
        },
    };
    let mut document = update.metadata.json.clone();
    document["tokens"][id.to_string()] = token;
    update.commit(&document)?;
    Ok(id)
}

/// The token's JSON.
///
/// # Errors
/// [`LuksError::NoSuchToken`], or as [`read_header`] has them.
pub fn export_token(store: &dyn BlockStore, id: u32) -> Result<Value, LuksError> {
    let header = read_header(store)?;
    header.metadata.json["tokens"].get(id.to_string()).cloned().ok_or(LuksError::NoSuchToken(id))
}

/// Removes a token. Its keyslots stay.
///
/// # Errors
/// [`LuksError::NoSuchToken`], or what the disk or the source of randomness said.
pub fn remove_token(store: &dyn BlockStore, id: u32, random: Random<'_>) -> Result<(), LuksError> {
    let mut update = Update::open(store, random)?;
    let mut document = update.metadata.json.clone();
    let removed = document["tokens"].as_object_mut().and_then(|tokens| tokens.shift_remove(&id.to_string()));
    removed.ok_or(LuksError::NoSuchToken(id))?;
    update.commit(&document)
}
