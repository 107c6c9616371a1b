//! A plain dm-crypt volume, as `cryptsetup open --type plain` opens it. It has no header, so only command-line options
//! or the configuration describe it.

use engine::key::{Passphrase, VolumeKey, VolumeKeyError};
use engine::layout::Segment;
use engine::luks::LuksError;
use engine::luks::plain::{self, PassphraseHash, PlainSegment};
use engine::xts::{CpuPath, UnavailableCpuPath, Xts};

/// The parameters of a plain volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainVolume {
    /// The segment of the disk that holds the data.
    pub data: PlainSegment,
    /// The key's length in bytes, with both halves counted: 64 or 32.
    pub key_len: usize,
    /// How many bytes of the secret to use, from its start. `None` uses all of them.
    pub keyfile_size: Option<usize>,
    /// How a passphrase is turned into the key. With `None`, the secret is the key.
    pub hash: Option<PassphraseHash>,
    /// Whether a secret from a key file is hashed, too. cryptsetup hashes only a secret that is typed or comes from
    /// standard input.
    pub hash_key_file: bool,
    /// Whether the IV counts encryption units instead of 512-byte units.
    pub iv_large_sectors: bool,
    /// The cipher.
    pub cipher: PlainCipher,
}

/// The ciphers of plain volumes, with cryptsetup's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlainCipher {
    /// `aes-xts-plain64`: an IV of 64 bits.
    #[default]
    Plain64,
    /// `aes-xts-plain`: an IV of 32 bits, which repeats after 2^32 sectors. Up to there it equals `plain64`.
    Plain,
}

impl PlainCipher {
    /// Returns the cipher with this name.
    ///
    /// # Errors
    /// If there is no such cipher. The text lists the supported names.
    pub fn from_name(name: &str) -> Result<Self, String> {
        match name {
            "aes-xts-plain64" => Ok(Self::Plain64),
            "aes-xts-plain" => Ok(Self::Plain),
            other => Err(format!(
                "the cipher {other:?} is not supported; the supported ciphers are aes-xts-plain64 and aes-xts-plain"
            )),
        }
    }
}

/// cryptsetup's defaults, except for the key length, which is the length of an AES-256-XTS key.
impl Default for PlainVolume {
    fn default() -> Self {
        Self {
            data: PlainSegment::default(),
            key_len: VolumeKey::AES_256,
            keyfile_size: None,
            hash: None,
            hash_key_file: false,
            iv_large_sectors: false,
            cipher: PlainCipher::Plain64,
        }
    }
}

/// Why a secret is not the key of a plain volume.
#[derive(Debug, thiserror::Error)]
pub enum PlainKeyError {
    /// The secret has fewer bytes than should be used.
    #[error("it has {found} bytes, fewer than the {wanted} bytes to use")]
    TooShort {
        /// The number of bytes of the secret.
        found: usize,
        /// The number of bytes to use.
        wanted: usize,
    },
    /// The secret is not a key of the requested length.
    #[error(transparent)]
    Key(#[from] VolumeKeyError),
}

impl PlainVolume {
    /// Returns the key, which is the secret itself or is derived from it. `is_key_file` says whether the secret is the
    /// content of a key file other than standard input.
    ///
    /// # Errors
    /// [`PlainKeyError`], if the secret is too short or not a valid key.
    pub fn key(&self, secret: &Passphrase, is_key_file: bool) -> Result<VolumeKey, PlainKeyError> {
        let bytes = secret.expose();
        let wanted = self.keyfile_size.unwrap_or(bytes.len());
        let bytes = bytes.get(..wanted).ok_or(PlainKeyError::TooShort { found: bytes.len(), wanted })?;
        Ok(match self.hash {
            Some(hash) if !self.ignores_hash(is_key_file) => plain::key_from_passphrase(hash, bytes, self.key_len)?,
            _ => plain::key_from_file(bytes, self.key_len)?,
        })
    }

    /// Returns whether a hash is given but not used for this kind of secret. `cryptsetup open --type plain --key-file
    /// FILE` does not use it either.
    pub fn ignores_hash(&self, is_key_file: bool) -> bool {
        self.hash.is_some() && is_key_file && !self.hash_key_file
    }

    /// Returns the cipher with its kind of IV, for this CPU path.
    ///
    /// # Errors
    /// [`UnavailableCpuPath`], if this CPU does not support the path.
    pub fn cipher(&self, key: &VolumeKey, path: CpuPath) -> Result<Xts, UnavailableCpuPath> {
        let cipher = Xts::with_path(key, path)?;
        Ok(if self.iv_large_sectors { cipher.with_large_sectors() } else { cipher })
    }

    /// Returns the segment that holds the data on a disk of `disk_len` bytes.
    ///
    /// # Errors
    /// [`LuksError`], if the data does not fit on the disk, or a 32-bit IV would repeat.
    pub fn segment(&self, disk_len: u64) -> Result<Segment, LuksError> {
        let segment = self.data.on_disk(disk_len)?;
        if self.cipher == PlainCipher::Plain {
            plain::refuse_short_iv(&segment, self.iv_large_sectors)?;
        }
        Ok(segment)
    }
}

#[cfg(test)]
mod tests {
    use engine::luks::HashAlgorithm;

    use super::*;

    fn secret(len: usize) -> Passphrase {
        Passphrase::new((1..=len).map(|n| n.to_le_bytes()[0]).collect())
    }

    #[test]
    fn a_key_has_exactly_the_length_that_was_asked_for() {
        for key_len in [32, 64] {
            let plain = PlainVolume { key_len, ..PlainVolume::default() };
            for len in [1, 31, 32, 33, 63, 64, 65, 128] {
                let key = plain.key(&secret(len), true);
                assert_eq!(key.is_ok(), len == key_len, "{len} bytes for a key of {key_len}");
                if let Err(error) = key {
                    let (found, wanted) = (format!("it has {len} bytes"), format!("{key_len} were asked for"));
                    assert!(error.to_string().contains(&found) && error.to_string().contains(&wanted), "{error}");
                }
            }
            let first = PlainVolume { keyfile_size: Some(key_len), ..plain };
            assert_eq!(first.key(&secret(100), true).unwrap().expose(), secret(key_len).expose());
            assert!(matches!(first.key(&secret(20), true), Err(PlainKeyError::TooShort { found: 20, .. })));
        }
    }

    #[test]
    fn a_key_file_is_hashed_only_on_request() {
        let hash = Some(PassphraseHash::Hash(HashAlgorithm::Sha256));
        let plain = PlainVolume { hash, ..PlainVolume::default() };
        assert_eq!(plain.key(&secret(64), true).unwrap().expose(), secret(64).expose());
        assert!(plain.ignores_hash(true) && !plain.ignores_hash(false));
        let typed = plain.key(&secret(64), false).unwrap();
        assert_ne!(typed.expose(), secret(64).expose());
        let hashed = PlainVolume { hash_key_file: true, ..plain };
        assert_eq!(hashed.key(&secret(64), true).unwrap().expose(), typed.expose());
        // A text with another length than the key must be a passphrase. It is refused, and not used as a key.
        assert!(plain.key(&secret(20), true).is_err());
    }
}
