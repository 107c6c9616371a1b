//! Changes the labels, the activation flags and the keyslot priorities of an existing volume.

use serde_json::{Value, json};

use super::format::check_label;
use super::keys::existing;
use super::update::Update;
use crate::luks::{LuksError, Random};
use crate::store::BlockStore;

/// The activation flags that cryptsetup knows, by their names in the header (specification, section 3.7).
pub const FLAGS: [&str; 6] = [
    "allow-discards",
    "same-cpu-crypt",
    "submit-from-crypt-cpus",
    "no-journal",
    "no-read-workqueue",
    "no-write-workqueue",
];

/// The settings to change. `None` leaves a setting unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// A label of at most 47 bytes. An empty text removes it.
    pub label: Option<String>,
    /// A second label, of at most 47 bytes. An empty text removes it.
    pub subsystem: Option<String>,
    /// The activation flags, each one of [`FLAGS`]. They replace all existing flags.
    pub flags: Option<Vec<String>>,
}

/// When a keyslot is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// The keyslot is tried only if it is named.
    Ignore,
    /// The keyslot is tried in its order.
    Normal,
    /// The keyslot is tried before all others.
    Prefer,
}

/// Changes the settings of a header.
///
/// # Errors
/// [`LuksError::Impossible`] or [`LuksError::MetadataFull`]; the header is then unchanged. Otherwise the error of the disk or
/// of `random`.
pub fn change_settings(store: &dyn BlockStore, settings: &Settings, random: Random<'_>) -> Result<(), LuksError> {
    let Settings { label, subsystem, flags } = settings;
    label.iter().try_for_each(|label| check_label("the label", label))?;
    subsystem.iter().try_for_each(|label| check_label("the subsystem", label))?;
    for flag in flags.iter().flatten() {
        if !FLAGS.contains(&flag.as_str()) {
            return Err(LuksError::impossible("the flag", flag, format!("the flags are {}", FLAGS.join(", "))));
        }
    }
    let mut update = Update::open(store, random)?;
    let mut json = update.metadata.json.clone();
    if let Some(flags) = flags
        && let Some(config) = json["config"].as_object_mut()
    {
        if flags.is_empty() {
            config.shift_remove("flags");
        } else {
            config.insert("flags".to_owned(), json!(flags));
        }
    }
    if let Some(label) = label {
        update.binary.label = label.as_str().into();
    }
    if let Some(subsystem) = subsystem {
        update.binary.subsystem = subsystem.as_str().into();
    }
    update.commit(&json)
}

/// Sets when a keyslot is tried.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`]; the header is then unchanged. Otherwise the error of the disk or of `random`.
pub fn set_priority(
    store: &dyn BlockStore,
    keyslot: usize,
    priority: Priority,
    random: Random<'_>,
) -> Result<(), LuksError> {
    let mut update = Update::open(store, random)?;
    let name = existing(&update, keyslot)?.to_string();
    let mut json = update.metadata.json.clone();
    let Some(slot) = json["keyslots"][&name].as_object_mut() else { return Err(LuksError::NoSuchKeyslot(keyslot)) };
    // A keyslot without this member has normal priority. cryptsetup omits it too.
    let value: Value = match priority {
        Priority::Ignore => 0.into(),
        Priority::Normal => {
            slot.shift_remove("priority");
            return update.commit(&json);
        }
        Priority::Prefer => 2.into(),
    };
    slot.insert("priority".to_owned(), value);
    update.commit(&json)
}
