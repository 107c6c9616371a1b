//! What a header says for people, for activation and of the order of keyslots, changed on a volume that is there.

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

/// What is to be changed; `None` leaves a thing as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// A label of at most 47 bytes; an empty one takes it away.
    pub label: Option<String>,
    /// A second label, likewise.
    pub subsystem: Option<String>,
    /// The activation flags, each one of [`FLAGS`]; they take the place of those that are there.
    pub flags: Option<Vec<String>>,
}

/// When a keyslot is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Only when it is named.
    Ignore,
    /// In its turn.
    Normal,
    /// Before all others.
    Prefer,
}

/// Changes what a header says beside its keys.
///
/// # Errors
/// [`LuksError::Impossible`] or [`LuksError::MetadataFull`], with the header untouched; else what the disk or the source
/// of randomness said.
pub fn change_settings(store: &dyn BlockStore, settings: &Settings, random: Random<'_>) -> Result<(), LuksError> {
    let Settings { label, subsystem, flags } = settings;
    label.iter().try_for_each(|label| check_label("the label", label))?;
    subsystem.iter().try_for_each(|label| check_label("the subsystem", label))?;
    for flag in flags.iter().flatten() {
        if !FLAGS.contains(&flag.as_str()) {
            return Err(LuksError::impossible("the flag", flag, format!("there are {}", FLAGS.join(", "))));
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

/// Says when a keyslot is tried.
///
/// # Errors
/// [`LuksError::NoSuchKeyslot`], with the header untouched; else what the disk or the source of randomness said.
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
    // Without the member a keyslot is of normal priority, and cryptsetup leaves it out too.
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
