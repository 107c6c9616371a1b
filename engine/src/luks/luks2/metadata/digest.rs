//! The digests, which confirm that a key is correct.

use std::collections::BTreeSet;

use super::fault::{Fault, Faults, MAX_BYTES};
use super::field::Field;
use crate::luks::LuksError;
use crate::luks::hash::HashAlgorithm;

/// The length in bytes of a LUKS1 digest. A volume keeps its digest when it is converted to LUKS2.
const LUKS1_DIGEST_LEN: usize = 20;

/// A digest, which confirms that a key is correct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The type, usually `pbkdf2`.
    pub kind: String,
    /// The keyslots that hold the key.
    pub keyslots: Vec<u32>,
    /// The segments that the key encrypts.
    pub segments: Vec<u32>,
    /// The additional members of a digest of the type `pbkdf2`, or why it can never confirm a key. `None` for other types.
    pub pbkdf2: Option<Result<Pbkdf2Digest, Fault>>,
}

/// The additional members of a digest of the type `pbkdf2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pbkdf2Digest {
    /// The hash.
    pub hash: String,
    /// The iterations.
    pub iterations: u32,
    /// The salt.
    pub salt: Vec<u8>,
    /// `PBKDF2(volume key, salt, iterations)`.
    pub digest: Vec<u8>,
}

impl Digest {
    pub(super) fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        let kind = field.get("type").name()?.to_owned();
        Ok(Self {
            keyslots: once(field.get("keyslots").references()?),
            segments: once(field.get("segments").references()?),
            pbkdf2: (kind == "pbkdf2").then(|| Pbkdf2Digest::parse(field)),
            kind,
        })
    }
}

/// Returns the numbers in the same order, without repetitions. With repetitions, a keyslot that a digest lists a thousand
/// times would be tried a thousand times.
fn once(numbers: Vec<u32>) -> Vec<u32> {
    let mut seen = BTreeSet::new();
    numbers.into_iter().filter(|number| seen.insert(*number)).collect()
}

impl Pbkdf2Digest {
    /// Reads the additional members of a digest of the type `pbkdf2`, or returns a fault. The rest of the header stays valid,
    /// because cryptsetup checks these members only when it verifies a key.
    fn parse(field: &Field<'_>) -> Result<Self, Fault> {
        let read = || {
            let mut faults = Faults::default();
            let digest = Self {
                hash: field.get("hash").name()?.to_owned(),
                iterations: faults.at_least_one(&field.get("iterations"))?,
                salt: faults.salt(&field.get("salt"))?,
                digest: field.get("digest").bytes(MAX_BYTES)?,
            };
            // A shorter digest would let wrong keys pass. A longer digest would cost a multiple of the stated iterations.
            if let Some(hash) = HashAlgorithm::from_name(&digest.hash) {
                let (len, usual) = (digest.digest.len(), hash.output_len());
                if len != LUKS1_DIGEST_LEN && len != usual {
                    faults.add(
                        &field.get("digest"),
                        format!("{len} bytes long, but a {} digest has {usual}", digest.hash),
                    );
                }
            }
            Ok((digest, faults.0))
        };
        match read() {
            Ok((digest, None)) => Ok(digest),
            Ok((_, Some(fault))) => Err(fault),
            Err(LuksError::Corrupt { field, found }) => Err(Fault { field, found }),
            Err(error) => Err(field.fault(error.to_string())),
        }
    }
}
