//! Secrets as types: they wipe themselves when dropped, never print, and compare in constant time.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The key that encrypts a volume's sectors: the two AES keys of XTS, data key first, tweak key second.
///
/// 64 bytes are AES-256-XTS, 32 bytes AES-128-XTS. (LUKS1 calls it "master key", LUKS2 "volume key".)
pub struct VolumeKey(Zeroizing<Box<[u8]>>);

/// Key bytes that are no XTS key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VolumeKeyError {
    /// Not 32 and not 64 bytes.
    #[error("an AES-XTS volume key has 32 or 64 bytes, not {0}")]
    Length(usize),
    /// Both halves are the same key, which voids XTS's security proof (NIST SP 800-38E, IEEE 1619 annex D.4.3).
    #[error("both halves of the volume key are the same key; XTS needs two independent ones")]
    EqualHalves,
}

impl VolumeKey {
    /// Bytes of an AES-256-XTS key: what nbdcrypt makes.
    pub const AES_256: usize = 64;
    /// Bytes of an AES-128-XTS key: what old volumes often have.
    pub const AES_128: usize = 32;

    /// Takes over key bytes; the vector is wiped when the key is dropped.
    ///
    /// # Errors
    /// [`VolumeKeyError`] when they are no XTS key. The bytes are wiped all the same.
    pub fn new(bytes: Vec<u8>) -> Result<Self, VolumeKeyError> {
        // `into_boxed_slice` would leave an unwiped copy behind where capacity and length differ.
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

    /// The key bytes: data key, then tweak key. What is made of them must be wiped as well.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The key length in bits, both halves counted, as cryptsetup's `keysize` counts: 512 or 256.
    pub fn bits(&self) -> usize {
        self.0.len() * 8
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bits)", self.bits())
    }
}

/// What a person or a key source knows, and a keyslot is opened with: any bytes, as `cryptsetup --key-file` takes them.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes over the bytes, which are wiped when the passphrase is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes. What is made of them must be wiped as well.
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
    fn equal_halves_and_odd_lengths_are_no_key() {
        assert_eq!(VolumeKey::new(vec![7; 64]).unwrap_err(), VolumeKeyError::EqualHalves);
        assert_eq!(VolumeKey::new(vec![7; 48]).unwrap_err(), VolumeKeyError::Length(48));
        assert_eq!(VolumeKey::new(vec![]).unwrap_err(), VolumeKeyError::Length(0));
    }
}
