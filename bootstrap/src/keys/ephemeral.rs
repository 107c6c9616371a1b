//! A random key that exists in memory only.

use engine::key::{Passphrase, VolumeKey};

use super::{KeyError, KeySource};

/// Makes a volume key for each volume. It is never stored, so only the process that made it can open the volume.
pub struct EphemeralKey;

impl KeySource for EphemeralKey {
    fn describe(&self) -> String {
        "a random key, which exists in the memory of the server only".to_owned()
    }

    fn check(&self) -> Result<(), KeyError> {
        Ok(())
    }

    /// Returns the volume key itself.
    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        // The vector has its full length from the start, so that no copy is left behind.
        let mut bytes = vec![0; VolumeKey::AES_256];
        getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
        Ok(Passphrase::new(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_another_one() {
        let keys = [EphemeralKey.passphrase().unwrap(), EphemeralKey.passphrase().unwrap()];
        assert!(keys.iter().all(|key| key.expose().len() == VolumeKey::AES_256));
        assert_ne!(keys[0].expose(), keys[1].expose());
    }
}
