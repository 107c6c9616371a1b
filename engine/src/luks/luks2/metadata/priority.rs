//! The order in which keyslots are tried.

use super::field::Field;

/// When a keyslot is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyslotPriority {
    /// The keyslot is tried only if it is named.
    Ignored,
    /// The keyslot is tried in its order.
    Normal,
    /// The keyslot is tried before all others.
    Preferred,
    /// The header has another value. As in cryptsetup, such a keyslot is tried only if it is named.
    Invalid,
}

impl KeyslotPriority {
    pub(super) fn parse(field: Option<Field<'_>>) -> Self {
        field.map_or(Self::Normal, |field| match field.as_number() {
            Some(0) => Self::Ignored,
            Some(1) => Self::Normal,
            Some(2) => Self::Preferred,
            _ => Self::Invalid,
        })
    }

    /// Returns the position in the order in which keyslots are tried.
    pub(in crate::luks::luks2) fn rank(self) -> u8 {
        match self {
            Self::Preferred => 0,
            Self::Normal => 1,
            Self::Ignored | Self::Invalid => 2,
        }
    }

    /// Returns whether the keyslot is tried only if it is named.
    pub fn is_ignored(self) -> bool {
        matches!(self, Self::Ignored | Self::Invalid)
    }
}

/// The word that `cryptsetup luksDump` prints.
impl std::fmt::Display for KeyslotPriority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ignored => "ignored",
            Self::Normal => "normal",
            Self::Preferred => "preferred",
            Self::Invalid => "invalid",
        })
    }
}
