//! Secrets as types. They wipe themselves when they are dropped, never print their bytes, and compare in constant time.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The key that encrypts a volume's sectors: the two AES keys of XTS, data key first, tweak key second.
///
/// A key of 64 bytes is for AES-256-XTS, and a key of 32 bytes for AES-128-XTS. The LUKS1 specification calls the key
/// "master key", and the LUKS2 specification calls it "volume key".
pub struct VolumeKey(Zeroizing<Box<[u8]>>);

/// Why bytes are not an XTS key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VolumeKeyError {
    /// The key has neither 32 nor 64 bytes.
    #[error("an AES-XTS volume key has 32 or 64 bytes, not {0}")]
    Length(usize),
    /// The key does not have the length that the caller asked for.
    #[error("it has {found} bytes, but {wanted} were asked for")]
    OtherLength {
        /// The number of bytes of the key.
        found: usize,
        /// The number of bytes that the caller asked for.
        wanted: usize,
    },
    /// Both halves are the same key, which voids XTS's security proof (NIST SP 800-38E, IEEE 1619 annex D.4.3).
    #[error("both halves of the volume key are the same key; XTS needs two independent ones")]
    EqualHalves,
}

impl VolumeKey {
    /// Length in bytes of an AES-256-XTS key. nbdcrypt makes volumes with keys of this length.
    pub const AES_256: usize = 64;
    /// Length in bytes of an AES-128-XTS key. Old volumes often have keys of this length.
    pub const AES_128: usize = 32;

    /// Takes ownership of key bytes. They are wiped when the key is dropped.
    ///
    /// # Errors
    /// [`VolumeKeyError`] if they are not an XTS key. The bytes are wiped in this case, too.
    pub fn new(bytes: Vec<u8>) -> Result<Self, VolumeKeyError> {
        // `into_boxed_slice` would leave an unwiped copy behind if capacity and length differ.
        let bytes = Zeroizing::new(bytes);
        if bytes.len() != Self::AES_256 && bytes.len() != Self::AES_128 {
            return Err(VolumeKeyError::Length(bytes.len()));
        }
        let (data, tweak) = bytes.split_at(bytes.len() / 2);
        if bool::from(data.ct_eq(tweak)) {
            return Err(VolumeKeyError::EqualHalves);
        }
        Ok(Self(Zeroizing::new(Box::from(bytes.as_slice()))))
    }

    /// Returns the key bytes: the data key, then the tweak key. The caller must wipe every copy that it makes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Returns the key length in bits, with both halves counted as in cryptsetup's `keysize`: 512 or 256.
    pub fn bits(&self) -> usize {
        self.0.len() * 8
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bits)", self.bits())
    }
}

/// The secret that opens a keyslot. It comes from a person or from a key source. Any bytes are allowed, as with
/// `cryptsetup --key-file`.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes ownership of the bytes. They are wiped when the passphrase is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Returns the bytes. The caller must wipe every copy that it makes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_prints_its_length_and_nothing_else() {
        let key = VolumeKey::new((0..64).collect()).unwrap();
        assert_eq!(format!("{key:?}"), "VolumeKey(512 bits)");
        assert_eq!(format!("{:?}", Passphrase::new(b"secret".to_vec())), "Passphrase(…)");
    }

    #[test]
    fn equal_halves_and_odd_lengths_are_refused() {
        assert_eq!(VolumeKey::new(vec![7; 64]).unwrap_err(), VolumeKeyError::EqualHalves);
        assert_eq!(VolumeKey::new(vec![7; 48]).unwrap_err(), VolumeKeyError::Length(48));
        assert_eq!(VolumeKey::new(vec![]).unwrap_err(), VolumeKeyError::Length(0));
    }
}
