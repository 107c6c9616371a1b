//! The hashes that LUKS names in its headers.

use std::fmt;

use sha1::digest::Digest;

use super::LuksError;

/// A hash function for PBKDF2, the anti-forensic splitter and plain mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashAlgorithm {
    /// SHA-1, 20 bytes: cryptsetup's default before version 1.7.
    Sha1,
    /// SHA-256, 32 bytes: cryptsetup's default since version 1.7.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
    /// SHA-224, 28 bytes.
    Sha224,
    /// SHA-384, 48 bytes.
    Sha384,
    /// RIPEMD-160, 20 bytes: plain mode's default before cryptsetup 2.7; some old LUKS1 volumes use it.
    Ripemd160,
    /// SHA-512/224, 28 bytes.
    Sha512_224,
    /// SHA-512/256, 32 bytes.
    Sha512_256,
    /// Whirlpool, 64 bytes.
    Whirlpool,
    /// SHA3-224, 28 bytes.
    Sha3_224,
    /// SHA3-256, 32 bytes.
    Sha3_256,
    /// SHA3-384, 48 bytes.
    Sha3_384,
    /// SHA3-512, 64 bytes.
    Sha3_512,
    /// BLAKE2b, 64 bytes.
    Blake2b512,
    /// BLAKE2s, 32 bytes.
    Blake2s256,
    /// SM3, 32 bytes.
    Sm3,
}

/// Evaluates an expression in which two type names stand for the RustCrypto type of a [`HashAlgorithm`] and for its HMAC.
macro_rules! with_hash {
    ($algorithm:expr, $hash:ident, $hmac:ident => $body:expr) => {
        $crate::luks::hash::with_hash!(@ $algorithm, $hash, $hmac, $body;
            Sha1 = sha1::Sha1, Hmac;
            Sha224 = sha2::Sha224, Hmac;
            Sha256 = sha2::Sha256, Hmac;
            Sha384 = sha2::Sha384, Hmac;
            Sha512 = sha2::Sha512, Hmac;
            Sha512_224 = sha2::Sha512_224, Hmac;
            Sha512_256 = sha2::Sha512_256, Hmac;
            Ripemd160 = ripemd::Ripemd160, Hmac;
            Whirlpool = whirlpool::Whirlpool, Hmac;
            // The crates of these hashes do not expose whole blocks, which the faster `Hmac` needs.
            Sha3_224 = sha3::Sha3_224, SimpleHmac;
            Sha3_256 = sha3::Sha3_256, SimpleHmac;
            Sha3_384 = sha3::Sha3_384, SimpleHmac;
            Sha3_512 = sha3::Sha3_512, SimpleHmac;
            Blake2b512 = blake2::Blake2b512, SimpleHmac;
            Blake2s256 = blake2::Blake2s256, SimpleHmac;
            Sm3 = sm3::Sm3, Hmac;
        )
    };
    (@ $algorithm:expr, $hash:ident, $hmac:ident, $body:expr; $($name:ident = $type:ty, $kind:ident;)*) => {
        match $algorithm {
            $($crate::luks::hash::HashAlgorithm::$name => {
                #[allow(dead_code, reason = "an expression may use only one of the two types")]
                type $hash = $type;
                #[allow(dead_code, reason = "as above")]
                type $hmac = hmac::$kind<$type>;
                $body
            })*
        }
    };
}
pub(in crate::luks) use with_hash;

impl HashAlgorithm {
    /// Every hash that nbdcrypt supports.
    pub const ALL: [Self; 16] = [
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Sha512_224,
        Self::Sha512_256,
        Self::Ripemd160,
        Self::Whirlpool,
        Self::Sha3_224,
        Self::Sha3_256,
        Self::Sha3_384,
        Self::Sha3_512,
        Self::Blake2b512,
        Self::Blake2s256,
        Self::Sm3,
    ];

    /// All hashes, for the error about an unsupported one.
    const SUPPORTED: &str = "it supports sha1, sha224, sha256, sha384, sha512, sha512-224, sha512-256, ripemd160, whirlpool, \
         sha3-224, sha3-256, sha3-384, sha3-512, blake2b-512, blake2s-256 and sm3";

    /// Returns the hash with this name, in upper or lower case, as cryptsetup reads it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name().eq_ignore_ascii_case(name))
    }

    /// Returns the hash with this name in a header.
    ///
    /// # Errors
    /// [`LuksError::Unsupported`] if nbdcrypt does not support it. `what` says what the hash is for.
    pub(in crate::luks) fn supported(what: &'static str, name: &str) -> Result<Self, LuksError> {
        Self::from_name(name).ok_or_else(|| LuksError::unsupported(what, name, Self::SUPPORTED))
    }

    /// Returns the name as headers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Sha224 => "sha224",
            Self::Sha384 => "sha384",
            Self::Sha512_224 => "sha512-224",
            Self::Sha512_256 => "sha512-256",
            Self::Ripemd160 => "ripemd160",
            Self::Whirlpool => "whirlpool",
            Self::Sha3_224 => "sha3-224",
            Self::Sha3_256 => "sha3-256",
            Self::Sha3_384 => "sha3-384",
            Self::Sha3_512 => "sha3-512",
            Self::Blake2b512 => "blake2b-512",
            Self::Blake2s256 => "blake2s-256",
            Self::Sm3 => "sm3",
        }
    }

    /// Returns the length of a digest in bytes.
    pub fn output_len(self) -> usize {
        with_hash!(self, H, P => <H as Digest>::output_size())
    }

    /// Fills `out` with the start of the digest of the concatenated `parts`. `out` is at most one digest long.
    pub(in crate::luks) fn digest_into(self, parts: &[&[u8]], out: &mut [u8]) {
        use zeroize::Zeroize;
        with_hash!(self, H, P => {
            let mut hasher = H::new();
            parts.iter().for_each(|part| hasher.update(part));
            let mut digest = hasher.finalize();
            out.copy_from_slice(&digest[..out.len()]);
            digest.as_mut_slice().zeroize();
        });
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_either_case() {
        assert_eq!(HashAlgorithm::from_name("SHA256"), Some(HashAlgorithm::Sha256));
        assert_eq!(HashAlgorithm::from_name("md5"), None);
    }

    #[test]
    fn digests_match_fips_180() {
        let mut digest = [0; 20];
        HashAlgorithm::Sha1.digest_into(&[b"a", b"bc"], &mut digest);
        assert_eq!(digest[..4], [0xa9, 0x99, 0x3e, 0x36]);
        let mut digest = [0; 4];
        HashAlgorithm::Sha512.digest_into(&[b"abc"], &mut digest);
        assert_eq!(digest, [0xdd, 0xaf, 0x35, 0xa1]);
        // The test vector of the algorithm's authors.
        HashAlgorithm::Ripemd160.digest_into(&[b"abc"], &mut digest);
        assert_eq!(digest, [0x8e, 0xb2, 0x08, 0xf7]);
    }

    #[test]
    fn the_list_of_supported_hashes_is_complete() {
        let listed: Vec<_> = HashAlgorithm::SUPPORTED.trim_start_matches("it supports ").split([',', ' ']).collect();
        assert!(HashAlgorithm::ALL.iter().all(|hash| listed.contains(&hash.name())), "{listed:?}");
    }
}
