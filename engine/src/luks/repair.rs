//! Repairs a damaged header of either format.

use super::luks1::{self, Fix};
use super::luks2::{self, HeaderCopy, Repaired};
use super::{LuksError, Random};
use crate::store::BlockStore;

/// What a repair did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The changes to a LUKS1 header, which has one copy.
    Luks1(Vec<Fix>),
    /// The changes to a LUKS2 header, which has two copies.
    Luks2(Repaired),
}

/// Repairs the header on `store`. The caller must have exclusive use of the disk.
///
/// # Errors
/// If the correct contents are unknown: [`LuksError::BeyondRepair`], [`LuksError::CopyNotUnderstood`],
/// [`LuksError::CopiesDiffer`], or the errors of [`super::dump`]. The disk is then unchanged. Otherwise the error of the disk
/// or of `random`.
pub fn repair(store: &dyn BlockStore, random: Random<'_>) -> Result<Repair, LuksError> {
    let repaired = match luks1::repair(store) {
        // A LUKS2 volume whose first header is lost may still have its second header.
        Err(LuksError::Version(2) | LuksError::NotLuks) => luks2::repair(store, random).map(Repair::Luks2),
        fixes => fixes.map(Repair::Luks1),
    };
    repaired.map_err(LuksError::beyond_repair)
}

/// Overwrites the other copy of the LUKS2 header on `store` with the copy named by `copy`, whatever the other copy
/// contains.
///
/// # Errors
/// [`LuksError::Luks2Only`] for a LUKS1 header, or an error that says what is wrong with the named copy. The disk is then
/// unchanged. Otherwise the error of the disk or of `random`.
pub fn repair_from(store: &dyn BlockStore, copy: HeaderCopy, random: Random<'_>) -> Result<Repair, LuksError> {
    match luks1::read_header(store) {
        Err(LuksError::Version(2) | LuksError::NotLuks) => {
            luks2::repair_from(store, copy, random).map(Repair::Luks2).map_err(LuksError::beyond_repair)
        }
        Err(error @ (LuksError::Unfinished | LuksError::Store(_) | LuksError::Version(_))) => Err(error),
        _ => Err(LuksError::Luks2Only("second copy of its header")),
    }
}
