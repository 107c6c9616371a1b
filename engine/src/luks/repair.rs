//! A damaged header of either format, put right.

use super::luks1::{self, Fix};
use super::luks2::{self, Repaired};
use super::{LuksError, Random};
use crate::store::BlockStore;

/// What a repair has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// To a LUKS1 header, of which there is one.
    Luks1(Vec<Fix>),
    /// To a LUKS2 header, of which there are two copies.
    Luks2(Repaired),
}

/// Repairs the header on `store`. Whoever calls has the disk for itself.
///
/// # Errors
/// [`LuksError::BeyondRepair`] where it is not known what should stand in it, or as [`super::dump`] has them, with the disk
/// untouched; else what the disk or the source of randomness said.
pub fn repair(store: &dyn BlockStore, random: Random<'_>) -> Result<Repair, LuksError> {
    let repaired = match luks1::repair(store) {
        // Without its first header, it may still have its second.
        Err(LuksError::Version(2) | LuksError::NotLuks) => luks2::repair(store, random).map(Repair::Luks2),
        fixes => fixes.map(Repair::Luks1),
    };
    repaired.map_err(LuksError::beyond_repair)
}
